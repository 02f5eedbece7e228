"""Inner products of more numbers than torch.dot takes at once: as a small limit shows, they are those of the whole."""

import pytest
import torch

from elra_hf import pieces

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
