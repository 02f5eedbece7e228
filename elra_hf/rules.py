"""Rate rules: how the rate follows from the measured inner products.

A rule is a pure function of 0-dim or 1-D tensors (one entry a cell of the scope) and knows nothing of parameters.
Letters: G gradient at x_t, P gradient at x_{t-1}, D direction moved along in step t-1. The inner products are named by
two of them in lower case (``gp`` = ⟨G_t, G_{t-1}⟩) and are taken in the metric of the direction; see `directions`.
A relative rule also gets ``scale``, the geometric mean of |x_1| over the entries where neither it nor G_1 is 0 (0: there are
none), and ``steps``, the number of steps taken so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Dots = Mapping[str, Tensor]

# Steps within which a first rate that is too small is raised: e to this power spans any.
RAMP = 30


class Rule(Protocol):
    """What `Elra` asks of a rate rule. See CONTRIBUTING.md for how to add one."""

    needs: ClassVar[frozenset[str]]

    @property
    def relative(self) -> bool:
        """Whether ``dots`` must also hold ``scale`` and ``steps``."""
        ...

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        """Return the next rate and the cosine it was taken from, each shaped like ``alpha``.

        Where the products carry no information (a zero denominator: first step, or a step of length zero)
        the rate must come back unchanged and the cosine as 0.
        """
        ...


def cosine(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """⟨a, b⟩ / (‖a‖ ‖b‖), elementwise, in [-1, 1]; 0 where either norm is 0."""
    norms = square_a.sqrt() * square_b.sqrt()
    return torch.where(norms > 0, product / norms, torch.zeros_like(norms)).clamp(-1.0, 1.0)


def signed_gain(gain: float | tuple[float, float], signal: Tensor) -> Tensor | float:
    """``gain`` itself, or of a pair (down, up) the member that the sign of ``signal`` selects."""
    if not isinstance(gain, tuple):
        return gain
    down, up = gain
    return torch.where(signal < 0, torch.full_like(signal, down), torch.full_like(signal, up))


def check_gain(gain: float | tuple[float, float], below: float) -> None:
    """Raise ValueError unless every member of ``gain`` is in (0, ``below``)."""
    members = gain if isinstance(gain, tuple) else (gain,)
    if len(members) not in (1, 2) or not all(0.0 < float(g) < below for g in members):
        raise ValueError(
            f"gain={gain!r} is invalid: give a number in (0, {below:g}), or a pair (down, up) of them, e.g. gain=(0.5, 0.6)"
        )


@dataclass(frozen=True)
class C2Min:
    """α_t = α_{t-1} (1 + gain·c_t) with the cosine c_t of successive gradients. Source: arXiv 2309.06274, c2min.

    Args:
        gain: largest relative change of the rate in one step, in (0, 1); a pair sets (down, up) apart.
    """

    gain: float | tuple[float, float] = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp"})
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_gain(self.gain, below=1.0)

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        return alpha * (1.0 + signed_gain(self.gain, cos) * cos), cos


@dataclass(frozen=True)
class P2Min:
    """The minimum of the parabola through both slopes along the last step. Source: arXiv 2309.06274, p2min.

    q = ⟨G_t, d_{t-1}⟩ / ⟨G_{t-1}, d_{t-1}⟩;  α_t = α_{t-1} / (1 - q) where 1 - q > 1/γ, else α_{t-1}·γ.
    Where ⟨G_{t-1}, d_{t-1}⟩ ≤ 0 the last direction did not descend, and α is left alone.

    Args:
        growth_limit: γ > 1, the largest factor in one step. There is no limit downwards. In a valley shaped like a V (a
            loss that grows linearly, or gradients that are clipped) a step too far halves the rate and the one back is
            flat, so that above 2 the rate grows round by round. Measured: with 4, a tiny BERT under the Trainer's clipping
            ended at a loss between 13 and 4e5 in 8 of 8 runs, with 2 between 0.0003 and 1.2; on five runs of small CNNs
            without clipping 4 was better.
    """

    growth_limit: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd", "pd"})
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.growth_limit) and self.growth_limit > 1.0):
            raise ValueError(f"growth_limit={self.growth_limit!r} is invalid: give a finite number above 1, e.g. 2.0")

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        end, start = dots["gd"], dots["pd"]
        curvature = start - end  # ∝ 1 - q, without the division
        curved = curvature > start / self.growth_limit
        factor = torch.where(curved, start / curvature, torch.full_like(start, self.growth_limit))
        factor = torch.where(start > 0, factor, torch.ones_like(start))
        return alpha * factor, cosine(dots["gp"], dots["gg"], dots["pp"])


@dataclass(frozen=True)
class Tracking:
    """α_t = α_{t-1}·exp(gain·(c_t - target)), c_t the cosine of G_t and the direction moved along. Source: ours.

    exp has no downward drift under a cosine that is noise around the target; 1 + gain·c has.
    At the best fixed rate c_t settles slightly below 0 (measured: -0.02…-0.05 with β1 = 0.9), hence the target.

    With ``span`` = (first, highest), for directions whose entries are of order 1 and rates therefore comparable to weights:
    α_1 ≤ first·s and α_t ≤ highest·s, where s is the geometric mean of |x_1|, zeros and unused entries apart. A smaller α_0
    grows by e a step until it is there. So no start rate is too small or too large, and a rate that grows while gradients
    vanish cannot tear the weights apart when one returns.

    Args:
        gain: change of log α for a cosine one above the target, > 0; a pair sets (down, up) apart.
        target: the cosine at which the rate rests, in (-1, 1).
        span: (first, highest) rate in units of s, or None for no such limits.
    """

    gain: float | tuple[float, float] = 0.1
    target: float = -0.03
    span: tuple[float, float] | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gd", "dd"})

    def __post_init__(self) -> None:
        check_gain(self.gain, below=math.inf)
        if not -1.0 < self.target < 1.0:
            raise ValueError(f"target={self.target!r} is invalid: give a cosine in (-1, 1), e.g. -0.03")
        if self.span is not None and not 0.0 < self.span[0] < self.span[1] < math.inf:
            raise ValueError(f"span={self.span!r} is invalid: give (first, highest) with 0 < first < highest, or None")

    @property
    def relative(self) -> bool:
        return self.span is not None

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        cos = cosine(dots["gd"], dots["gg"], dots["dd"])
        excess = cos - self.target
        factor = torch.exp(signed_gain(self.gain, excess) * excess)
        known = (dots["gg"] > 0) & (dots["dd"] > 0)
        adapted = torch.where(known, alpha * factor, alpha)
        if self.span is None:
            return adapted, cos
        steps, scale = dots["steps"], dots["scale"]
        first, highest = self.span[0] * scale, self.span[1] * scale
        short = known & (steps < RAMP) & (alpha < first)
        limited = torch.where(short, torch.minimum(alpha * math.e, first), torch.minimum(adapted, highest))
        limited = torch.where(steps > 0, limited, torch.minimum(alpha, first))
        return torch.where(scale > 0, limited, adapted), cos
