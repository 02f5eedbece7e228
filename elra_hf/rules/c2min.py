"""c2min: the rate changes by a bounded share with the cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .base import Decision, Dots, Memory, check_gain, check_positive, cosine, first_rate, heading, settling, signed_gain

FIRST = 0.003  # length of the first step over that of the weights, a start only


@dataclass(frozen=True)
class C2Min:
    """α_t = α_{t-1} (1 + gain·signal_t), at most ±gain a step. Source: arXiv 2309.06274, c2min; the default's signal is ours.

    By default signal_t = w_t·c_t·horizon/(horizon + clock), where c_t is the cosine of G_t with the way back to the average
    of the iterates (see `heading`) and the clock counts the steps by their weights w_t; and α_1 is such that the first step
    is `FIRST` of the weights long, so that ``lr`` does not matter.
    With ``horizon=math.inf`` the paper's rule: signal_t = w_t·c_t, with the cosine of successive gradients, and α_1 = lr.

    Args:
        gain: largest relative change of the rate in one step, in (0, 1); a pair sets (down, up) apart.
        horizon: steps after which half of the gain is gone, > 0; math.inf: the paper's rule.
    """

    gain: float | tuple[float, float] = 0.5
    horizon: float = 20.0

    def __post_init__(self) -> None:
        check_gain(self.gain, below=1.0)
        check_positive(horizon=self.horizon)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gg", "gp", "pp"} if math.isinf(self.horizon) else {"gg", "gs", "ss", "gm", "mm"})

    @property
    def memory(self) -> Mapping[str, float]:
        return {"clock": 0.0}

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        clock = memory["clock"]
        weight = dots["reached" if math.isinf(self.horizon) else "fading"]
        if math.isinf(self.horizon):
            cos = cosine(dots["gp"], dots["gg"], dots["pp"])
            signal = cos * weight
        else:
            signal, cos = heading(dots)
            signal = settling(clock, self.horizon) * weight * signal
            alpha = first_rate(alpha, dots, FIRST)
        return Decision(alpha * (1.0 + signed_gain(self.gain, signal) * signal), cos, {"clock": clock + weight})
