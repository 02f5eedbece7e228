"""p2min: the rate follows from a parabola, without a bound downwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_number
from .base import Decision, Dots, Memory, check_positive, cosine, first_rate, heading, settling

FIRST = 0.0015  # length of the first step over that of the weights, a start only; half of c2min's: each step may double it


@dataclass(frozen=True)
class P2Min:
    """The minimum of the parabola through both slopes along the last step. Source: arXiv 2309.06274, p2min.

    q = ⟨G_t, d_{t-1}⟩ / ⟨G_{t-1}, d_{t-1}⟩;  α_t = α_{t-1} / (1 - q) where 1 - q > 1/γ, else α_{t-1}·γ.
    Where ⟨G_{t-1}, d_{t-1}⟩ ≤ 0 the last direction did not descend, and α is left alone.

    That is ``horizon=math.inf``. By default (ours) q is the slope of the loss along the way from the average of the iterates to
    x_t in units of the steepest, ‖G_t‖: the cosine of G_t with the way back; see `heading`. The factor's exponent falls from 1
    as horizon / (horizon + clock), where the clock counts the steps by their weights; and α_1 is such that the first step is
    `FIRST` of the weights long, so that ``lr`` does not matter.

    Args:
        growth_limit: γ > 1, the largest factor in one step. There is no limit downwards.
        horizon: steps after which half of the gain is gone, > 0; math.inf: the paper's rule.
    """

    growth_limit: float = 2.0
    horizon: float = 5.0

    def __post_init__(self) -> None:
        if not (is_number(self.growth_limit) and 1.0 < self.growth_limit < math.inf):
            raise ValueError(f"growth_limit={self.growth_limit!r} is invalid: give a finite number above 1, e.g. 2.0")
        check_positive(horizon=self.horizon)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gg", "gp", "pp", "gd", "pd"} if math.isinf(self.horizon) else {"gg", "gs", "ss", "gm", "mm"})

    @property
    def memory(self) -> Mapping[str, float]:
        return {"clock": 0.0}

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        clock = memory["clock"]
        weight = dots["reached" if math.isinf(self.horizon) else "fading"]
        if math.isinf(self.horizon):
            cos, left = cosine(dots["gp"], dots["gg"], dots["pp"]), weight
            end, start = dots["gd"], dots["pd"]
        else:
            end, cos = heading(dots)
            start, left = torch.ones_like(cos), weight * settling(clock, self.horizon)
            alpha = first_rate(alpha, dots, FIRST)
        curvature = start - end  # ∝ 1 - q, without the division
        factor = torch.where(curvature > start / self.growth_limit, start / curvature, self.growth_limit)
        factor = torch.where(start > 0, factor, 1.0)
        return Decision(alpha * factor.pow(left), cos, {"clock": clock + weight})
