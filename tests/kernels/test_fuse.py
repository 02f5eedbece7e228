"""A function that is fused gives what torch gives, bad numbers included."""

import math

import pytest
import torch

from .test_kernels import TRITON

pytestmark = [*TRITON.marks, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of numpy, which divides by zero

INF, NAN = math.inf, math.nan
X, Y = [0.0, -0.0, 1.0, -2.5, 1e-8, 3e7, INF, -INF, NAN, 0.3], [1.0, 0.0, 1.0, 4.0, -1e-8, 2.0, INF, 1.0, 5.0, NAN]
FUNCTIONS = {
    "arithmetic": lambda x, y: (x + y, x - 2.0, 3.0 - y, -x * y, x / y, 1.0 / y, x.square(), x**2),
    "comparisons": lambda x, y: tuple(flag.float() for flag in (x > y, x >= 0, x < y, x <= 1, x == y, x != 0)),
    "logic": lambda x, y: (torch.where((x > 0) & (y > 0) | ~torch.isfinite(x), x, y), (x > 0) * y, 1.0 * (x > y)),
    "bounds": lambda x, y: (x.clamp(min=0.5), x.clamp(max=1.0), x.clamp(-1.0, 1.0), torch.maximum(x, y), torch.minimum(x, y)),
    "functions": lambda x, y: (x.abs().sqrt(), x.exp(), y.abs().log(), torch.expm1(-x.clamp(0.0, 0.01)), x.nan_to_num(7.0)),
    "powers": lambda x, y: (0.9 ** x.clamp(0, 9), x.abs().clamp(0.1, 9.0).pow(y.nan_to_num(0.0).clamp(-2, 2))),
    "sums": lambda x, y: (x[2:6].sum(), x.view(2, 5).sum(0), x.amax(), y[:5].amax(0, keepdim=True), 1.0 * (x > 0).any()),
    "moves": lambda x, y: (torch.stack([x, y], 1)[3], torch.cat([x[:1].expand(3), y[7:]]), x.view(5, 2).unbind(1)[1]),
    "constants": lambda x, y: (torch.zeros_like(x) + torch.tensor([1.0, 2.0])[1], x.new_full((2,), INF), x.new_ones(()) * y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gives_what_torch_gives(name):
    from elra_hf.kernels.fuse import Fused

    inputs = [torch.tensor(X), torch.tensor(Y)]
    truth = FUNCTIONS[name](*inputs)
    found = [torch.empty_like(result) for result in truth]
    Fused(FUNCTIONS[name], inputs)(inputs, found)
    for mine, true in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-6, atol=0.0, equal_nan=True)


def test_reads_before_it_writes():
    from elra_hf.kernels.fuse import Fused

    x, y = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    Fused(lambda x, y: (torch.stack([x[1], x[0]]), x[0] + y), [x, y])([x, y], [x, y])
    assert (x.tolist(), y.item()) == ([2.0, 1.0], 4.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda x: (torch.sin(x),), "aten::sin"), (lambda x: (torch.stack([x + k for k in range(50)]),), "more than 40")],
)
def test_says_what_it_cannot_do(function, message, monkeypatch):
    from elra_hf.kernels import fuse
    from elra_hf.kernels.fuse import Fused

    monkeypatch.setattr(fuse, "MOST_LINES", 40)
    with pytest.raises(NotImplementedError, match=message):
        Fused(function, [torch.ones(())])
