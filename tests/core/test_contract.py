"""The torch.optim contract: what people do to an optimizer besides stepping it."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
    """A fake tensor has no value: whoever asks for one, with item(), float() or if, raises."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = cls(model.parameters(), weight_decay=0.1)
        for step in range(3):
            loss = model(torch.randn(4, 6)).square().mean()
            loss.backward()
            optimizer.step(loss=loss if step == 2 else None)
    assert isinstance(optimizer.param_groups[0]["alpha"], torch.Tensor)


def test_the_trace_would_notice_a_synchronisation():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        float(torch.randn(()))


@every
def test_compiles_to_the_same_result(cls):
    eager, compiled = net(), net()
    a, b = cls(eager.parameters(), lr=1e-3), cls(compiled.parameters(), lr=1e-3)
    step = torch.compile(b.step, backend="aot_eager")
    for t in range(4):
        for model in (eager, compiled):
            model.zero_grad()
            loss_of(model, t).backward()
        a.step()
        step()
    assert torch.allclose(flat(eager), flat(compiled), rtol=1e-5, atol=1e-7)


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


@every
def test_a_parameter_that_sat_out_is_not_measured(cls):
    """It did not move, so its gradient says nothing about the last step."""
    alphas = []
    for with_guest in (False, True):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        guest = torch.ones(3, dtype=torch.float64, requires_grad=True)
        # high enough for a step to tell: until then it is compared with all weights, the guest's too
        optimizer = cls([x, guest] if with_guest else [x], lr=3e-2)
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
    assert first["alpha"] > 2e-3 > second["alpha"]


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


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_an_explosion_takes_the_last_step_back(cls, decay):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-2, weight_decay=decay)
    for g in ([1.0, 0.5], [0.9, 0.6], [0.8, 0.4]):
        before = x.detach().clone()
        x.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    alpha = optimizer.param_groups[0]["alpha"].item()
    x.grad = torch.tensor([-30.0, 50.0], dtype=torch.float64)  # more than ten times as long as the longest
    optimizer.step()
    assert torch.allclose(x.detach(), before, rtol=1e-12)
    group = optimizer.param_groups[0]
    assert group["restarts"].item() == 1
    longest = 0.98 * math.hypot(1.0, 0.5)  # two steps ago
    lowered = alpha * longest / math.hypot(30.0, 50.0)  # a step of that one's length, along the new gradient
    assert group["alpha"].item() == pytest.approx(lowered)
    x.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step()  # a first step again: along the gradient alone, α as it is
    assert group["alpha"].item() == pytest.approx(lowered)
    shrunk = before * math.exp(-lowered * decay)
    assert torch.allclose(x.detach(), shrunk - lowered * x.grad, rtol=1e-12)


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
def test_the_rate_settles_with_the_overshoots(cls):
    """A cosine that is noise moves log α less and less; without it, as before an overshoot, the rule is the paper's."""
    rng = torch.Generator().manual_seed(0)
    drifts = []
    for horizon in (cls([X]).rule.horizon, math.inf):
        x = torch.zeros(50, requires_grad=True)
        optimizer = cls([x], lr=1.0, horizon=horizon)
        alphas = []
        for _ in range(1000):
            x.grad = torch.randn(50, generator=rng)
            optimizer.step()
            alphas.append(optimizer.param_groups[0]["alpha"].log().item())
        drifts.append(max(alphas[200:]) - min(alphas[200:]))
        assert (optimizer.param_groups[0]["clock"] > 300).item()
    assert drifts[0] < 0.3
    assert drifts[1] > 1.0


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
@pytest.mark.parametrize(("growth", "steps"), [(2.5, 6), (1.0, 30)])
def test_a_settled_rate_falls_where_steps_turn_round(cls, growth, steps):
    """Beyond the edge of stability every step overshoots, and far beyond it the iterates grow at once."""
    rng = torch.Generator().manual_seed(0)
    x = torch.zeros(50, requires_grad=True)
    optimizer = cls([x], lr=1.0)
    for _ in range(300):
        x.grad = torch.randn(50, generator=rng)
        optimizer.step()
    settled = optimizer.param_groups[0]["alpha"].item()
    for t in range(steps):
        x.grad = torch.full((50,), (-growth) ** t)
        optimizer.step()
    assert optimizer.param_groups[0]["clock"].item() > 100
    assert optimizer.param_groups[0]["restarts"].item() == 0
    assert optimizer.param_groups[0]["alpha"].item() < settled / 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("cls", "least"), [(ElraC2Min, 0.1), (ElraP2Min, 0.01)])  # p2min has no bound downwards
