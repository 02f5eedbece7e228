"""State has the precision that its parameter calls for, on its parameter's device, whatever happened before."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from elra_hf import ElraC2Min, ElraP2Min, averaged
from elra_hf.pieces import noise, rounded

from ..iterates import average
from .problems import VARIANTS, batch, flat, loss_of, net, same, snapshot, train

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
every = pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
scopes = pytest.mark.parametrize("scope", ["global", "tensor"])
moves = pytest.mark.parametrize(
    ("old", "new"), list(itertools.permutations(DTYPES, 2)), ids=lambda each: str(each).removeprefix("torch.")
)


def right(optimizer):
    """Each tensor of the state has its dtype, device and shape."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, dtype in optimizer.direction.dtypes(p, group).items():
                state = optimizer.state[p][name]
                assert (state.dtype, state.device, state.shape) == (dtype, p.device, p.shape), name
            for name in optimizer.direction.counters:
                shared = (torch.float32, torch.float64)  # the widest of those that share it decides
                assert optimizer.state[p][name].dtype in (shared[1:] if p.dtype == torch.float64 else shared)


def alive(optimizer, before):
    """Every number that a step writes has been written."""
    return all(not torch.equal(a.double(), b.double()) for a, b in zip(before, tensors(optimizer), strict=True))


def tensors(optimizer):
    return [v.clone() for state in optimizer.state.values() for v in state.values() if v.dim() > 1]


@every
@scopes
@moves
def test_a_checkpoint_goes_on_in_another_dtype(cls, scope, old, new):
    model, other = net(dtype=old), net(dtype=new)
    optimizer, resumed = cls(model.parameters(), scope=scope), cls(other.parameters(), scope=scope)
    train(model, optimizer, range(12))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    right(resumed)
    for a, b in zip(tensors(optimizer), tensors(resumed), strict=True):
        assert torch.equal(a.to(b.dtype), b)  # rounded at most once
    before = tensors(resumed)
    losses = train(other, resumed, range(12, 60))
    right(resumed)
    assert alive(resumed, before)
    assert sum(losses[-10:]) < sum(losses[:10]) + 0.5
    assert torch.isfinite(flat(other)).all()


@every
@scopes
@moves
def test_a_model_is_cast_between_two_steps(cls, scope, old, new):
    """``model.float()``, ``model.double()``, ``model.to(torch.bfloat16)``; the parameters stay the same objects."""
    model = net(dtype=old)
    optimizer = cls(model.parameters(), scope=scope)
    train(model, optimizer, range(12))
    model.to(new)
    before = tensors(optimizer)
    train(model, optimizer, [12])
    right(optimizer)
    train(model, optimizer, range(13, 17))
    assert alive(optimizer, before)
    twin_model, twin = copy.deepcopy((model, optimizer))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, range(17, 22)) == train(twin_model, twin, range(17, 22))
    assert same(snapshot(optimizer), snapshot(twin))


class Mixed(nn.Module):
    """Norms in float32, matrices in a dtype of their own."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 8).to(dtype), nn.Linear(8, 3).to(dtype)

    def forward(self, x):
        hidden = self.first(self.norm(x.to(self.norm.weight.dtype)).to(self.first.weight.dtype)).tanh()
        return self.second(hidden).float()


@every
@pytest.mark.parametrize("old", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("new", ["itself", torch.float32, torch.bfloat16])
def test_a_mixed_model_never_shares_a_bucket(cls, old, new):
    model = Mixed(old)
    optimizer = cls(model.parameters())
    train(model, optimizer, range(10))
    other = Mixed(old) if new == "itself" else Mixed(old).to(new)
    other.load_state_dict(model.state_dict())
    resumed = cls(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = tensors(resumed)
    train(other, resumed, range(10, 16))
    right(resumed)
    assert alive(resumed, before)
    if new == "itself":
        train(model, optimizer, range(10, 16))
        assert same(snapshot(optimizer), snapshot(resumed))


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_dtype_does_not_matter(cls, dtype):
    expected_model = net()
    expected = cls(expected_model.parameters())
    losses = train(expected_model, expected, range(12))
    model = net()
    default = torch.get_default_dtype()
    data = [batch(step) for step in range(12)]
    torch.set_default_dtype(dtype)
    try:
        optimizer = cls(model.parameters())
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        loaded = cls(model.parameters())
        loaded.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(default)
    right(optimizer)
    assert seen == losses
    assert same(snapshot(optimizer), snapshot(expected))
    assert same(snapshot(loaded), snapshot(expected))


@every
@scopes
def test_built_and_stepped_under_a_default_device(cls, scope):
    """Large models are built on meta; the optimizer's own numbers must not end up there."""
    model, other = net(), net()
    expected = cls(model.parameters(), scope=scope)
    losses = train(model, expected, range(8))
    data = [batch(step) for step in range(8)]
    with torch.device("meta"):
        optimizer = cls(other.parameters(), scope=scope)
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        optimizer.load_state_dict(optimizer.state_dict())
    assert seen == losses
    right(optimizer)
    assert same(snapshot(optimizer), snapshot(expected))


