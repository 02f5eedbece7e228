"""What must hold for every input, one property a test."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elra_hf import Adam, Elra, ElraAdamW, ElraC2Min, ElraP2Min, Tracking, rate

from .problems import VARIANTS, flat, net, same, snapshot, train

seeds = st.integers(0, 2**31 - 1)
euclidean = pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
every = pytest.mark.parametrize("cls", list(VARIANTS.values()), ids=list(VARIANTS))
quick = settings(max_examples=25, deadline=None)


def bowl(x, curvature):
    """A convex function with a quartic part, so that curvature is not constant."""
    return 0.5 * (curvature * x * x).sum() + 0.1 * (x**4).sum()


@euclidean
@quick
@given(seed=seeds, n=st.integers(2, 8))
def test_rotating_the_space_rotates_the_path(cls, seed, n):
    rng = np.random.default_rng(seed)
    q = torch.tensor(np.linalg.qr(rng.normal(size=(n, n)))[0])
    curvature = torch.tensor(rng.uniform(0.1, 3.0, n))
    x = torch.tensor(rng.normal(size=n), requires_grad=True)
    y = (q @ x.detach()).requires_grad_()
    straight, turned = cls([x], lr=1e-3), cls([y], lr=1e-3)
    for _ in range(30):
        for optimizer, loss in ((straight, bowl(x, curvature)), (turned, bowl(q.T @ y, curvature))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.allclose(q @ x.detach(), y.detach(), rtol=0, atol=1e-9 * float(1 + x.detach().norm()))


@euclidean
@quick
@given(seed=seeds, power=st.integers(-50, 50))
def test_scaling_the_loss_scales_the_rate_inversely(cls, seed, power):
    rng = np.random.default_rng(seed)
    scale = 2.0**power
    curvature = torch.tensor(rng.uniform(0.1, 3.0, 5))
    x = torch.tensor(rng.normal(size=5), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain, scaled = cls([x], lr=2.0**-12), cls([y], lr=2.0**-12 / scale)
    for _ in range(60):
        for optimizer, loss in ((plain, bowl(x, curvature)), (scaled, scale * bowl(y, curvature))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(x, y)
        assert plain.param_groups[0]["alpha"] == scaled.param_groups[0]["alpha"] * scale


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min, ElraAdamW])
@quick
@given(seed=seeds, cuts=st.lists(st.integers(1, 11), max_size=4), groups=st.booleans())
def test_how_the_vector_is_cut_does_not_matter(cls, seed, cuts, groups):
    rng = np.random.default_rng(seed)
    x0, curvature = torch.tensor(rng.normal(size=12)), torch.tensor(rng.uniform(0.1, 3.0, 12))
    bounds = [0, *sorted(set(cuts)), 12]
    whole = x0.clone().requires_grad_()
    parts = [x0[a:b].clone().requires_grad_() for a, b in itertools.pairwise(bounds)]
    one = cls([whole], lr=1e-3)
    many = cls([{"params": [p]} for p in parts] if groups else parts, lr=1e-3)
    for _ in range(20):
        for optimizer, x in ((one, whole), (many, torch.cat(parts))):
            optimizer.zero_grad()
            bowl(x, curvature).backward()
            optimizer.step()
    rates = [group["alpha"].item() for group in many.param_groups]
    assert len(set(rates)) == 1
    assert rates[0] == pytest.approx(one.param_groups[0]["alpha"].item(), rel=1e-9)
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-9)


@every
def test_a_zero_gradient_teaches_nothing(cls):
    """DCP and ZeRO take such a step, at lr = 0, to create the state."""
    model = net()
    optimizer = cls(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(5))
    before, x = snapshot(optimizer), flat(model)
    for p in model.parameters():
        p.grad.zero_()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    optimizer.step()
    assert same(before, snapshot(optimizer))
    assert torch.equal(x, flat(model))


@every
def test_a_zero_gradient_first_changes_nothing_later(cls):
    plain, dummied = net(), net()
    a, b = cls(plain.parameters()), cls(dummied.parameters())
    for p in dummied.parameters():
        p.grad = torch.zeros_like(p)
    b.step()
    assert train(plain, a, range(10)) == train(dummied, b, range(10))
    assert same(snapshot(a), snapshot(b))


@every
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_step_of_length_zero_teaches_nothing(cls, scope):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-3, scope=scope)
    train(model, optimizer, range(4))
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [4])
    alpha, x = optimizer.param_groups[0]["alpha"].clone(), flat(model)
    train(model, optimizer, [5, 6])
    assert torch.equal(optimizer.param_groups[0]["alpha"], alpha)
    assert torch.equal(flat(model), x)


@every
@quick
@given(
    alpha=st.floats(1e-8, 1e6),
    decay=st.floats(0.0, 1e3),
    values=st.lists(st.floats(-1e3, 1e3, width=32).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=5),
)
def test_weight_decay_never_flips_a_sign(cls, alpha, decay, values):
    x = torch.tensor(values, requires_grad=True)
    still, moving = torch.ones(1, requires_grad=True), x.detach().clone()
    optimizer = cls([{"params": [x]}, {"params": [still], "weight_decay": 0.0}], lr=alpha, weight_decay=decay)
    x.grad, still.grad = torch.zeros_like(x), torch.ones(1)  # nothing but the decay moves x
    optimizer.step()
    assert bool(((x.detach() * moving) >= 0).all())
    assert bool((x.detach().abs() <= moving.abs()).all())


@every
def test_weight_decay_is_decoupled(cls):
    """The rate and the direction do not see it: x shrinks by exp(-η·weight_decay) on top."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    plain, decayed = cls([x], lr=1e-3), cls([y], lr=1e-3, weight_decay=0.1)
    x.grad, y.grad = torch.tensor([0.3, 0.1]).double(), torch.tensor([0.3, 0.1]).double()
    before = x.detach().clone()
    plain.step()
    decayed.step()
    moved = x.detach() - before
    assert torch.allclose(y.detach(), before * np.exp(-0.1 * rate(decayed)) + moved, rtol=1e-12)


