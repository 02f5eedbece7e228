"""Momentum, measured by the way back to the average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..pieces import Piece, Scalar, add_scaled, dot
from .base import Counts, Move, Numbers, QuasiHyperbolic, as_number, decaying, gradient, share, way_dtype


@dataclass(frozen=True)
class Momentum(QuasiHyperbolic):
    """Quasi-hyperbolic momentum of past gradients, Euclidean metric. Source: arXiv 2309.06274.

    d_t = (1-β2) G_t + β2 M_t;  M_{t+1} = β1 M_t + (1-β1) G_t;  first step: M_1 = G_1, d_1 = G_1.
    State: M, unless β2 = 0, and x̄ - x, in the parameter's dtype. Where steps have exploded x goes back to x̄.

    Args:
        betas: (β1, β2), each in [0, 1).
        bf16_average: keep x̄ - x of float32 weights in bfloat16.
    """

    bf16_average: bool = False
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gs", "ss", "gm", "mm"})

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        momentum = {"momentum": param.dtype} if group["betas"][1] else {}
        return {"way": way_dtype(param, self.bf16_average), **momentum}

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        beta1, beta2 = group["betas"]
        return Numbers(beta1, beta2, 0.0, 0.0, as_number(counts["step"] == 0), rate, share(counts["step"] + 1.0, self.power))

    def measure(self, piece: Piece, counts: Counts, needs: tuple[str, ...]) -> list[Tensor]:
        letters = {"g": piece.g, "s": piece.state["way"], "m": piece.state.get("momentum")}
        pairs = [(letters[need[0]], letters[need[1]]) for need in needs]
        return [piece.g.new_zeros(()) if x is None or y is None else dot(x, y) for x, y in pairs]

    def update(self, piece: Piece, counts: Counts, move: Move) -> list[Tensor]:
        c = self.numbers(piece.bucket.group, counts, move.rate)
        p, way, m, g = piece.p, piece.state["way"], piece.state.get("momentum"), gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            add_scaled(p, way, move.back)
            way.mul_(1.0 - move.back)
        if move.decay is not None:
            decayed = decaying(p)
            add_scaled(way, decayed, move.decay)
            add_scaled(p, decayed, -move.decay)
        d = g
        if m is not None:
            if not isinstance(c.first, float) or c.first:
                m.lerp_(g, c.first * move.taken)  # M_1 = G_1
            d = torch.lerp(g, m, c.beta2)
            m.lerp_(g, (1.0 - c.beta1) * move.taken)
        for y, sign in ((p, -1.0), (way, 1.0)):
            add_scaled(y, d, sign * c.rate)
        way.mul_(1.0 - move.taken * c.share)
        return []