def test_noise_along_one_direction_does_not_kill_the_rate(cls, least, seed):
    """As where nearly all of the gradient is one direction's: every cosine is +1 or -1, and says nothing."""
    rng = torch.Generator().manual_seed(seed)
    direction = torch.randn(50, generator=rng)
    alphas = []
    for horizon in (cls([X]).rule.horizon, math.inf):
        x = torch.zeros(50, requires_grad=True)
        optimizer = cls([x], lr=1.0, horizon=horizon, bounds=(1e-30, 1e30))
        for t in range(2000):
            x.grad = direction * torch.randn(1, generator=rng)
            optimizer.step()
            if t == 100:
                early = optimizer.param_groups[0]["alpha"].item()
        alphas.append(optimizer.param_groups[0]["alpha"].item() / early)
    assert alphas[0] > least
    assert alphas[1] < 1e-10


def test_a_small_cosine_raises_a_rate_of_c2min_that_is_far_too_low():
    """Noise makes the cosine small at every rate; that steps are short says that it is no reason to be slow."""
    rng = torch.Generator().manual_seed(0)
    factors = []
    for horizon in (2.0, math.inf):
        x = torch.ones(10_000, requires_grad=True)
        optimizer = ElraC2Min([x], lr=1e-7, horizon=horizon)
        cosines = []
        for _ in range(60):
            x.grad = 0.3 + torch.randn(10_000, generator=rng)
            optimizer.step()
            cosines.append(optimizer.param_groups[0]["cos"].item())
        assert max(cosines) < 0.15
        factors.append(optimizer.param_groups[0]["alpha"].item() / 1e-7)
    assert factors[0] > 1000 > 20 > factors[1] > 1


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_steps_without_an_overshoot_start_the_clock_anew(cls):
    x = torch.zeros(3, requires_grad=True)
    optimizer = cls([x], lr=1e-3)
    clocks = []
    for sign in [1, -1] * 8 + [1] * 24:
        x.grad = torch.tensor([1.0, 0.5, 0.2]) * sign
        optimizer.step()
        clocks.append(optimizer.param_groups[0]["clock"].item())
    assert max(clocks) >= 3
    assert clocks[15] > 0
    assert clocks[-1] == 0


def along_one_line(optimizer, params, signs, size=1.0):
    """Gradients of one direction with these signs, and the rates."""
    alphas = []
    for sign in signs:
        for p in params:
            p.grad = torch.full_like(p, sign * size)
        optimizer.step()
        alphas.append(optimizer.param_groups[0]["alpha"].item())
    return alphas


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize(("cls", "most"), [(ElraC2Min, 1.5), (ElraP2Min, 2.0)])
def test_no_overshoot_counts_before_a_step_is_long_enough_beside_the_weights(cls, most, scope):
    """So that noise of one direction and either sign neither lowers nor settles a first rate that is far too low."""
    x = torch.full((100,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-8, scope=scope)
    signs = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    alphas = along_one_line(optimizer, [x], signs.tolist())
    enough = next(t for t, alpha in enumerate(alphas) if alpha >= 9e-3)  # 0.003 of the weights
    assert alphas[: enough + 1] == pytest.approx([1e-8 * most**t for t in range(enough + 1)])
    assert optimizer.param_groups[0]["clock"] > 0
    assert not optimizer.param_groups[0]["hurdle"]
    assert 1e-4 < alphas[-1] < 0.1


@pytest.mark.parametrize("times", [1, 8])
@pytest.mark.parametrize(("cls", "most"), [(ElraC2Min, 1.5), (ElraP2Min, 2.0)])
def test_or_beside_one_tensor_such_as_a_new_head(cls, most, times):
    """A tenth of its start, also where its lr is several times as high; what starts at 0 is left out."""
    body = torch.full((100,), 3.0, dtype=torch.float64, requires_grad=True)
    head = torch.full((4,), 1e-2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = cls([{"params": [body, bias]}, {"params": [head], "lr": times * 1e-8}], lr=1e-8)
    alphas = []
    for t in range(60):
        for p, size in ((body, 1e-3), (head, 1.0), (bias, 5.0)):
            p.grad = torch.full_like(p, size * (-1) ** t)
        optimizer.step()
        alphas.append(optimizer.param_groups[0]["alpha"].item())
    enough = next(t for t, alpha in enumerate(alphas) if alpha >= 1e-3 / times)
    assert alphas[: enough + 1] == pytest.approx([1e-8 * most**t for t in range(enough + 1)])
    assert alphas[enough + 1] < alphas[enough]
    assert not optimizer.param_groups[0]["hurdle"]


def overshooting(cls, scope="global", horizon=None):
    """An optimizer at some rate, whose gradients of norm 10 have overshot now and then, and its only parameter."""
    x = torch.full((100,), 30.0, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=0.1, scope=scope, **({} if horizon is None else {"horizon": horizon}))
    along_one_line(optimizer, [x], [1, 1, -1, 1, 1, -1, 1, 1, -1, 1])
    return optimizer, x


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_gradient_that_has_grown_counts_as_twice_the_longest_before_an_overshoot(cls, scope):
    """However long, it changes x and the rate as one of twice the length; that of an explosion is undone."""
    seen = []
    for size in (2.0, 4.0, 9.0):
        optimizer, x = overshooting(cls, scope)
        alphas = along_one_line(optimizer, [x], [1, -1], size)
        seen.append(torch.tensor([*alphas, *x.tolist()]))
        assert not optimizer.param_groups[0]["restarts"]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-12, atol=0.0)
    optimizer, x = overshooting(cls, scope)
    along_one_line(optimizer, [x], [1], 11.0)
    assert optimizer.param_groups[0]["restarts"] == 1


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_the_papers_rule_takes_it_as_it_is(cls):
    moves = []
    for size in (2.0, 4.0):
        optimizer, x = overshooting(cls, horizon=math.inf)
        before = x.detach().clone()
        along_one_line(optimizer, [x], [1], size)
        moves.append((x - before).abs().sum() / optimizer.param_groups[0]["alpha"])
    assert moves[1] > 1.3 * moves[0]


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_gradients_may_grow_while_no_step_overshoots(cls):
    """As on the way out of a saddle; and again after some 16 steps straight on."""
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-9)
    for t in range(12):
        along_one_line(optimizer, [x], [1], 3.0**t)
        assert torch.equal(optimizer.state[x]["grad_prev"], x.grad)
    optimizer, x = overshooting(cls)
    along_one_line(optimizer, [x], [1] * 20)
    along_one_line(optimizer, [x], [1], 5.0)
    assert torch.equal(optimizer.state[x]["grad_prev"], x.grad)


