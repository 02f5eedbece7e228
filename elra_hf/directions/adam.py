"""Adam's direction, in its own metric."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import is_number
from ..pieces import Piece, Scalar, add_scaled, dot
from .base import Counts, Move, Numbers, check_betas, decaying, gradient, share, way_dtype


@dataclass(frozen=True)
class Adam:
    """Adam's direction d_t = P_t^{-1} m_t in its own metric, P_t = diag(√v_t + ε). Source: arXiv 1412.6980; the weights ours.

    Each gradient is weighed with the rate that it was met at: with S_t = β S_{t-1} + η_t, of β1 for m and of β2 for v,
    m_t = m_{t-1} + (η_t/S_t)(G_t - m_{t-1}) and v_t = v_{t-1} + (η_t/S_t)(G_t² - v_{t-1}). At a constant rate this is Adam with
    its bias correction. Otherwise what was met while the rate was looked for, high up and at tiny rates, would damp the first
    steps at the rate found, and stay in v for the whole of a short run. η_t/S_t of m is 1 - β1 at least: where the rate falls,
    m forgets as Adam's does.
    Gradients are measured with P_t^{-1} and ways with P_t, in passing: while step t is taken, which spares a reading of all
    state, and serves the rate of step t + 1. Before it ‖G_t‖² alone is measured. A bad gradient is left out, and nothing is
    forgotten; where a step has exploded x goes back to the average of the iterates before it, and m is forgotten.
    State: m and x̄ - x in the parameter's dtype; v in float32 at least, since a change by 1-β2 = 0.001 is below the resolution
    of bfloat16, and a v kept there would never fall.

    Args:
        betas: (β1, β2), each in [0, 1).
        eps: ε, > 0 in float32.
        bf16_average: keep x̄ - x of float32 weights in bfloat16.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bf16_average: bool = False
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gs", "ss", "gm", "mm"})
    counters: ClassVar[tuple[str, ...]] = ("step", "mean_weight", "variance_weight")
    explodes: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    passing: ClassVar[bool] = True
    power: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.check(self.defaults())

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        # what is 0 in float32 would divide 0 by 0 where there was no gradient
        if not (is_number(group["eps"]) and torch.finfo(torch.float32).tiny <= group["eps"] < math.inf):
            raise ValueError(f"eps={group['eps']!r} is invalid: give a small positive number, e.g. 1e-8")

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        variance = torch.promote_types(param.dtype, torch.float32)
        return {"way": way_dtype(param, self.bf16_average), "mean": param.dtype, "variance": variance}

    @staticmethod
    def _fresh(beta: float, weight: Scalar, rate: Scalar, least: float = 0.0) -> tuple[Any, Any]:
        """(S_t, η_t/S_t), the latter 1 before any step has moved, and not below ``least``."""
        total = beta * weight + rate
        if isinstance(total, Tensor):
            fresh: Any = torch.where(total > 0, rate / total, 1.0).clamp(min=least)
        else:
            fresh = max(rate / total if total > 0 else 1.0, least)
        return (rate / fresh if least else total), fresh

    def _of_mean(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> tuple[Any, Any]:
        beta1 = group["betas"][0]
        return self._fresh(beta1, counts["mean_weight"], rate, 1.0 - beta1)

    def _of_variance(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> tuple[Any, Any]:
        return self._fresh(group["betas"][1], counts["variance_weight"], rate)

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        of_mean, of_variance = self._of_mean(group, counts, rate)[1], self._of_variance(group, counts, rate)[1]
        newest = share(counts["step"] + 1.0, self.power)
        return Numbers(1.0 - of_mean, group["betas"][1], group["eps"], of_variance, 0.0, rate, newest)

    def measure(self, piece: Piece, counts: Counts, needs: tuple[str, ...]) -> list[Tensor]:
        return [dot(piece.g, piece.g)]

    def update(self, piece: Piece, counts: Counts, move: Move) -> list[Tensor]:
        c = self.numbers(piece.bucket.group, counts, move.rate)
        p, way, m, v = piece.p, piece.state["way"], piece.state["mean"], piece.state["variance"]
        g = gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            add_scaled(p, way, move.back * self._reach(counts["step"]))
            way.mul_(1.0 - move.back)
            m.mul_(1.0 - move.back)
        fresh = c.fresh * move.taken
        v.mul_(1.0 - fresh)
        if isinstance(fresh, float):
            v.addcmul_(g, g, value=fresh)
        else:
            v.addcmul_(g * fresh, g)
        metric = v.sqrt().add_(c.eps)
        work = g / metric
        gg, gm, gs = dot(work, g), dot(work, m), dot(g, way)
        ss = dot(torch.mul(way, metric, out=work), way)
        mm = dot(torch.div(m, metric, out=work), m)
        if move.decay is not None:
            decayed = decaying(p)
            add_scaled(way, decayed, move.decay)
            add_scaled(p, decayed, -move.decay)
        m.lerp_(g, (1.0 - c.beta1) * move.taken)
        torch.div(m, metric, out=work)
        for y, sign in ((p, -1.0), (way, 1.0)):
            add_scaled(y, work, sign * c.rate)
        way.mul_(1.0 - move.taken * c.share)
        return [gg, gm, gs, mm, ss]

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        after = {
            "mean_weight": self._of_mean(group, counts, move.rate)[0],
            "variance_weight": self._of_variance(group, counts, move.rate)[0],
        }
        new = {name: counts[name] + move.taken * (total - counts[name]) for name, total in after.items()}
        return {"step": counts["step"] + move.taken, **new, "mean_weight": new["mean_weight"] * (1.0 - move.back)}

    def _reach(self, taken: Scalar) -> Scalar:
        """How many ways it is from x_t back to the average of the iterates before x_t, ``taken`` = t steps taken.

        A step at a rate above the weights goes so far that even its share of the average would tear them apart.
        """
        least = taken.clamp(min=1.0) if isinstance(taken, Tensor) else max(taken, 1.0)
        result: Scalar = 1.0 / (1.0 - share(least, self.power))
        return result
