"""The torch.optim contract: what people do to an optimizer besides stepping it."""

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import elra_hf
from elra_hf import Adam, C2Min, Elra, ElraAdamW, ElraC2Min, ElraP2Min, Momentum, P2Min, Tracking, rate

from .problems import PIECES, VARIANTS, flat, loss_of, momentum_tracking, net, same, snapshot, train

every = pytest.mark.parametrize("cls", [*VARIANTS.values(), momentum_tracking], ids=[*VARIANTS, "fourth"])


# ---- variant × dtype × groups × closure × maximize × save and load -------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_matrix(cls, dtype, groups, closure, maximize):
    model = net(dtype=dtype)
    params = list(model.parameters())
    split = [{"params": params[:2], "weight_decay": 0.01}, {"params": params[2:], "lr": 2e-3}][: groups if groups > 1 else 0]
    optimizer = cls(split or params, lr=1e-3, maximize=maximize)
    sign = -1.0 if maximize else 1.0
    restored = None

    def objective():
        optimizer.zero_grad()
        loss = sign * loss_of(model, 0)
        loss.backward()
        return loss

    first = sign * loss_of(model, 0).item()
    for t in range(60):
        if closure:
            optimizer.step(objective)
        else:
            objective()
            optimizer.step()
        if t == 30:
            restored = cls([{**g, "params": g["params"]} for g in split] or params, lr=0.3, maximize=maximize)
            restored.load_state_dict(optimizer.state_dict())
            assert same(snapshot(restored), snapshot(optimizer))
            optimizer = restored
    last = sign * loss_of(model, 0).item()
    assert sign * last < sign * first - 0.05
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in params)


# ---- steps -----------------------------------------------------------------------------------------------------------------