@pytest.mark.parametrize("lr", [9.1e-3, 1.0])
@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_first_step_that_is_long_enough_is_turned_round_at_once(cls, lr):
    """Also where hardly a gradient is left after it."""
    for left in (1.0, 1e-6):
        x = torch.full((100,), 3.0, dtype=torch.float64, requires_grad=True)
        optimizer = cls([x], lr=lr)
        along_one_line(optimizer, [x], [1.0])
        alphas = along_one_line(optimizer, [x], [-1.0, -1.0, 1.0], left)
        assert alphas[0] < lr
        assert not optimizer.param_groups[0]["hurdle"]


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_what_does_not_move_is_no_part_of_the_weights_that_a_step_is_compared_with(cls):
    """Rows of an embedding that the first batch does not use, and groups that stand still."""
    rates = []
    for more in (0.0, 1e6):
        x = torch.cat([torch.full((100,), 3.0), torch.full((50,), more)]).requires_grad_()
        still = torch.full((7,), more, requires_grad=True)
        optimizer = cls([{"params": [x]}, {"params": [still], "lr": 0.0}])
        for t in range(30):
            x.grad = torch.cat([torch.ones(100), torch.zeros(50)]) * (-1) ** t
            still.grad = torch.ones(7)
            optimizer.step()
        rates.append(optimizer.param_groups[0]["alpha"].item())
        assert not optimizer.param_groups[0]["hurdle"]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_weights_that_start_at_zero_let_every_step_tell(cls):
    x = torch.zeros(10, requires_grad=True)
    assert along_one_line(cls([x]), [x], [1.0, -1.0])[-1] < 1e-5


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_steps_get_no_longer_before_they_tell_in_a_warm_up(cls):
    longest = []
    for warmup in (1, 50):
        x = torch.full((100,), 3.0, dtype=torch.float64, requires_grad=True)
        optimizer = cls([x])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, warmup=warmup: min(t / warmup, 1.0))
        steps = []
        for t in range(80):
            alpha = along_one_line(optimizer, [x], [(-1) ** t])[-1]
            steps.append(alpha * optimizer.param_groups[0]["multiplier"].item() * 10 / 30)  # of the weights
            scheduler.step()
        longest.append(max(steps))
    assert 3e-3 < longest[0] < 9e-3
    assert longest[1] < longest[0]


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_late_group_raises_no_hurdle_again(cls):
    x = torch.full((100,), 3.0, requires_grad=True)
    late = torch.full((100,), 1e3, requires_grad=True)
    optimizer = cls([x], lr=0.1)
    along_one_line(optimizer, [x], [1, -1])
    optimizer.add_param_group({"params": [late]})
    along_one_line(optimizer, [x, late], [1, -1, 1], 1e-3)
    assert not any(group["hurdle"] for group in optimizer.param_groups)


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_a_restart_raises_no_rate_while_steps_are_short(cls):
    x = torch.full((100,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-6)
    before = along_one_line(optimizer, [x], [1.0, 1.0, 1.0])[-1]
    lowered, kept, raised = along_one_line(optimizer, [x], [math.nan, 1.0, 1.0])
    assert lowered == kept == pytest.approx(before / 3)
    assert raised > kept


@every
def test_an_exploded_loss_takes_the_last_step_back(cls):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = cls([x], lr=1e-2)
    for loss in (3.0, 2.0, 1.0):
        before = x.detach().clone()
        x.grad = torch.tensor([1.0, 0.5 * loss], dtype=torch.float64)
        optimizer.step(loss=loss)
    alpha = optimizer.param_groups[0]["alpha"].item()
    x.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step(loss=torch.tensor(26.0))
    assert torch.allclose(x.detach(), before, rtol=1e-9)
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(alpha / 3)
    x.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step(loss=0.9)
    assert not torch.allclose(x.detach(), before, rtol=1e-9)


@every
def test_an_outlier_among_small_losses_is_no_explosion(cls):
    """Near the end one mislabelled sample is a hundred times the best loss; it is below the first one."""
    model = net()
    optimizer = cls(model.parameters())
    train(model, optimizer, [0], loss=2.0)
    train(model, optimizer, [1], loss=0.001)
    train(model, optimizer, [2], loss=1.0)
    assert optimizer.param_groups[0]["restarts"].item() == 0


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
        for name in ("clamps", "idle", "first_loss", "best_loss", "maximize"):
            del group[name]
    old = type(optimizer).__new__(type(optimizer))
    old.__setstate__(state)
    train(model, old, range(3, 6))
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_after_an_older_pickle_gradients_are_as_long_as_they_are(cls):
    """It knows of none that the rate was found with."""
    optimizer, x = overshooting(cls)
    state = optimizer.__getstate__()
    del state["param_groups"][0]["ceiling"]
    old = cls.__new__(cls)
    old.__setstate__(state)
    along_one_line(old, [x], [1, -1], 2.0)
    assert torch.equal(old.state[x]["grad_prev"], x.grad)


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
        (lambda: ElraC2Min([X], horizon=0.0), r"horizon=0.0.*positive.*math.inf"),
        (lambda: ElraP2Min([X], horizon=float("nan")), r"horizon=nan.*positive"),
        (lambda: ElraC2Min([X], gain=(0.5, -0.1)), r"gain=\(0.5, -0.1\)"),
        (lambda: ElraC2Min([X], gain=(0.1, 0.2, 0.3)), r"gain=.*pair"),
        (lambda: ElraP2Min([X], growth_limit=1.0), r"growth_limit=1.0.*above 1"),
        (lambda: ElraAdamW([X], eps=0.0), r"eps=0.0"),
        (lambda: Tracking(target=-1.0), r"target=-1.0.*-0.03"),
        (lambda: ElraC2Min([X], weight_decay=-0.1), r"weight_decay=-0.1.*>= 0"),
        (lambda: ElraC2Min([X], scope="layer"), r"scope='layer'.*'global', 'group', 'tensor'"),
        (lambda: ElraC2Min([X], bounds=(1.0, 0.1)), r"bounds=\(1.0, 0.1\).*lowest < highest"),
        (lambda: ElraC2Min([X], restart_factor=1.0), r"restart_factor=1.0.*\(0, 1\)"),
        (lambda: ElraC2Min([{"params": [X], "gain": 0.3}]), r"gain=0.3 in a parameter group.*to the optimizer"),
        (lambda: ElraC2Min([{"params": [X], "betas": (2, 0)}]), r"betas=\(2, 0\)"),
        (lambda: ElraC2Min([{"params": [X], "lr": -1.0}]), r"lr=-1.0"),
        (lambda: Elra([X], Adam(), C2Min()), r"C2Min.*needs.*\['gp', 'pp'\].*Adam.*offers"),
        (lambda: Elra([X], Adam(), P2Min()), r"needs the inner products"),
        (lambda: Tracking(gain=0.0), r"gain=0.0.*positive"),
        (lambda: Tracking(horizon=-1.0), r"horizon=-1.0.*positive"),
        (lambda: Tracking(span=(0.5, 0.1)), r"span=\(0.5, 0.1\).*first < highest"),
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
