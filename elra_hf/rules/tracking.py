"""tracking: the rate at which the gradient is orthogonal to the way back to the average of the iterates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Decision, Dots, Memory, check_positive, heading


@dataclass(frozen=True)
class Tracking:
    """α_t = α_{t-1}·exp(g_t·w_t·c_t) with c_t = cos(G_t, x̄_t - x_t), x̄_t the average of the iterates. Source: ours.

    The paper's idea with a longer memory. Against the last step the cosine tells only whether that one was too short, which in
    noise is far below the rate that is best over hundreds of steps. Against the average of all iterates it changes its sign at
    the best rate, all run long: where it is positive the whole way behind was too short, since the loss still falls along it.

    Where the loss clearly falls along the momentum that x moves with, that outvotes a negative c_t; see `heading`.
    g_t = max(gain, early_gain·horizon / (horizon + clock)), where the clock is the sum of the weights w_t: a young run looks
    for its rate, an old one only follows it. exp has no downward drift under a cosine that is noise around 0; 1 + g·c has.

    Args:
        gain: change of log α for a cosine of one, once settled, > 0.
        early_gain: the same in the first step, > 0.
        horizon: steps after which half of the early gain is gone, > 0.
        first: α_1 over the typical size of a weight, for directions whose entries are of order 1 and rates therefore
            comparable to weights; None: α_1 is ``lr``. A start only: α is not bound to it.
    """

    gain: float = 0.03
    early_gain: float = 0.7
    horizon: float = 10.0
    first: float | None = None

    def __post_init__(self) -> None:
        check_positive(gain=self.gain, early_gain=self.early_gain, horizon=self.horizon)
        if self.first is not None:
            check_positive(first=self.first)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gg", "gs", "ss", "gm", "mm"})

    @property
    def memory(self) -> Mapping[str, float]:
        return {"clock": 0.0}

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        clock, weight = memory["clock"], dots["weight"]
        signal, cos = heading(dots)
        gain = (self.early_gain * self.horizon / (self.horizon + clock)).clamp(min=self.gain)
        adapted = alpha * torch.exp(gain * weight * signal)
        if self.first is not None:
            scale = dots["scale"]
            adapted = torch.where((dots["steps"] == 0) & (scale > 0), self.first * scale, adapted)
        return Decision(adapted, cos, {"clock": clock + weight})