@every
@scopes
def test_a_model_is_made_real_after_the_optimizer_was_built(cls, scope):
    """``to_empty`` keeps the parameters and exchanges what they hold; nothing is made before the first step."""
    with torch.device("meta"):
        model = net()
    optimizer = cls(model.parameters(), scope=scope)
    params = list(model.parameters())
    real = net()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    model.load_state_dict(real.state_dict())
    assert train(model, optimizer, range(8)) == train(real, cls(real.parameters(), scope=scope), range(8))


@every
def test_counters_count_beyond_256_in_bfloat16(cls):
    """Where 256 + 1 is 256: also over a checkpoint, after which torch casts what it can."""
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    optimizer = cls([x])
    for step in range(600):
        if step in (250, 300):
            again = cls([x])
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
        x.grad = (x.detach() - 0.5) + 0.1 * (-1) ** step
        optimizer.step()
    group = optimizer.param_groups[0]
    assert group["restarts"].item() == 0
    assert group["elra_steps"].item() == 600
    assert optimizer.state[x]["step"].item() == 600


@every
def test_counters_are_shared_before_and_after_a_cast_and_a_checkpoint(cls):
    """By those of one age, also where some have no gradient or another dtype; they have the precision of the widest."""
    model = net()
    late = torch.ones(3, requires_grad=True)
    optimizer = cls([*model.parameters(), late])

    def count(optimizer):
        first, *others, last = (state["step"] for state in optimizer.state.values())
        assert all(each is first for each in others)
        assert last is not first
        return first, last

    train(model, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    late.grad = torch.ones(3)
    optimizer.step()
    assert [float(step) for step in count(optimizer)] == [3.0, 1.0]
    model[0].double()
    for p in (*model.parameters(), late):
        p.grad = None if p is model[0].weight else torch.zeros_like(p)
    optimizer.step()
    assert [step.dtype for step in count(optimizer)] == [torch.float64, torch.float32]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [step.dtype for step in count(optimizer)] == [torch.float64, torch.float32]
    model.float()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [step.dtype for step in count(optimizer)] == [torch.float32, torch.float32]
    assert [float(step) for step in count(optimizer)] == [3.0, 1.0]


@every
@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=str)
def test_groups_of_two_dtypes_resume_digit_for_digit(cls, first):
    """The rate is one for all, in the precision of the widest; loading must not round it to that of one group."""
    second = torch.float64 if first == torch.float32 else torch.float32
    params = [torch.linspace(-1, 1, 6).to(dtype).requires_grad_() for dtype in (first, second)]
    optimizer = cls([{"params": [p]} for p in params])
    for _ in range(9):
        optimizer.zero_grad()
        sum((p.double() - 2.0).square().sum() for p in params).backward()
        optimizer.step()
    loaded = cls([{"params": [p]} for p in params])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for old, new in zip(optimizer.state_dict()["param_groups"], loaded.state_dict()["param_groups"], strict=True):
        assert old == new


# ---- rounding in bfloat16 ----------------------------------------------------------------------------------------------------


