"""What is measured once, counted or timed begins with what moves: tensor by tensor, group by group."""

import copy
import math

import pytest
import torch
from torch import nn

from elra_hf import rate

from .problems import VARIANTS, flat, loss_of, net, train

every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
scopes = pytest.mark.parametrize("scope", ["global", "group", "tensor"])
apart = pytest.mark.parametrize("scope", ["group", "tensor"])
PAPER = {"c2min": {"horizon": math.inf}, "p2min": {"horizon": math.inf}, "adamw": {}}


def adapters(cls, scope, lr, groups):
    """LoRA: a product with one factor at 0, in whose first step the other one has a gradient of 0. Losses and rates."""
    torch.manual_seed(1)
    a, b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
    nn.init.zeros_(b.weight)
    params = [a.weight, b.weight]
    optimizer = cls([{"params": [p]} for p in params] if groups else params, lr=lr, scope=scope)
    generator, seen = torch.Generator().manual_seed(0), []
    data, target = torch.randn(256, 16, generator=generator), torch.randn(16, 16, generator=generator) / 4
    for _ in range(40):
        x = data[torch.randint(256, (32,), generator=generator)]
        optimizer.zero_grad()
        loss = (b(a(x)) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), *(float(group["alpha"]) for group in optimizer.param_groups)))
    return seen


@every
@scopes
@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
def test_a_factor_at_zero_does_not_tie_the_rate_to_lr(cls, scope, groups):
    runs = [adapters(cls, scope, lr, groups)[-1] for lr in (1e-7, 1e-5, 1e-2)]
    assert runs[0] == pytest.approx(runs[2], rel=1e-3)
    assert runs[1] == pytest.approx(runs[2], rel=1e-3)
    assert runs[0][0] < 0.5 * adapters(cls, scope, 1e-5, groups)[0][0]