@every
def test_cost_does_not_depend_on_the_step(cls):
    """No history grows: the state after 5 and after 300 steps takes the same memory, and nothing new is created."""
    model = net()
    optimizer = cls(model.parameters())
    train(model, optimizer, range(5))
    sizes = [t.nbytes for t in snapshot(optimizer)]
    keys = [set(group) for group in optimizer.param_groups]
    train(model, optimizer, range(5, 300))
    assert [t.nbytes for t in snapshot(optimizer)] == sizes
    assert [set(group) for group in optimizer.param_groups] == keys


@pytest.mark.parametrize(
    ("make", "bytes_a_parameter"),
    [
        (ElraC2Min, 8),
        (ElraP2Min, 8),
        (lambda ps: ElraP2Min(ps, betas=(0, 0)), 4),
        (lambda ps: ElraC2Min(ps, betas=(0.8, 0.0)), 4),
        (ElraAdamW, 12),
    ],
)
def test_memory(make, bytes_a_parameter):
    x = torch.randn(1000, requires_grad=True)
    optimizer = make([x])
    for _ in range(3):
        (x**2).sum().backward()
        optimizer.step()
    state = sum(t.nbytes for t in optimizer.state[x].values())
    assert state - 1000 * bytes_a_parameter <= 12  # counters


@every
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("through_file", [False, True])
def test_resuming_equals_not_stopping(cls, scope, through_file, tmp_path):
    model = net()
    optimizer = cls(model.parameters(), lr=1e-4, scope=scope, weight_decay=0.01)
    train(model, optimizer, range(7))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    if through_file:
        torch.save(state, tmp_path / "optimizer.pt")
        state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    expected = train(model, optimizer, range(7, 20))

    other = net(seed=1)
    other.load_state_dict(weights)
    resumed = cls(other.parameters(), lr=0.5, scope=scope)  # another lr changes nothing
    resumed.load_state_dict(state)
    assert train(other, resumed, range(7, 20)) == expected
    assert same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("lr", [1e-8, 1e-5, 1e-2])
