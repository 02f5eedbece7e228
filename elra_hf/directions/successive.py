"""Momentum, measured by successive gradients as the paper does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..pieces import Piece, Scalar, add_scaled, dot
from .base import Counts, Move, Numbers, QuasiHyperbolic, as_number, decaying, gradient


@dataclass(frozen=True)
class SuccessiveGradients(QuasiHyperbolic):
    """The same momentum, measured by successive gradients as the paper does. Source: arXiv 2309.06274.

    State: G_{t-1} and, unless β2 = 0, M_{t-1}, in the parameter's dtype. While ``step`` is 0 they are stale: a restart
    writes no memory. M_1 is never stored, since all it does is to make M_2 = G_1, which is G_{t-1} at step 2.
    Where a step has exploded it is undone.

    Args:
        betas: (β1, β2), each in [0, 1).
    """

    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd", "pd"})

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        return dict.fromkeys(("grad_prev", "momentum") if group["betas"][1] else ("grad_prev",), param.dtype)

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        beta1, beta2 = group["betas"]
        return Numbers(beta1, beta2, 0.0, 0.0, as_number(counts["step"] == 1), rate, 0.0)

    def _last_weights(self, piece: Piece, counts: Counts) -> tuple[Scalar, Scalar]:
        """(a, b) of d_{t-1} = a·G_{t-1} + b·M_{t-1}: (0, 0) before a step, and step 1 moved along G_1 alone."""
        beta2 = piece.bucket.group["betas"][1]
        b = beta2 * as_number(counts["step"] > 1)
        return (1.0 - b) * as_number(counts["step"] > 0), b

    def measure(self, piece: Piece, counts: Counts, needs: tuple[str, ...]) -> list[Tensor]:
        letters = {"g": piece.g, "p": piece.state["grad_prev"], "m": piece.state.get("momentum")}
        past = as_number(counts["step"] > 0)
        a, b = self._last_weights(piece, counts)
        known: dict[str, Tensor] = {}

        def product(name: str) -> Tensor:
            """The products of two letters, taken once; a momentum that is not kept is zero."""
            if name not in known:
                x, y = letters[name[0]], letters[name[1]]
                known[name] = piece.g.new_zeros(()) if x is None or y is None else dot(x, y)
            return known[name]

        columns: dict[str, Callable[[], Tensor]] = {
            "gg": lambda: product("gg"),
            "gp": lambda: past * product("gp"),
            "pp": lambda: past * product("pp"),
            "gd": lambda: a * product("gp") + b * product("gm"),
            "pd": lambda: a * product("pp") + b * product("pm"),
        }
        return [columns[need]() for need in needs]

    def update(self, piece: Piece, counts: Counts, move: Move) -> list[Tensor]:
        beta1, beta2 = piece.bucket.group["betas"]
        p, previous, m, g = piece.p, piece.state["grad_prev"], piece.state.get("momentum"), gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            a, b = self._last_weights(piece, counts)
            add_scaled(p, previous, move.back * move.last * a)
            if m is not None:
                add_scaled(p, m, move.back * move.last * b)
        if move.decay is not None:
            add_scaled(p, decaying(p), -move.decay)
        now = beta2 * as_number(counts["step"] > 0)  # β2, or 0 in the first step
        if m is not None:
            # M += w (G_{t-1} - M): w = 1 makes M_2 = G_1, and 0 leaves M where nothing is taken or all is stale
            first = as_number(counts["step"] == 1)
            m.lerp_(previous, (first + (1.0 - first) * (1.0 - beta1)) * as_number(counts["step"] > 0) * move.taken)
            add_scaled(p, m, -move.rate * now)
        previous.lerp_(g, move.taken)
        add_scaled(p, g, -move.rate * (1.0 - now))
        return []