@every
@scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernels, and by plain torch
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_forbidden_by_infinity_stays_so_and_does_not_tie_the_rate_to_lr(cls, scope, dtype, weight_decay):
    """As transitions in a CRF. Such a weight has a gradient of 0, and no size."""
    losses = []
    for lr in (1e-8, 1e-2):
        model = net(dtype=dtype)
        logits = nn.Parameter(torch.tensor([1.0, -math.inf, -1.0, -math.inf], dtype=dtype))
        optimizer = cls([*model.parameters(), logits], lr=lr, scope=scope, weight_decay=weight_decay)
        for step in range(40):
            optimizer.zero_grad()
            loss = loss_of(model, step) + (logits.softmax(0) @ torch.arange(4.0, dtype=dtype)).square()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert logits.isinf().tolist() == [False, True, False, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@every
@scopes
def test_weights_that_all_start_at_zero_do_not_tie_the_rate_to_lr(cls, scope):
    """As in a logistic regression."""
    losses = []
    for lr in (1e-8, 1e-2):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        losses.append(train(model, cls(model.parameters(), lr=lr, scope=scope), range(40)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def freed(cls, scope, frozen, **options):
    """y alone in a loss that is a sum, held still for some steps; where it is after 25 of its own, and its group's numbers."""
    x, y = (torch.full((8,), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0))
    optimizer = cls([{"params": [x]}, {"params": [y]}], scope=scope, **options)
    for step in range(frozen + 25):
        optimizer.zero_grad()
        loss = 0.01 * (x**4).sum() + ((y**4).sum() if step >= frozen else 0.0)
        loss.backward()
        optimizer.step()
    group = optimizer.param_groups[1]
    return y.detach(), [float(group[f"elra_{name}"]) for name in ("alpha", "cos", "clock", "steps", "scale", "size")]


@pytest.mark.parametrize("name", VARIANTS)
@apart
@pytest.mark.parametrize("paper", [False, True], ids=["default", "paper"])
def test_a_group_that_is_freed_later_starts_as_one_that_was_never_frozen(name, scope, paper):
    options = PAPER[name] if paper else {}
    y, numbers = freed(VARIANTS[name], scope, 40, **options)
    z, fresh = freed(VARIANTS[name], scope, 0, **options)
    assert torch.equal(y, z)
    assert numbers == fresh


@every
@apart
def test_a_group_that_is_added_later_finds_its_own_rate(cls, scope):
    """As a fresh optimizer finds it, under the narrower scopes."""
    x, y, z = (torch.full((8,), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0, 2.0))
    optimizer, alone = cls([x], scope=scope), cls([z], scope=scope)
    for step in range(75):
        if step == 50:
            optimizer.add_param_group({"params": [y]})
        optimizer.zero_grad()
        (0.01 * (x**4).sum() + ((y**4).sum() if step >= 50 else 0.0)).backward()
        optimizer.step()
        if step >= 50:
            alone.zero_grad()
            (z**4).sum().backward()
            alone.step()
    assert torch.equal(y, z)
    assert optimizer.param_groups[1]["alpha"].item() == pytest.approx(alone.param_groups[0]["alpha"].item(), rel=1e-12)


@every
@scopes
def test_tensors_that_are_not_trained_yet_do_not_count(cls, scope):
    """The group's α, which users see and late tensors start from, is that of those that move."""
    seen = []
    for guests in (0, 3):
        model = net()
        still = [torch.ones(5, requires_grad=True) for _ in range(guests)]
        optimizer = cls([*model.parameters(), *still], lr=1e-5, scope=scope)
        train(model, optimizer, range(10))
        seen.append(optimizer.param_groups[0]["alpha"].item())
        assert not any(optimizer.state.get(p) for p in still)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@every
@scopes
def test_dummy_steps_at_the_start_change_nothing(cls, scope):
    """Gradients of 0, of some tensors or of all, as distributed checkpoints, ZeRO and tracers take them."""
    plain, dummied = net(), net()
    a, b = cls(plain.parameters(), scope=scope), cls(dummied.parameters(), scope=scope)
    for some in ([dummied[0].weight], list(dummied.parameters()), list(dummied.parameters())):
        b.zero_grad()
        for p in some:
            p.grad = torch.zeros_like(p)
        b.step()
    # a tensor of another age is summed apart, hence the last digits
    assert train(plain, a, range(12)) == pytest.approx(train(dummied, b, range(12)), rel=1e-5)
    for name, value in a.state_dict()["param_groups"][0].items():
        if isinstance(value, float):
            assert b.state_dict()["param_groups"][0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@every
@apart
def test_a_group_held_by_lr_zero_is_born_when_it_moves(cls, scope):
    """lr=0 in a group, raised by hand later."""
    x, y, z = (torch.full((8,), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0, 2.0))
    optimizer, alone = cls([{"params": [x]}, {"params": [y], "lr": 0.0}], lr=1e-3, scope=scope), cls([z], lr=1e-3)
    for step in range(30):
        if step == 20:
            assert torch.equal(y.detach(), torch.full_like(y, 2.0))
            optimizer.param_groups[1]["lr"] = 1e-3
        optimizer.zero_grad()
        (0.01 * (x**4).sum() + (y**4).sum()).backward()
        optimizer.step()
    z.grad = 4 * z.detach() ** 3
    alone.step()
    group = optimizer.param_groups[1]
    assert group["elra_steps"].item() == 10
    assert group["alpha"].item() > alone.param_groups[0]["alpha"].item()  # it has found its first rate, and gone on


@every
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_the_first_rate_waits_for_a_warm_up_from_zero(cls, kind):
    """The first step that moves is as long as without the warm-up, whatever lr is."""
    lengths = []
    for lr, zeros in ((1e-5, 0), (1e-5, 3), (1e-2, 3)):
        model = net()
        optimizer = cls(model.parameters(), lr=torch.tensor(lr) if kind == "tensor" else lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, zeros=zeros: float(t >= zeros))
        for _ in range(zeros):
            before = flat(model)
            train(model, optimizer, [0])
            schedule.step()
            assert torch.equal(flat(model), before)
            assert rate(optimizer) == 0.0
        before = flat(model)
        train(model, optimizer, [0])
        lengths.append((flat(model) - before).norm().item())
    assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-3)


@every
def test_ages_that_a_restart_brought_to_one_count_stay_apart(cls):
    """One that sits out then does not count the steps of the other one, with a checkpoint in between or without."""
    ends = []
    for resumed in (False, True):
        x, y = (torch.full((4,), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0))
        optimizer = cls([x, y])
        for step in range(12):
            x.grad = x.detach() - 3.0
            y.grad = 0.1 * y.detach() + 0.5 if step in (1, 2, 3) or step > 6 else None
            if step == 2:
                x.grad[0] = math.nan
            optimizer.step()
            if step == 3 and resumed:
                saved, optimizer = copy.deepcopy(optimizer.state_dict()), cls([x, y])
                optimizer.load_state_dict(saved)
        ends.append((x.detach(), y.detach(), *(optimizer.state[p]["way"] for p in (x, y)), optimizer.param_groups[0]["alpha"]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