@every
def test_the_rate_leaves_its_start(cls, lr):
    """On a smooth bowl every start rate ends at the minimum."""
    x = torch.linspace(-1, 1, 20, requires_grad=True)
    optimizer = cls([x], lr=lr)
    curvature = torch.logspace(-1, 0.5, 20)
    for _ in range(600):
        optimizer.zero_grad()
        loss = bowl(x, curvature)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2


def test_rate_rule_without_information_is_left_alone():
    optimizer = Elra([torch.ones(2, requires_grad=True)], Adam(), Tracking())
    optimizer.step()  # no gradient at all
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(1e-5)


@pytest.mark.parametrize("lr", [1e-8, 1e-6, 3e-4, 1e-2, 1.0])
def test_elra_adamw_takes_its_first_rate_from_the_weights(lr):
    """Whatever ``lr`` is, the run is the same."""
    model, other = net(dtype=torch.float64), net(dtype=torch.float64)
    weights = flat(model)
    scale = weights[weights != 0].abs().log().mean().exp().item()
    optimizer = ElraAdamW(model.parameters(), lr=lr)
    train(model, optimizer, [0])
    assert optimizer.param_groups[0]["alpha"].item() == pytest.approx(0.005 * scale)
    train(model, optimizer, range(1, 20))
    train(other, ElraAdamW(other.parameters()), range(20))
    assert torch.allclose(flat(model), flat(other), rtol=1e-9)


def scheduled(lr_of, steps, horizon=100):
    """α of ElraAdamW under a LambdaLR, after ``steps`` of a run of ``horizon``."""
    model = net(dtype=torch.float64)
    optimizer = ElraAdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_of(step / horizon))
    alphas = []
    for step in range(steps):
        train(model, optimizer, [step])
        scheduler.step()
        alphas.append(optimizer.param_groups[0]["alpha"].item())
    return alphas, optimizer.param_groups[0]


def test_a_decay_is_left_to_the_schedule():
    """From half of the full rate on α stands still, so that it cannot grow against the decay; before it counts."""
    alphas, group = scheduled(lambda share: 1.0 - share, 100)
    assert len(set(alphas[51:])) == 1
    assert len(set(alphas[:51])) == 50  # the first two are one: at the second nothing has been seen
    assert group["elra_clock"].item() == pytest.approx(sum(1.0 - t / 100 for t in range(50)))


def test_a_warm_up_is_waited_for():
    """While the schedule holds the rate down, α hardly makes up for it, and the early gain is kept for later."""
    warming, group = scheduled(lambda share: min(1.0, share), 15)
    constant, _ = scheduled(lambda _: 1.0, 15)
    assert warming[-1] / warming[0] < 0.1 * constant[-1] / constant[0]
    assert group["elra_clock"] == pytest.approx(0.01 * sum(range(14)))


def decayed(cls, seed):
    """Losses on a narrow valley, where the rate climbs when a linear schedule shortens the steps."""
    curvature = torch.logspace(0, -4, 100, dtype=torch.float64)
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = cls([x])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2000)
    losses = []
    for _ in range(2000):
        optimizer.zero_grad()
        loss = 0.5 * (curvature * x * x).sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("seed", range(8))
@euclidean
def test_a_rate_that_is_too_high_falls_in_a_decay_too(cls, seed):
    """It must find its way back from what it tries; at the very last step it may not have."""
    losses = decayed(cls, seed)
    assert min(losses[-20:]) <= 1.05 * min(losses)
    assert losses[-1] <= 1.05 * min(losses)  # they rise for a step or two whenever the rate tries more


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_constant_share_of_the_rate_adapts_too(share):
    alphas, _ = scheduled(lambda _: share, 50)
    assert len(set(alphas)) > 20
