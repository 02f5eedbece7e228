"""Rate rules: how the rate follows from the measured inner products.

A rule is a pure function of 0-dim or 1-D tensors (one entry a cell of the scope) and knows nothing of parameters.
Letters: G gradient at x_t, P gradient at x_{t-1}, D direction moved along in step t-1. The inner products are named by
two of them in lower case (``gp`` = ⟨G_t, G_{t-1}⟩) and are taken in the metric of the direction; see `directions`.
Of the run it gets ``steps`` (taken so far), ``clock``, by which it settles, ``weight``, how much the last step says about the
schedule's full rate, in [0, 1]: in a warm-up the share that was reached, for α must not undo it; in a decay see
`Elra._weights`; and, if it counts overshoots, ``trend``, ``record``, whether ‖G_t‖ is above `RECORD` times the longest of
late, and ``short``, whether all steps so far were too short to tell; see `SHORT`.
A relative rule gets its products as a matrix, a row a cell, and a column a tensor if tensors vote (zeros where there is none),
else one column; and with them ``size``, the number of entries of each, and ``scale``, the geometric mean of |x_1| over the
entries where neither it nor G_1 is 0 (0: there are none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Dots = Mapping[str, Tensor]
# What the clock of a run counts, each with the weight of its step. A step overshoots when the slope along it has changed its
# sign at its end, ⟨G_t, d_{t-1}⟩ < 0. Signs are smoothed, since one batch may say anything: a step counts while their trend,
# a mean that starts from 1 and keeps `TREND_MEMORY` of itself, is below 0. Beyond `STRAIGHT`, which takes some 16 steps in a
# row without an overshoot, that clock starts anew, as at a restart. Noise around 0 goes straight for so long once in 10,000
# steps; when half as many steps were enough, rates drifted within 8,000.
Clock = Literal["steps", "overshoots"]
TREND_MEMORY = 0.8
STRAIGHT = 0.95
# Steps tell nothing before one has been `SHORT` of the weights long, α·‖G‖ ≥ SHORT·‖x_1‖, or `SHORT_OF_ONE` of a tensor that
# did not start at 0; both with the entries of x_1 that have a gradient, and the share of G that is in a tensor as in G_1.
# They change too little for an overshoot to be more than noise between batches. With two classes and a new head the gradient of
# any batch may be one direction, with the sign of the class that it has more of; rates of 1e-5 fell then, and stayed there.
# Two lengths, since good rates moved all of a pretrained MiniLM by 0.0005 to 0.003 a step, its new head by 0.1 to 0.3, while
# CNNs on batches of 4 settled at a hundredth of theirs, where steps were 0.001 of all weights, and 0.01 of one bias at most.
SHORT = 0.003
SHORT_OF_ONE = 0.1
# In place of both where FSDP1 and ZeRO hide the tensors.
SHORT_OF_SLICES = 0.001
# A cosine of successive gradients below this turns them round. By itself it may still be noise: a transformer from scratch puts
# out nearly the same for every text, so that with two classes the gradient of any batch is one direction, with the sign of the
# class that it has more of. Characters from scratch pass -0.9 in their first steps, and are the worse for a fall.
TURN = -0.95
# Turned round and this many times as long as the longest of late, a gradient is no noise.
RECORD = 2.0
# A gradient is shortened to this many times the longest with which the run went straight, which it does until a step first
# overshoots, and again beyond `STRAIGHT`: the rate was found with those. As the new head of a pretrained MiniLM learned, its
# gradient grew from 0.7 to 7 within 15 steps, while cosines of -0.1 to -0.4 made the rate fall by a third; without a limit, or
# the clipping of a trainer, the layers below were lost. On the way out of a saddle a run goes straight, and gradients may grow.
CEILING = 2.0


class Rule(Protocol):
    """What `Elra` asks of a rate rule. See CONTRIBUTING.md for how to add one."""

    needs: ClassVar[frozenset[str]]

    relative: ClassVar[bool]

    clock: ClassVar[Clock]

    @property
    def clips(self) -> bool:
        """Whether a gradient that has grown too long is shortened, of a rule that counts overshoots; see `CEILING`."""
        ...

    @property
    def votes(self) -> bool:
        """Whether a relative rule is given a column a tensor."""
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


def check_horizon(horizon: float) -> None:
    """Raise ValueError unless ``horizon`` > 0; infinity is one."""
    if not horizon > 0.0:
        raise ValueError(f"horizon={horizon!r} is invalid: give a positive number, or math.inf for the paper's rule")


def settled(horizon: float, dots: Dots, cos: Tensor) -> Tensor:
    """Share of the rule that is left: 1 / (1 + n/horizon) after n overshoots, times the step's weight.

    Source: Kesten, Accelerated Stochastic Approximation, 1958, who let the steps themselves shrink so; here it is the steps of
    log α. Until there are overshoots all of the rule is left. With them it has found the rate, and what follows is mostly
    noise: along fixed rates of the nets for digits the cosine of successive gradients over the first 30 steps falls from some
    +0.4 to 0 as the rate rises to the best one and beyond; after a hundred it rests at +0.01…+0.05 at the best rate and at too
    high ones alike (the bench's cosines.md).

    All of it is left, too, where steps are turned round and this is no noise, since beyond the edge of stability iterates grow
    faster than a settled rate falls: when some 16 steps in a row have overshot, as `STRAIGHT` counts them, or the gradient is
    a record. Overshoots alone are not enough: rates of a CNN on clothes then fell to a seventh, and below the best one.

    Args:
        horizon: > 0.
        dots: what the rule was given.
        cos: the cosine of successive gradients.
    """
    sure = (cos < TURN) & ((dots["trend"] < -STRAIGHT) | dots["record"])
    return dots["weight"] * torch.where(sure, 1.0, 1.0 / (1.0 + dots["clock"] / horizon))


def too_short(dots: Dots) -> Tensor:
    """Where there was a step, there is a gradient, and all steps so far were too short to tell."""
    return dots["short"] & (dots["pp"] > 0) & (dots["gg"] > 0)


@dataclass(frozen=True)
class C2Min:
    """α_t = α_{t-1} (1 + gain·c_t) with the cosine c_t of successive gradients. Source: arXiv 2309.06274, c2min.

    The gain shrinks with the overshoots; see `settled` (ours). While steps are too short to tell c_t is taken for 1; see
    `SHORT` (ours). Gradients that have grown too long are shortened; see `CEILING` (ours).

    Args:
        gain: largest relative change of the rate in one step, in (0, 1); a pair sets (down, up) apart.
        horizon: overshoots after which half of the gain is gone, > 0; math.inf: the paper's rule, with none of ours.
    """

    gain: float | tuple[float, float] = 0.5
    horizon: float = 2.0
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd"})
    relative: ClassVar[bool] = False
    clock: ClassVar[Clock] = "overshoots"
    votes: ClassVar[bool] = False

    @property
    def clips(self) -> bool:
        """The paper's rule does not."""
        return self.horizon < math.inf

    def __post_init__(self) -> None:
        check_gain(self.gain, below=1.0)
        check_horizon(self.horizon)

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        signal = torch.where(too_short(dots), 1.0, cos) if self.horizon < math.inf else cos
        return alpha * (1.0 + settled(self.horizon, dots, cos) * signed_gain(self.gain, signal) * signal), cos


@dataclass(frozen=True)
class P2Min:
    """The minimum of the parabola through both slopes along the last step. Source: arXiv 2309.06274, p2min.

    q = ⟨G_t, d_{t-1}⟩ / ⟨G_{t-1}, d_{t-1}⟩;  α_t = α_{t-1} / (1 - q) where 1 - q > 1/γ, else α_{t-1}·γ.
    Where ⟨G_{t-1}, d_{t-1}⟩ ≤ 0 the last direction did not descend, and α is left alone.
    While steps are too short to tell it is multiplied by γ; see `SHORT` (ours). Gradients that have grown too long are
    shortened; see `CEILING` (ours).
    The factor is drawn to 1 with the overshoots, as its power with an exponent from 1 to 0; see `settled` (ours).

    Args:
        growth_limit: γ > 1, the largest factor in one step. There is no limit downwards. In a valley shaped like a V (a
            loss that grows linearly, or gradients that are clipped) a step too far halves the rate and the one back is
            flat, so that above 2 the rate grows round by round. Measured: with 4, a tiny BERT under the Trainer's clipping
            ended at a loss between 13 and 4e5 in 8 of 8 runs, with 2 between 0.0003 and 1.2; on five runs of small CNNs
            without clipping 4 was better.
        horizon: overshoots after which half of the exponent is gone, > 0; math.inf: it stays 1, as in the paper. Less than for
            c2min, since without a bound downwards one step may change the rate by more.
    """

    growth_limit: float = 2.0
    horizon: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd", "pd"})
    relative: ClassVar[bool] = False
    clock: ClassVar[Clock] = "overshoots"
    votes: ClassVar[bool] = False

    @property
    def clips(self) -> bool:
        """The paper's rule does not."""
        return self.horizon < math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.growth_limit) and self.growth_limit > 1.0):
            raise ValueError(f"growth_limit={self.growth_limit!r} is invalid: give a finite number above 1, e.g. 2.0")
        check_horizon(self.horizon)

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        end, start = dots["gd"], dots["pd"]
        curvature = start - end  # ∝ 1 - q, without the division
        curved = curvature > start / self.growth_limit
        factor = torch.where(curved, start / curvature, torch.full_like(start, self.growth_limit))
        factor = torch.where(start > 0, factor, torch.ones_like(start))
        if self.horizon < math.inf:
            factor = torch.where(too_short(dots), self.growth_limit, factor)
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        return alpha * factor.pow(settled(self.horizon, dots, cos)), cos


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The smallest value of each row that, with those below it, has half of the row's weight, shape (rows,)."""
    ordered, order = values.sort(dim=1)
    reached = weights.gather(1, order).cumsum(1)
    return ordered.gather(1, torch.searchsorted(reached, reached[:, -1:] / 2)).squeeze(1)


