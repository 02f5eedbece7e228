"""Directions: along what a step moves, and in which metric angles are measured. The definition, in plain torch.

Letters: g the gradient G_t; s the way back to the average of the iterates, x̄_t - x_t, which is what is stored of it, since it
is small beside x and needs no digits of it; for the paper's rules p the gradient G_{t-1} and d the direction of step t-1.
`measure` looks at a piece before the step, `update` takes it. Numbers that depend on the run are floats on the CPU and 0-dim
tensors elsewhere, so that nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .pieces import Piece, Scalar, add_scaled, dot

Counts = Mapping[str, Any]  # of one age, by name; `Scalar`s


class Move(NamedTuple):
    """The verdict on a step, for one bucket.

    Attributes:
        rate: η, what multiplies d_t; 0 where the step is not taken.
        decay: share of x that the weight decay takes, or None.
        taken: 1 where G_t enters the state, else 0.
        back: 1 where the last step or steps are to be undone, else 0.
        kept: 0 where past gradients are to be forgotten, else 1.
        last: η of the step before, 0 where it did not move these tensors.
    """

    rate: Scalar
    decay: Scalar | None
    taken: Scalar
    back: Scalar
    kept: Scalar
    last: Scalar


class Numbers(NamedTuple):
    """What a pass over tensors multiplies with, for one bucket.

    Attributes:
        beta1: what is left of the momentum.
        beta2: what the momentum weighs in the direction, of `Momentum`.
        eps: Adam's ε.
        fresh: what G_t² weighs in v.
        first: 1 where the momentum is G_t beforehand, else 0.
        rate: what multiplies the momentum over √v, or the direction.
        share: of x_{t+1} in the average of all iterates.
    """

    beta1: float
    beta2: float
    eps: float
    fresh: Scalar
    first: Scalar
    rate: Scalar
    share: Scalar


class Direction(Protocol):
    """What `Elra` asks of a direction.

    Attributes:
        offers: the names of the inner products that ``measure`` can take.
        counters: the names of what tensors of one age count together, ``step`` among them.
        explodes: a gradient that has suddenly grown makes a step that has.
        relative: entries of d are of order 1, so that rates are comparable to weights.
    """

    offers: ClassVar[frozenset[str]]
    counters: ClassVar[tuple[str, ...]]
    explodes: ClassVar[bool]
    relative: ClassVar[bool]

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters that go into every parameter group."""
        ...

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError when a group's hyperparameter is out of range."""
        ...

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        """The state of one parameter: tensors shaped like it, by name, with their dtypes."""
        ...

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        """What a pass multiplies with: the update with its η, the measurement with the last one. For kernels."""
        ...

    def measure(self, piece: Piece, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> list[Tensor]:
        """Return the inner products ``needs`` of a piece, 0-dim, from the state before the step; ``last`` as in `Move`."""
        ...

    def update(self, piece: Piece, counts: Counts, move: Move) -> None:
        """Take the step: change ``p`` and ``state`` of the piece in place."""
        ...

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        """Return the counts as they are after the step."""
        ...


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless ``betas`` is a pair of numbers in [0, 1)."""
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0.0 <= float(b) < 1.0 for b in betas)):
        raise ValueError(f"betas={betas!r} is invalid: give a pair of numbers in [0, 1)")


def gradient(piece: Piece, move: Move) -> Tensor:
    """G_t, or 0 where it is not taken: a bad number must not meet the state even with a weight of 0."""
    if isinstance(move.taken, float):
        return piece.g if move.taken else torch.zeros_like(piece.g)
    return torch.where(move.taken > 0, piece.g, 0.0)


def share(counts: Counts) -> Scalar:
    """The share of x_{t+1} in the average of all iterates, x_1 included: 1 / (t + 1)."""
    result: Scalar = 1.0 / (counts["step"] + 2.0)
    return result


@dataclass(frozen=True)
class Momentum:
    """Quasi-hyperbolic momentum of past gradients, Euclidean metric. Source: arXiv 2309.06274.

    d_t = (1-β2) G_t + β2 M_t;  M_{t+1} = β1 M_t + (1-β1) G_t;  first step: M_1 = G_1, d_1 = G_1.
    State: M, unless β2 = 0, and x̄ - x, in the parameter's dtype. Where steps have exploded x goes back to x̄.

    Args:
        betas: (β1, β2), each in [0, 1).
    """

    betas: tuple[float, float] = (0.8, 0.7)
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gs", "ss", "gm", "mm"})
    counters: ClassVar[tuple[str, ...]] = ("step",)
    explodes: ClassVar[bool] = True
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        return dict.fromkeys(("way", "momentum") if group["betas"][1] else ("way",), param.dtype)

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        beta1, beta2 = group["betas"]
        return Numbers(beta1, beta2, 0.0, 0.0, _is(counts["step"] == 0), rate, share(counts))

    def measure(self, piece: Piece, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> list[Tensor]:
        letters = {"g": piece.g, "s": piece.state["way"], "m": piece.state.get("momentum")}
        pairs = [(letters[need[0]], letters[need[1]]) for need in needs]
        return [piece.g.new_zeros(()) if x is None or y is None else dot(x, y) for x, y in pairs]

    def update(self, piece: Piece, counts: Counts, move: Move) -> None:
        c = self.numbers(piece.bucket.group, counts, move.rate)
        p, way, m, g = piece.p, piece.state["way"], piece.state.get("momentum"), gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            add_scaled(p, way, move.back)
            way.mul_(1.0 - move.back)
        if move.decay is not None:
            add_scaled(way, p, move.decay)
            add_scaled(p, p, -move.decay)
        if m is not None:
            m.lerp_(g, c.first * move.taken)  # M_1 = G_1
            for y, sign in ((p, -1.0), (way, 1.0)):
                add_scaled(y, m, sign * c.beta2 * c.rate)
            m.lerp_(g, (1.0 - c.beta1) * move.taken)
        for y, sign in ((p, -1.0), (way, 1.0)):
            add_scaled(y, g, sign * (1.0 - (c.beta2 if m is not None else 0.0)) * c.rate)
        way.mul_(1.0 - move.taken * c.share)

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        return {"step": (counts["step"] + move.taken) * move.kept}


@dataclass(frozen=True)
class SuccessiveGradients:
    """The same momentum, measured by successive gradients as the paper does. Source: arXiv 2309.06274.

    State: G_{t-1} and, unless β2 = 0, M_{t-1}, in the parameter's dtype. While ``step`` is 0 they are stale: a restart
    writes no memory. M_1 is never stored, since all it does is to make M_2 = G_1, which is G_{t-1} at step 2.
    Where a step has exploded it is undone.

    Args:
        betas: (β1, β2), each in [0, 1).
    """

    betas: tuple[float, float] = (0.8, 0.7)
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd", "pd"})
    counters: ClassVar[tuple[str, ...]] = ("step",)
    explodes: ClassVar[bool] = True
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        return dict.fromkeys(("grad_prev", "momentum") if group["betas"][1] else ("grad_prev",), param.dtype)

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        beta1, beta2 = group["betas"]
        return Numbers(beta1, beta2, 0.0, 0.0, _is(counts["step"] == 1), rate, 0.0)

    def _last_weights(self, piece: Piece, counts: Counts) -> tuple[Scalar, Scalar]:
        """(a, b) of d_{t-1} = a·G_{t-1} + b·M_{t-1}: (0, 0) before a step, and step 1 moved along G_1 alone."""
        beta2 = piece.bucket.group["betas"][1]
        b = beta2 * _is(counts["step"] > 1)
        return (1.0 - b) * _is(counts["step"] > 0), b

    def measure(self, piece: Piece, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> list[Tensor]:
        letters = {"g": piece.g, "p": piece.state["grad_prev"], "m": piece.state.get("momentum")}
        past = _is(counts["step"] > 0)
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

    def update(self, piece: Piece, counts: Counts, move: Move) -> None:
        beta1, beta2 = piece.bucket.group["betas"]
        p, previous, m, g = piece.p, piece.state["grad_prev"], piece.state.get("momentum"), gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            a, b = self._last_weights(piece, counts)
            add_scaled(p, previous, move.back * move.last * a)
            if m is not None:
                add_scaled(p, m, move.back * move.last * b)
        if move.decay is not None:
            add_scaled(p, p, -move.decay)
        now = beta2 * _is(counts["step"] > 0)  # β2, or 0 in the first step
        if m is not None:
            # M += w (G_{t-1} - M): w = 1 makes M_2 = G_1, and 0 leaves M where nothing is taken or all is stale
            first = _is(counts["step"] == 1)
            m.lerp_(previous, (first + (1.0 - first) * (1.0 - beta1)) * _is(counts["step"] > 0) * move.taken)
            add_scaled(p, m, -move.rate * now)
        previous.lerp_(g, move.taken)
        add_scaled(p, g, -move.rate * (1.0 - now))

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        return {"step": (counts["step"] + move.taken) * move.kept}


def _is(flag: Any) -> Any:
    """1 or 0, as a float or a tensor."""
    return flag.float() if isinstance(flag, Tensor) else float(flag)


@dataclass(frozen=True)
class Adam:
    """Adam's direction d_t = P_t^{-1} m̂_t in its own metric, P_t = diag(√v_t + ε). Source: arXiv 1412.6980; the weights ours.

    Each square is weighed with the rate that it was met at: S_t = β2 S_{t-1} + η_t, v_t = v_{t-1} + (η_t/S_t)(G_t² - v_{t-1}).
    At a constant rate this is Adam with its bias correction; otherwise the squares that were met while the rate was looked
    for, high up and at tiny rates, would stay in v for the whole of a short run.
    Gradients are measured with P_t^{-1} and ways with P_t; G_t is in P_t by the weight of the step before, so that an entry
    that was never met is no infinite length. A bad gradient is left out, and nothing is forgotten.
    State: m and x̄ - x in the parameter's dtype; v in float32 at least, since a change by 1-β2 = 0.001 is below the resolution
    of bfloat16, and a v kept there would never fall.

    Args:
        betas: (β1, β2), each in [0, 1).
        eps: ε > 0.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gs", "ss", "gm", "mm"})
    counters: ClassVar[tuple[str, ...]] = ("step", "weight")
    explodes: ClassVar[bool] = False
    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(self.defaults())

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        if not (math.isfinite(group["eps"]) and group["eps"] > 0.0):
            raise ValueError(f"eps={group['eps']!r} is invalid: give a small positive number, e.g. 1e-8")

    def dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        return {"way": param.dtype, "mean": param.dtype, "variance": torch.promote_types(param.dtype, torch.float32)}

    @staticmethod
    def _fresh(beta2: float, counts: Counts, rate: Scalar) -> tuple[Any, Any]:
        """(S_t, η_t/S_t), the latter 1 before any step has moved."""
        total = beta2 * counts["weight"] + rate
        if isinstance(total, Tensor):
            return total, torch.where(total > 0, rate / total, 1.0)
        return total, rate / total if total > 0 else 1.0

    def numbers(self, group: dict[str, Any], counts: Counts, rate: Scalar) -> Numbers:
        (beta1, beta2), eps = group["betas"], group["eps"]
        correction = 1.0 / (1.0 - beta1 ** (counts["step"] * 1.0 + 1.0)) if beta1 else 1.0
        return Numbers(beta1, beta2, eps, self._fresh(beta2, counts, rate)[1], 0.0, rate * correction, share(counts))

    def measure(self, piece: Piece, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> list[Tensor]:
        c = self.numbers(piece.bucket.group, counts, last)
        fresh = c.fresh
        g, way = piece.g, piece.state["way"]
        metric = piece.state["variance"] * (1.0 - fresh)
        if isinstance(fresh, float):
            metric.addcmul_(g, g, value=fresh)
        else:
            metric.addcmul_(g * fresh, g)
        metric.sqrt_().add_(c.eps)
        work = g / metric
        found = {"gg": dot(work, g), "gs": dot(g, way)}
        found["gm"] = dot(work, piece.state["mean"])
        found["ss"] = dot(torch.mul(way, metric, out=work), way)
        found["mm"] = dot(torch.div(piece.state["mean"], metric, out=work), piece.state["mean"])
        return [found[need] for need in needs]

    def update(self, piece: Piece, counts: Counts, move: Move) -> None:
        c = self.numbers(piece.bucket.group, counts, move.rate)
        p, way, m, v = piece.p, piece.state["way"], piece.state["mean"], piece.state["variance"]
        g = gradient(piece, move)
        if not isinstance(move.back, float) or move.back:
            add_scaled(p, way, move.back)
            way.mul_(1.0 - move.back)
            m.mul_(1.0 - move.back)
        if move.decay is not None:
            add_scaled(way, p, move.decay)
            add_scaled(p, p, -move.decay)
        m.lerp_(g, (1.0 - c.beta1) * move.taken)
        fresh = c.fresh * move.taken
        v.mul_(1.0 - fresh)
        if isinstance(fresh, float):
            v.addcmul_(g, g, value=fresh)
        else:
            v.addcmul_(g * fresh, g)
        moved = v.sqrt().add_(c.eps)
        torch.div(m, moved, out=moved)
        for y, sign in ((p, -1.0), (way, 1.0)):
            add_scaled(y, moved, sign * c.rate)
        way.mul_(1.0 - move.taken * c.share)

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        total, _ = self._fresh(group["betas"][1], counts, move.rate)
        weight = counts["weight"] + move.taken * (total - counts["weight"])
        return {"step": counts["step"] + move.taken, "weight": weight}
