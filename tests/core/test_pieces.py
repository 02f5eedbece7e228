"""What is done in parts is what would be done with the whole: inner products, and steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elra_hf import C2Min, Elra, ElraAdamW, SuccessiveGradients, pieces
from recipes.benchmarks.speed import memory

from .problems import VARIANTS, flat, net, train


@pytest.fixture
def limit(monkeypatch):
    """At most 7 numbers at once; the lengths that torch.dot is given."""
    lengths, whole = [], torch.dot

    def dot(a, b):
        lengths.append(len(a))
        return whole(a, b)

    monkeypatch.setattr(pieces, "MOST_OF_DOT", 7)
    monkeypatch.setattr(torch, "dot", dot)
    return lengths


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(0,), (6,), (7,), (8,), (14,), (15,), (5, 4), (2, 3, 100)], ids=str)
def test_sums_of_pieces_are_the_sum(limit, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for _ in range(2))
    found = pieces.dot(a, b)
    assert found.dtype == dtype
    assert found.shape == ()
    expected = (a.long() * b.long()).sum().item()  # of whole numbers, which bfloat16 rounds once it has summed them
    assert found.item() == pytest.approx(expected, rel=2**-7 if dtype == torch.bfloat16 else 0.0, abs=2.0 if expected else 0.1)
    assert max(limit, default=0) <= 7
    assert sum(limit) == a.numel()


def test_what_is_not_contiguous(limit):
    a = torch.arange(40.0).view(5, 8).t()
    assert pieces.dot(a, a).item() == sum(i * i for i in range(40))


@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
def test_a_run_in_pieces_is_the_run(cls, limit, monkeypatch):
    monkeypatch.setenv("ELRA_KERNELS", "plain")
    cut, whole = net(dtype=torch.float64), net(dtype=torch.float64)
    losses = train(cut, cls(cut.parameters()), range(20))
    assert limit
    assert max(limit) <= 7
    monkeypatch.undo()
    assert losses == pytest.approx(train(whole, cls(whole.parameters()), range(20)), rel=1e-9)
    torch.testing.assert_close(flat(cut), flat(whole), rtol=1e-9, atol=1e-12)


@given(shape=st.lists(st.integers(1, 7), max_size=4), size=st.integers(1, 60))
def test_blocks_are_the_tensor_in_its_order(shape, size):
    whole = torch.arange(math.prod(shape)).view(shape)
    if whole.ndim == 0:
        return  # one number is never cut
    found = list(pieces.blocks(whole.shape, size))
    parts = [whole[at].reshape(-1) for _, at in found]
    assert torch.equal(torch.cat(parts), whole.view(-1))
    assert [part[0] for part in parts] == [start for start, _ in found]
    assert max(map(len, parts)) <= size


LAYOUTS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def steps(cls, dtype, layout, count=4, shapes=((40, 50), (3, 5), (7,), (30, 20))):
    """Steps whose rate is held, as sums of other parts would change its last digits."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(dtype)
        params.append((LAYOUTS[layout](x) if x.ndim > 1 else x).requires_grad_())
    optimizer = cls(params, bounds=(1e-3, 1.0000001e-3))
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach().clone() for p in params], optimizer


def successive(params, **options):
    """The other direction, which no kernel takes."""
    return Elra(params, SuccessiveGradients(), C2Min(horizon=math.inf), **options)


@pytest.mark.parametrize("kernels", ["plain", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [*VARIANTS.values(), successive])
def test_how_tensors_are_cut_changes_no_bit(cls, dtype, layout, kernels, monkeypatch):
    """Nor do layouts, and which chance rounds bfloat16 follows from the place in the tensor alone."""
    monkeypatch.setenv("ELRA_KERNELS", kernels)
    whole, _ = steps(cls, dtype, "as it is")
    for sizes in ((64, 16), (333, 50)):
        monkeypatch.setattr(pieces, "CPU_SIZES", sizes)
        monkeypatch.setattr(pieces, "MOST_ON_CPU", 0)
        for p, truth in zip(steps(cls, dtype, layout)[0], whole, strict=True):
            if kernels == "plain":
                assert torch.equal(p, truth)  # elsewhere another order of the arithmetic
            elif dtype == torch.float32:
                torch.testing.assert_close(p, truth, rtol=1e-6, atol=1e-7)
            else:
                assert (p != truth).sum() <= 2


@pytest.mark.parametrize("kernels", ["plain", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [ElraAdamW, successive])
def test_no_temporary_above_a_mebibyte(cls, dtype, layout, kernels, monkeypatch):
    monkeypatch.setenv("ELRA_KERNELS", kernels)
    _, optimizer = steps(cls, dtype, layout, count=2, shapes=((1500, 800), (500, 300), (7,)))
    extra, largest = memory(optimizer.step, torch.device("cpu"))
    assert 0 < largest <= 2**20
    assert extra <= 5 * 2**20


@pytest.mark.parametrize("cls", VARIANTS.values(), ids=VARIANTS)
def test_the_first_rate_of_what_is_looked_at_in_parts(cls, monkeypatch):
    def first_rate():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7, 3), (40,), ())]
        params.append(torch.nn.Parameter(torch.randn(6, 9).t()))
        optimizer = cls(params)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return float(optimizer.param_groups[0]["alpha"])

    whole = first_rate()
    monkeypatch.setattr(pieces, "MOST_OF_SIZES", 4)
    assert first_rate() == pytest.approx(whole, rel=1e-6)