@dataclass(frozen=True)
class Tracking:
    """α_t = α_{t-1}·exp(g_t·w_t·(c_t - target_t)): tensors vote on c_t, and the run soon settles. Source: ours.

    c_t is the median of the tensors' cosines between G_t and the direction moved along, each weighed by the square root of
    its size. One cosine of all would be that of a few large and well-aligned tensors, while most are overshooting. A tensor
    with a gradient that is rounding beside the largest, as the key biases of a transformer, has no vote.
    exp has no downward drift under a cosine that is noise around the target; 1 + g·c has.

    With s_t the clock and e_t = horizon / (horizon + s_t): g_t = gain + (early_gain - gain)·e_t, target_t = (1 - e_t)·target.
    Only young runs tell rates apart: in the first 30 steps c falls from some +0.4 to 0 as the rate rises to the best one or
    half a decade beyond. Later the net has adapted to its rate, and c rests at 0…-0.08 over a decade of rates (the bench's
    cosines.md, seven tasks). Hence the gain that falls with the clock, which also makes the rule the same for short and long
    runs.
    w_t is the step's weight, and the clock is their sum: warm-up is waited for, decay is left to the schedule.

    With ``span`` = (first, highest), for directions whose entries are of order 1 and rates therefore comparable to weights:
    α_1 = first·s and α_t ≤ highest·s, where s is the geometric mean of |x_1|, zeros and unused entries apart. So the first
    rate need not be given, and one that grows while gradients vanish cannot tear the weights apart when one returns.

    Args:
        gain: change of log α for a cosine one above the target, once settled, > 0.
        early_gain: the same in the first step, > 0.
        horizon: steps after which half of the early gain is gone, > 0. Adam's momentum remembers as many.
        target: the cosine at which the settled rate rests, in (-1, 1).
        span: (first, highest) rate in units of s, or None for no such limits.
        votes: let tensors vote; otherwise c_t is the one cosine of all. Where FSDP1 or ZeRO has flattened the
            parameters, there are no tensors left to vote, and it is the one cosine in any case.
    """

    gain: float = 0.03
    early_gain: float = 1.0
    horizon: float = 10.0
    target: float = -0.03
    span: tuple[float, float] | None = None
    votes: bool = True
    clips: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    clock: ClassVar[Clock] = "steps"
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gd", "dd"})

    def __post_init__(self) -> None:
        for name in ("gain", "early_gain", "horizon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}={value!r} is invalid: give a positive number")
        if not -1.0 < self.target < 1.0:
            raise ValueError(f"target={self.target!r} is invalid: give a cosine in (-1, 1), e.g. -0.03")
        if self.span is not None and not 0.0 < self.span[0] < self.span[1] < math.inf:
            raise ValueError(f"span={self.span!r} is invalid: give (first, highest) with 0 < first < highest, or None")

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        size = dots["size"]
        strength = torch.where(size > 0, dots["gg"] / size, 0.0)
        audible = strength > torch.finfo(strength.dtype).eps * strength.amax(1, keepdim=True)
        known = audible & (dots["dd"] > 0)
        cos = weighted_median(cosine(dots["gd"], dots["gg"], dots["dd"]), size.sqrt() * known)
        early = self.horizon / (self.horizon + dots["clock"])
        excess = cos - (1.0 - early) * self.target
        gain = self.gain + (self.early_gain - self.gain) * early
        factor = torch.exp(gain * dots["weight"] * excess)
        adapted = torch.where(known.any(1), alpha * factor, alpha)
        if self.span is None:
            return adapted, cos
        scale = dots["scale"]
        limited = torch.where(dots["steps"] > 0, torch.minimum(adapted, self.span[1] * scale), self.span[0] * scale)
        return torch.where(scale > 0, limited, adapted), cos
