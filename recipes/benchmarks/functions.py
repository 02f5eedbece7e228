"""Deterministic functions with a known lowest value, in float64. The seed draws a rotation of the space and the start.

The loss is f(Q·x) - f*, so that 0 is the best possible. Saddles are confined by a quartic term, or there would be no best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .tasks import Problem, Task

GOAL = 1e-6  # share of the first loss that counts as solved


class Function(nn.Module):
    """A function of one vector.

    Args:
        function: z → f(z), shape (n,) → ().
        lowest: f*.
        rotation: Q, shape (n, n).
        start: where to start, in the coordinates of ``function``, shape (n,).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], lowest: float, rotation: Tensor, start: Tensor) -> None:
        super().__init__()
        self.function, self.lowest = function, lowest
        self.register_buffer("rotation", rotation)
        self.x = nn.Parameter(rotation.T @ start)

    def forward(self) -> Tensor:
        return self.function(self.rotation @ self.x) - self.lowest


def problem(
    function: Callable[[Tensor], Tensor], start: Tensor, spread: float, lowest: float = 0.0
) -> Callable[[int], Problem]:
    """Start normally distributed around ``start``, with standard deviation ``spread``."""

    def build(seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(start), generator=generator, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(torch.randn(len(start), len(start), generator=generator, dtype=torch.float64))
        model = Function(function, lowest, rotation, start.double() + spread * noise)
        splits = {name: [()] for name in ("train", "validation", "test")}
        return Problem(model, itertools.repeat(()), lambda m, _: m(), splits)

    return build


def quadratic(condition: float, size: int = 100) -> Callable[[int], Problem]:
    """Curvatures from 1/``condition`` to 1, evenly spaced in the logarithm."""
    curvatures = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return problem(lambda z: 0.5 * (curvatures * z * z).sum(), torch.zeros(size), spread=1.0)


def rosenbrock(z: Tensor) -> Tensor:
    """The banana valley. Lowest at (1, …, 1)."""
    return (100.0 * (z[1:] - z[:-1] ** 2) ** 2 + (1.0 - z[:-1]) ** 2).sum()


def monkey_saddle(z: Tensor) -> Tensor:
    """x³ - 3xy² + r⁴/4: three valleys leave the origin. Lowest where r = 3, with -27 + 81/4."""
    x, y = z
    return x**3 - 3.0 * x * y**2 + (x**2 + y**2) ** 2 / 4.0


def tilted_saddle(z: Tensor) -> Tensor:
    """x² - y² + y⁴/4 + y/100: a saddle next to the origin. Lowest where y³ - 2y + 1/100 = 0, near -√2."""
    x, y = z
    return x**2 - y**2 + y**4 / 4.0 + y / 100.0


def beale(z: Tensor) -> Tensor:
    """Flat with steep walls. Lowest at (3, 1/2)."""
    x, y = z
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def himmelblau(z: Tensor) -> Tensor:
    """Four equal valleys, one of them at (3, 2)."""
    x, y = z
    return (x**2 + y - 11.0) ** 2 + (x + y**2 - 7.0) ** 2


def valley(size: int) -> Tensor:
    """The usual start on Rosenbrock's function, (-1.2, 1, -1.2, 1, …)."""
    return torch.tensor([-1.2, 1.0]).repeat(size // 2)


SADDLE_LOWEST = -1.0141546136044086  # of `tilted_saddle`
ORIGIN = torch.zeros(2)

FUNCTIONS: dict[str, Task] = {
    "quadratic-1e1": Task(quadratic(1e1), 2000, 1e-1, goal=GOAL),
    "quadratic-1e2": Task(quadratic(1e2), 2000, 1e-1, quick=True, goal=GOAL),
    "quadratic-1e4": Task(quadratic(1e4), 2000, 1e-1, quick=True, goal=GOAL),
    "quadratic-1e6": Task(quadratic(1e6), 2000, 1e-1, quick=True, goal=GOAL),
    "rosenbrock-2": Task(problem(rosenbrock, valley(2), 0.1), 2000, 1e-2, quick=True, goal=GOAL),
    "rosenbrock-100": Task(problem(rosenbrock, valley(100), 0.1), 2000, 1e-2, goal=GOAL),
    "saddle-monkey": Task(problem(monkey_saddle, ORIGIN, 0.01, -6.75), 1000, 1e-2, goal=GOAL),
    "saddle-tilted": Task(problem(tilted_saddle, ORIGIN, 0.01, SADDLE_LOWEST), 1000, 1e-2, goal=GOAL),
    "beale": Task(problem(beale, torch.tensor([1.0, 1.0]), 0.1), 2000, 1e-2, goal=GOAL),
    "himmelblau": Task(problem(himmelblau, ORIGIN, 0.1), 1000, 1e-2, goal=GOAL),
}