@every
def test_closure_is_called_once_first_with_gradients_enabled(cls):
    model = net()
    optimizer = cls(model.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    before = flat(model)
    with torch.no_grad():
        returned = optimizer.step(closure)
    assert calls == [True]
    assert returned.item() == pytest.approx(loss_of_weights(before))
    assert not torch.equal(before, flat(model))


def loss_of_weights(weights):
    model = net()
    nn.utils.vector_to_parameters(weights, model.parameters())
    return loss_of(model, 0).item()


@every
def test_no_host_synchronisation(cls):
    """A meta tensor has no value: whoever asks for one, with item(), float() or if, raises."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((8, 6), (8,))]
    optimizer = cls(params, weight_decay=0.1)
    for step in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step(loss=torch.empty((), device="meta") if step == 2 else None)
    assert optimizer.param_groups[0]["alpha"].device.type == "meta"


def test_the_trace_would_notice_a_synchronisation():
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.empty((), device="meta"))


@every
def test_what_was_shown_stays_what_it_was(cls):
    """Whoever keeps ``group["alpha"]`` of each step has a curve, and not the last value many times."""
    model = net()
    optimizer = cls(model.parameters())
    kept, read = [], []
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        kept.append(optimizer.param_groups[0]["alpha"])
        read.append(kept[-1].item())
    assert [alpha.item() for alpha in kept] == read
    assert len(set(read)) > 1


@every
def test_plain_torch_refuses_to_be_captured(cls, monkeypatch):
    model = net()
    optimizer = cls(model.parameters())
    loss_of(model, 0).backward()
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    before = flat(model)
    with pytest.raises(RuntimeError, match="does not run in few launches"):
        optimizer.step()
    assert torch.equal(flat(model), before)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch may not trace a step (docs/cost.md); torch 2.6 cannot")
@every
def test_compiles_to_the_same_result(cls):
    """Without a graph break, and compiled three times at most. The first step is taken by itself, for it reads a tensor lr."""
    torch._dynamo.reset()
    eager, compiled = net(), net()
    rates = [torch.tensor(1e-3) for _ in range(2)]
    a, b = cls(eager.parameters(), lr=rates[0]), cls(compiled.parameters(), lr=rates[1])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(b.step, backend=counter, fullgraph=True)
    for t in range(6):
        for model in (eager, compiled):
            model.zero_grad()
            loss_of(model, t).backward()
        a.step()
        step() if t else b.step()
        for lr in rates:
            lr.mul_(0.9)  # a schedule
    assert torch.allclose(flat(eager), flat(compiled), rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 3


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch may not trace a step (docs/cost.md); torch 2.6 cannot")
@every
def test_compiled_steps_are_nobody_elses_moves(cls):
    """Every other step is compiled; the eager ones in between do not take it for a constraint."""
    torch._dynamo.reset()
    eager, mixed = net(), net()
    a, b = cls(eager.parameters()), cls(mixed.parameters())
    compiled = torch.compile(b.step, backend="eager")
    for t in range(20):
        train(eager, a, [t])
        mixed.zero_grad()
        loss_of(mixed, t).backward()
        compiled() if t % 2 else b.step()
    assert torch.allclose(flat(eager), flat(mixed), rtol=1e-4, atol=1e-6)
    with elra_hf.averaged(a), elra_hf.averaged(b):
        assert torch.allclose(flat(eager), flat(mixed), rtol=1e-4, atol=1e-6)


@every
def test_groups_share_one_rate_and_weigh_by_their_lr(cls):
    """A group with 16 times the lr moves 16 times as far at the same direction."""
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = cls([{"params": [x]}, {"params": [y], "lr": 16e-4}], lr=1e-4)
    for _ in range(3):
        before = x.detach().clone(), y.detach().clone()
        g = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
        x.grad, y.grad = g.clone(), g.clone()
        optimizer.step()
        moved = x.detach() - before[0], y.detach() - before[1]
        assert torch.allclose(16 * moved[0], moved[1], rtol=1e-9)
    first, second = optimizer.param_groups
    assert first["alpha"] == second["alpha"]


@every
def test_a_group_that_moved_further_counts_more(cls):
    """The multipliers are a metric: with one group at lr 0 only the other one is measured."""
    alphas = []
    for with_still_group in (False, True):
        x, still = (
            torch.ones(3, dtype=torch.float64, requires_grad=True),
            torch.ones(9, dtype=torch.float64, requires_grad=True),
        )
        groups = [{"params": [x]}] + ([{"params": [still], "lr": 0.0}] if with_still_group else [])
        optimizer = cls(groups, lr=1e-3)
        for t in range(10):
            x.grad = torch.tensor([0.3, -0.2, 0.1 * (-1) ** t], dtype=torch.float64)
            still.grad = torch.full((9,), 100.0 * (-1) ** t, dtype=torch.float64)
            optimizer.step()
        alphas.append(optimizer.param_groups[0]["alpha"].item())
        assert torch.equal(still.detach(), torch.ones(9, dtype=torch.float64))
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-12)


@every
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_scheduler_multiplies_and_does_not_touch_alpha(cls, tensor_lr):
    """Under a constant schedule of 0.1 the steps are a tenth as long; the first α is the same."""
    model = net(dtype=torch.float64)
    optimizer = cls(model.parameters(), lr=torch.tensor(1e-5) if tensor_lr else 1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1)
    before = flat(model)
    train(model, optimizer, [0])
    tenth = flat(model) - before
    tenth_rate = rate(optimizer)
    scheduler.step()

    other = net(dtype=torch.float64)
    unscheduled = cls(other.parameters(), lr=1e-5)
    train(other, unscheduled, [0])
    assert torch.allclose(10 * tenth, flat(other) - before, rtol=1e-2, atol=1e-7)
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(unscheduled.param_groups[0]["alpha"].item())
    assert tenth_rate == pytest.approx(0.1 * rate(unscheduled))


@every
def test_parameters_without_a_gradient_in_some_steps(cls):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3)
    head = model[2].weight
    for t in range(30):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if t % 3 == 1:
            head.grad = None
        before = head.detach().clone()
        optimizer.step()
        assert (t % 3 == 1) == torch.equal(before, head.detach())
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_parameter_that_sat_out_is_not_measured_by_the_papers_rule(cls):
    """It did not move, so its gradient says nothing about the last step."""
    alphas = []
    for with_guest in (False, True):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        guest = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = cls([x, guest] if with_guest else [x], lr=3e-2, horizon=math.inf)
        for t in range(6):
            x.grad = torch.tensor([0.3, -0.2, 0.1 * (-1) ** t], dtype=torch.float64)
            # present only in every other step, so never in two successive ones
            guest.grad = torch.full((3,), 5.0, dtype=torch.float64) if with_guest and t % 2 == 0 else None
            optimizer.step()
        alphas.append(optimizer.param_groups[0]["alpha"].item())
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-9)


@every
def test_frozen_and_later_unfrozen(cls):
    model = net()
    model[0].requires_grad_(False)
    optimizer = cls(model.parameters(), lr=1e-3)
    before = flat(model[0])
    train(model, optimizer, range(5))
    assert torch.equal(before, flat(model[0]))
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, range(5, 10))
    assert not torch.equal(before, flat(model[0]))


@every
def test_a_late_group_starts_at_the_rate_reached(cls):
    model, late = net(), torch.ones(4, requires_grad=True)
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, range(10))
    reached = optimizer.param_groups[0]["alpha"].item()
    optimizer.add_param_group({"params": [late], "lr": 2e-3})
    assert optimizer.param_groups[1]["alpha"].item() == reached
    late.grad = torch.ones(4)
    train(model, optimizer, [10])
    assert optimizer.param_groups[0]["alpha"] == optimizer.param_groups[1]["alpha"]


@every
@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_narrower_scopes_keep_rates_apart(cls, scope):
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = cls([{"params": [x]}, {"params": [y]}], lr=2e-3, scope=scope)
    for t in range(8):
        x.grad = torch.tensor([1.0, 0.5, 0.2])
        y.grad = torch.tensor([1.0, 0.5, 0.2]) * (-1) ** t
        optimizer.step()
    first, second = optimizer.param_groups
    assert first["alpha"] > 2 * second["alpha"]


@every
def test_complex_parameters_move_as_their_real_parts(cls):
    z0 = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    z, x = z0.clone().requires_grad_(), torch.view_as_real(z0).clone().requires_grad_()
    a, b = cls([z], lr=1e-3), cls([x], lr=1e-3)
    for _ in range(10):
        for optimizer, loss in ((a, z.abs().pow(4).sum()), (b, x.square().sum(-1).square().sum())):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.allclose(torch.view_as_real(z.detach()), x.detach(), rtol=1e-4, atol=1e-6)


@every
def test_mixed_dtypes_in_one_optimizer(cls):
    tensors = [torch.ones(4, dtype=d, requires_grad=True) for d in (torch.float64, torch.float32, torch.bfloat16)]
    optimizer = cls(tensors, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sum((t.double() ** 2).sum() for t in tensors).backward()
        optimizer.step()
    assert optimizer.param_groups[0]["alpha"].dtype == torch.float64
    assert all(t.detach().abs().max() < 1 for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every
def test_low_precision_products_are_summed_in_float32(cls, dtype):
    """10,000 terms that a running sum in the dtype itself could not add up."""
    low, high = (torch.ones(10_000, dtype=d, requires_grad=True) for d in (dtype, torch.float32))
    a, b = cls([low], lr=1e-3), cls([high], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        g = (0.01 + 0.01 * torch.randn(10_000, generator=generator)).to(dtype)
        low.grad, high.grad = g.clone(), g.float()
        a.step()
        b.step()
    assert a.param_groups[0]["cos"].item() == pytest.approx(b.param_groups[0]["cos"].item(), rel=1e-2)
    assert a.param_groups[0]["alpha"].item() == pytest.approx(b.param_groups[0]["alpha"].item(), rel=1e-2)


@every
def test_strides_do_not_matter(cls):
    """Channels-last weights, whose gradients may come with other strides."""
    results = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3)
        if channels_last:
            conv = conv.to(memory_format=torch.channels_last)
        optimizer = cls(conv.parameters(), lr=1e-3)
        for t in range(5):
            optimizer.zero_grad()
            conv(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            if t == 3:
                conv.weight.grad = conv.weight.grad.contiguous()
            optimizer.step()
        results.append(conv.weight.detach().contiguous())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


# ---- trouble ---------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_never_reaches_x(cls, poison):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, range(10))
    alpha = optimizer.param_groups[0]["alpha"].item()
    optimizer.zero_grad()
    loss_of(model, 10).backward()
    model[0].weight.grad[0, 0] = poison
    optimizer.step()
    group = optimizer.param_groups[0]
    assert group["alpha"].item() < alpha
    assert group["restarts"].item() == 1
    assert all(torch.isfinite(t).all() for t in snapshot(optimizer) if not torch.isinf(t).any())
    assert torch.isfinite(flat(model)).all()
    losses = train(model, optimizer, range(10, 60))
    assert losses[-1] < losses[0]


@every
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("broken", [1, 2, 100])
def test_bad_gradients_take_from_the_rate_only_while_they_last(cls, broken, scope):
    """Broken rows, however many come in a row, must not bring the rate to nothing."""

    def run(broken):
        model = net()
        optimizer = cls(model.parameters(), lr=1e-3, scope=scope)
        for t in [*range(9), *[9] * broken, *range(10, 13)]:
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 9:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
        return optimizer.param_groups[0]["alpha"].item()

    assert run(broken) > 0.6 * run(0)
    assert run(broken) == pytest.approx(run(1), rel=1e-6)


@every
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_gradient_of_zeros_between_a_bad_one_and_a_sound_one_changes_nothing(cls, scope):
    """As of a batch in which every label is masked: what the bad one took from the rate still comes back."""

    def run(zeros):
        model = net()
        optimizer = cls(model.parameters(), lr=1e-3, scope=scope)
        for t in range(12):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 9:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()
            for _ in range(zeros if t == 9 else 0):
                for p in model.parameters():
                    p.grad.zero_()
                optimizer.step()
        return optimizer.param_groups[0]["alpha"].item()

    assert run(1) == pytest.approx(run(0), rel=1e-6)


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize("horizon", [20.0, math.inf])
def test_an_explosion_takes_x_back(cls, horizon):
    """By the last step with the paper's rule, to the average of the iterates otherwise."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-2, horizon=horizon)
    iterates = [x.detach().clone()]
    for g in ([1.0, 0.5], [0.9, 0.6], [0.8, 0.4]):
        x.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        iterates.append(x.detach().clone())
    alpha = optimizer.param_groups[0]["alpha"].item()
    x.grad = torch.tensor([-30.0, 50.0], dtype=torch.float64)  # more than ten times as long as the longest
    optimizer.step()
    back = iterates[-2] if math.isinf(horizon) else torch.stack(iterates).mean(0)
    assert torch.allclose(x.detach(), back, rtol=1e-12)
    group = optimizer.param_groups[0]
    assert group["restarts"].item() == 1
    longest = 0.98 * math.hypot(1.0, 0.5)  # two steps ago
    lowered = alpha * longest / math.hypot(30.0, 50.0)  # a step of that one's length, along the new gradient
    assert group["alpha"].item() == pytest.approx(lowered)
    x.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step()  # a first step again: along the gradient alone, α as it is
    assert group["alpha"].item() == pytest.approx(lowered)
    assert torch.allclose(x.detach(), back - lowered * x.grad, rtol=1e-12)


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_long_gradient_now_and_then_is_no_explosion(cls):
    """Where most data are learnt, one batch in a few has all of the gradient that is left."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-2)
    for t in range(60):
        x.grad = torch.tensor([1.0, (-1.0) ** t], dtype=torch.float64) * (1.0 if t % 10 == 0 else 0.01)
        optimizer.step()
    assert optimizer.param_groups[0]["restarts"].item() == 0


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize(("factor", "restarts"), [(4.9, 0), (-4.9, 0), (5.1, 0), (-5.1, 1), (9.9, 0)])
def test_a_gradient_five_times_as_long_is_an_explosion_where_it_points_back(cls, factor, restarts):
    """Of the longest of late, the first here, of which 0.98 are left after two steps."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x])
    for length in (1.0, 0.3, 0.3, factor * 0.98):
        x.grad = torch.tensor([length, 0.0], dtype=torch.float64)
        optimizer.step()
    assert optimizer.param_groups[0]["restarts"].item() == restarts


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize("away", [1.0, -1.0])
def test_a_gradient_that_grows_step_by_step_is_an_explosion_where_it_points_back(cls, away):
    """Threefold a step, which no step is ten times the last. Where it points on, x leaves a saddle, and nothing is wrong."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-3, bounds=(1e-3, 1.001e-3))
    restarts = []
    for t in range(20):
        growth = 3.0 ** max(t - 9, 0)
        x.grad = torch.tensor([-1.0, 0.0], dtype=torch.float64) * growth * (away if t > 9 else 1.0)
        optimizer.step()
        restarts.append(optimizer.param_groups[0]["restarts"].item())
    if away == 1.0:
        assert restarts[-1] == 0
    else:
        assert restarts.index(1) == 12  # 27 times as long as that of step 9, which counts as 1.1² times as long by then


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("warm", [False, True])
def test_data_without_noise_do_not_blow_the_run_up(cls, seed, warm):
    """On the whole of the data at every step the rate climbs past what is stable: once there the loss is not to run away."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=generator) for shape in ((256, 8), (8, 32), (32, 3)))
    y = torch.tanh(0.4 * x @ a) @ b
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = cls(model.parameters())
    shares = (lambda t: min((t + 1) / 50, (300 - t) / 250)) if warm else (lambda t: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 10.0 < losses[0]
    assert max(losses) < 1e3


@pytest.mark.parametrize("seed", [0, 1])
def test_data_that_are_learnt_wholly_do_not_tear_adams_weights_apart(seed):
    """The loss falls to 0 and the rate rises above the size of the weights, until a batch of some gradient comes."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=generator) for shape in ((256, 8), (8, 32), (32, 3)))
    y = (torch.tanh(0.4 * x @ a) @ b).argmax(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = ElraAdamW(model.parameters())
    losses, rates = [], []
    for _ in range(700):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        rates.append(rate(optimizer))
    assert max(rates) > 1.0
    assert optimizer.param_groups[0]["restarts"] > 0
    assert losses[-1] < 1e-4


@every
def test_an_exploded_loss_restarts_once_and_lowers_the_rate(cls):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-2)

    def step(loss):
        x.grad = torch.tensor([1.0, 0.5], dtype=torch.float64)
        before = x.detach().clone()
        optimizer.step(loss=loss)
        return torch.equal(x.detach(), before)

    for t in range(20):
        step(3.0 - 0.1 * t)
    alpha = optimizer.param_groups[0]["alpha"].item()
    step(torch.tensor([2000.0]))  # of shape (1,), as DataParallel returns it
    assert optimizer.param_groups[0]["restarts"].item() == 1
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(alpha / 3)
    for _ in range(3):
        assert not step(2000.0)  # the way out: what is normal now is learnt anew
    assert optimizer.param_groups[0]["restarts"].item() == 1


@every
@pytest.mark.parametrize("seed", range(3))
def test_losses_that_swing_are_no_explosion(cls, seed):
    """Batches of one: healthy losses differ by a factor of a thousand."""
    swing = torch.Generator().manual_seed(seed)
    model = net()
    optimizer = cls(model.parameters())
    for t in range(60):
        train(model, optimizer, [t], loss=float(torch.rand((), generator=swing) ** 3 + 1e-3))
    assert optimizer.param_groups[0]["restarts"].item() == 0


@every
def test_a_loss_of_a_closure_is_not_used(cls):
    model, other = net(), net()
    a, b = cls(model.parameters()), cls(other.parameters())
    for t in range(30):
        loss_of(model, t).backward()
        a.step(lambda t=t: torch.tensor([1e6 if t == 25 else 1e-6]))
        train(other, b, [t])
        model.zero_grad()
    assert torch.equal(flat(model), flat(other))


@every
def test_bounds_clamp_and_count(cls):
    x = torch.ones(2, requires_grad=True)
    optimizer = cls([x], lr=1e-3, bounds=(1e-4, 2e-3))
    for _ in range(30):
        x.grad = torch.tensor([1.0, 1.0])
        optimizer.step()
    group = optimizer.param_groups[0]
    assert group["alpha"].item() == pytest.approx(2e-3)
    assert group["clamps"].item() > 0


# ---- copies, pickles, hooks, wrappers ---------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_alike(cls, copier):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, range(5))
    twin_model, twin = copier((model, optimizer))
    assert train(model, optimizer, range(5, 12)) == train(twin_model, twin, range(5, 12))
    assert same(snapshot(optimizer), snapshot(twin))


@every
def test_an_older_pickle_gains_what_it_lacks(cls):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer, range(3))
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for name in ("elra_clamps", "elra_idle", "elra_losses", "maximize"):
            del group[name]
    old = type(optimizer).__new__(type(optimizer))
    old.__setstate__(state)
    train(model, old, range(3, 6))
    assert torch.isfinite(flat(model)).all()


def test_low_precision_state_keeps_its_own_dtype_on_load():
    """torch casts every state tensor to the dtype of its parameter."""
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = ElraAdamW([x], scope="tensor")
    for _ in range(3):
        x.grad = torch.full_like(x, 0.1)
        optimizer.step()
    other = ElraAdamW([x], scope="tensor")
    other.load_state_dict(optimizer.state_dict())
    assert other.state[x]["variance"].dtype == torch.float32
    assert same(snapshot(optimizer), snapshot(other))


def test_hooks_run():
    model, seen = net(), []
    optimizer = ElraC2Min(model.parameters())
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *a: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *a: seen.append("load"))
    train(model, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "save", "load"]


@every
def test_public_state(cls):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3)
    assert rate(optimizer) == pytest.approx(1e-3)
    train(model, optimizer, range(4))
    group = optimizer.param_groups[0]
    for name in ("alpha", "cos", "restarts"):
        assert group[name].shape == ()
        assert group[name].dtype == torch.float32
    assert rate(optimizer) == pytest.approx(group["alpha"].item())
    assert "alpha" in repr(optimizer)


def test_rate_looks_through_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = ElraC2Min(net().parameters(), lr=1e-3)
    assert rate(Wrapper(Wrapper(optimizer))) == pytest.approx(1e-3)
    with pytest.raises(TypeError, match="holds no ELRA optimizer"):
        rate(torch.optim.SGD(net().parameters(), lr=0.1))


@pytest.mark.parametrize(("direction", "rule"), PIECES, ids=repr)
def test_directions_and_rules_combine(direction, rule):
    model = net()
    losses = train(model, Elra(model.parameters(), direction, rule, lr=1e-3), range(80))
    assert losses[-1] < losses[0]


def test_variants_are_thin():
    p = [torch.ones(1, requires_grad=True)]
    assert (ElraC2Min(p).direction, ElraC2Min(p).rule) == (Momentum(), C2Min())
    assert (ElraP2Min(p).direction, ElraP2Min(p).rule) == (Momentum(), P2Min())
    assert isinstance(ElraAdamW(p).direction, Adam)


def test_public_names():
    assert set(elra_hf.__all__) <= set(dir(elra_hf)) | {name for name in elra_hf.__all__ if hasattr(elra_hf, name)}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = elra_hf.no_such_name


# ---- errors ----------------------------------------------------------------------------------------------------------------

X = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElraC2Min([X], lr=0.0), r"lr=0.0 .*positive"),
        (lambda: ElraC2Min([X], lr=float("nan")), r"lr=nan"),
        (lambda: ElraC2Min([X], betas=(0.8, 1.0)), r"betas=\(0.8, 1.0\).*\[0, 1\)"),
        (lambda: ElraC2Min([X], betas=0.8), r"betas=0.8"),
        (lambda: ElraC2Min([X], gain=1.5), r"gain=1.5.*\(0, 1\)"),
        (lambda: ElraC2Min([X], horizon=0.0), r"horizon=0.0.*positive"),
        (lambda: ElraP2Min([X], horizon=float("nan")), r"horizon=nan.*positive"),
        (lambda: ElraC2Min([X], gain=(0.5, -0.1)), r"gain=\(0.5, -0.1\)"),
        (lambda: ElraC2Min([X], gain=(0.1, 0.2, 0.3)), r"gain=.*pair"),
        (lambda: ElraP2Min([X], growth_limit=1.0), r"growth_limit=1.0.*above 1"),
        (lambda: ElraAdamW([X], eps=0.0), r"eps=0.0"),
        (lambda: ElraC2Min([X], weight_decay=-0.1), r"weight_decay=-0.1.*>= 0"),
        (lambda: ElraC2Min([X], scope="layer"), r"scope='layer'.*'global', 'group', 'tensor'"),
        (lambda: ElraC2Min([X], bounds=(1.0, 0.1)), r"bounds=\(1.0, 0.1\).*lowest < highest"),
        (lambda: ElraC2Min([X], restart_factor=1.0), r"restart_factor=1.0.*\(0, 1\)"),
        (lambda: ElraC2Min([{"params": [X], "gain": 0.3}]), r"gain=0.3 in a parameter group.*to the optimizer"),
        (lambda: ElraC2Min([{"params": [X], "betas": (2, 0)}]), r"betas=\(2, 0\)"),
        (lambda: ElraC2Min([{"params": [X], "lr": -1.0}]), r"lr=-1.0"),
        (lambda: Elra([X], Adam(), C2Min(horizon=math.inf)), r"C2Min.*needs.*\['gp', 'pp'\].*Adam.*offers"),
        (lambda: Elra([X], Adam(), P2Min(horizon=math.inf)), r"needs the inner products"),
        (lambda: Tracking(gain=0.0), r"gain=0.0.*positive"),
        (lambda: Tracking(horizon=-1.0), r"horizon=-1.0.*positive"),
        (lambda: Tracking(first=0.0), r"first=0.0.*positive"),
    ],
)
def test_bad_arguments_say_what_to_give(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_group_is_not_added():
    optimizer = ElraC2Min([X])
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "weight_decay": -1.0})
    assert len(optimizer.param_groups) == 1


@every
def test_sparse_gradients_are_refused(cls):
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = cls(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


@every
def test_weight_decay_has_a_limit(cls):
    """Whatever the rate, x loses at most one percent a step to it."""
    x = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1.0, weight_decay=100.0)
    x.grad = torch.full_like(x, 1e-9)
    optimizer.step()
    assert x.min().item() >= 5.0 * math.exp(-0.01) - 0.02