def small_steps(cls, steps, **options):
    """Steps of 1e-4 down from weights of 1, which are 0.0078 from what bfloat16 knows next."""
    x = torch.ones(20_000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = cls([x], bounds=(1e-4, 1.0001e-4), **options)
    for _ in range(steps):
        x.grad = torch.ones_like(x)
        optimizer.step()
    return x, optimizer


@pytest.mark.parametrize("kernels", ["plain", ""])
@every
def test_steps_below_the_resolution_move_bfloat16_in_the_mean(cls, kernels, monkeypatch):
    monkeypatch.setenv("ELRA_KERNELS", kernels)
    x, optimizer = small_steps(cls, 30)
    moved = 1.0 - x.detach().double().mean().item()
    assert moved == pytest.approx(30e-4, rel=0.05)
    way = optimizer.state[x]["way"].double().mean().item()  # from the last of 31 points to their average
    assert way == pytest.approx(30e-4 - average(list(torch.arange(31) * 1e-4), cls).item(), rel=0.05)
    assert torch.equal(small_steps(cls, 30, stochastic_rounding=False)[0], torch.ones_like(x))


@every
def test_the_chance_is_the_same_in_every_run_and_after_loading(cls):
    x, optimizer = small_steps(cls, 10)
    y, other = small_steps(cls, 5)
    assert torch.equal(x, small_steps(cls, 10)[0])
    z = y.detach().clone().requires_grad_()
    loaded = cls([z], bounds=(1e-4, 1.0001e-4))
    loaded.load_state_dict(copy.deepcopy(other.state_dict()))
    for _ in range(5):
        z.grad = torch.ones_like(z)
        loaded.step()
    assert torch.equal(x, z)
    assert all(torch.equal(optimizer.state[x][name], loaded.state[z][name]) for name in optimizer.state[x])


def test_noise_is_even_and_without_a_pattern():
    draws = torch.stack([noise(4096, torch.tensor(float(step)), salt) for step in range(40) for salt in range(3)]).double()
    assert draws.min() >= 0
    assert draws.max() < 2**16
    scaled = (draws + 0.5) / 2**16 - 0.5
    size = (1 / 12) ** 0.5
    assert abs(scaled.mean()) < 5 * size / scaled.numel() ** 0.5
    assert scaled.std().item() == pytest.approx(size, rel=0.01)
    for other in (scaled.roll(1, 1), scaled.roll(1, 0), scaled.roll(3, 0)):  # the next entry, salt and step
        assert abs((scaled * other).mean()) < 5 * size**2 / scaled.numel() ** 0.5


def test_what_is_not_finite_stays_so():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max, 0.0, -0.0])
    found = rounded(x, torch.tensor(3.0), 0)
    assert torch.equal(found[:2], x[:2].bfloat16())
    assert found[2].isnan()
    assert found[3:].tolist() == [x[3].bfloat16().item() if x[3].bfloat16().isfinite() else torch.inf, 0.0, 0.0]


@every
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.float8_e5m2], ids=str)
def test_frozen_weights_of_a_dtype_that_nobody_trains_in(cls, dtype):
    """As a quantised base has them beside its adapters. torch promotes no float8."""
    model, frozen = net(), nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    optimizer = cls([frozen, *model.parameters()])
    train(model, optimizer, range(5))
    with averaged(optimizer):
        assert torch.isfinite(flat(model)).all()
    copied = copy.deepcopy(model)
    resumed = cls([frozen, *copied.parameters()])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, range(5, 9)) == train(copied, resumed, range(5, 9))


def kept(optimizer):
    """The dtypes of the distance to the average, x̄ - x."""
    return {state["way"].dtype for state in optimizer.state.values()}


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_of_float32_weights_may_be_kept_in_bfloat16(cls, dtype):
    model = net(dtype=dtype)
    optimizer = cls(model.parameters(), bf16_average=True)
    train(model, optimizer, range(3))
    assert kept(optimizer) == {torch.bfloat16 if dtype == torch.float32 else dtype}
    right(optimizer)


@every
@pytest.mark.parametrize("chosen", ["native", "plain"])
def test_an_average_in_bfloat16_is_near_that_of_the_iterates(cls, chosen, monkeypatch):
    """Over many steps whose share in the average is below its resolution; and the rate is that of the same run in full."""
    if chosen == "plain":
        monkeypatch.setenv("ELRA_KERNELS", "plain")
    rates = []
    for bf16_average in (False, True):
        model = net()
        optimizer = cls(model.parameters(), bf16_average=bf16_average)
        iterates = [flat(model)]
        for step in range(1500):
            train(model, optimizer, [step])
            iterates.append(flat(model))
        rates.append(float(optimizer.param_groups[0]["alpha"]))
    assert rates[1] == pytest.approx(rates[0], rel=0.3)
    truth, x = average(iterates, cls), iterates[-1].double()
    with averaged(optimizer):
        found = flat(model).double()
    assert (found - truth).norm() < 0.1 * (x - truth).norm()


@every
def test_a_run_with_an_average_in_bfloat16_resumes_digit_for_digit(cls):
    model, other = net(), net()
    optimizer, resumed = (cls(each.parameters(), bf16_average=True) for each in (model, other))
    train(model, optimizer, range(10))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    right(resumed)
    train(model, optimizer, range(10, 20))
    train(other, resumed, range(10, 20))
    assert torch.equal(flat(model), flat(other))
    assert same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("cls", [ElraC2Min, ElraP2Min])
def test_what_keeps_no_average_has_none_in_bfloat16(cls):
    with pytest.raises(ValueError, match="bf16_average=True does not go with horizon=inf"):
        cls(net().parameters(), horizon=math.inf, bf16_average=True)
