"""Directions: along what a step moves, and in which metric angles are measured.

`measure` looks back at the step taken last, from the state as that step left it; `update` takes the next one.
Both are multi-tensor calls; the plain loop is the same code on lists of one tensor.
Every scalar that depends on the run is a 0-dim tensor, so nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .bucket import Bucket, Move, Tensors


class Direction(Protocol):
    """What `Elra` asks of a direction.

    Attributes:
        offers: the names of the inner products that ``measure`` can take; see `rules`.
        backtracks: undoing a step is cheap, so that a bad gradient alone may call for it.
    """

    offers: ClassVar[frozenset[str]]
    backtracks: ClassVar[bool]

    def defaults(self) -> dict[str, Any]:
        """Hyperparameters that go into every parameter group."""
        ...

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError when a group's hyperparameter is out of range."""
        ...

    def state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Fresh state of one parameter: zeros shaped like it."""
        ...

    def measure(self, bucket: Bucket, needs: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """Return the inner products ``needs`` of each tensor, shape (tensors, needs), in ``dtype``."""
        ...

    def update(self, bucket: Bucket, move: Move) -> None:
        """Take the step, or undo the last one: change ``params`` and ``state`` in place."""
        ...

    def count(self, bucket: Bucket, move: Move) -> Tensor:
        """Return ``step`` as it is after the move."""
        ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ as a 0-dim tensor, whatever the strides."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def dots(xs: Tensors, ys: Tensors, dtype: torch.dtype) -> Tensor:
    """⟨x, y⟩ for each pair, shape (tensors,)."""
    return torch.stack([dot(x, y) for x, y in zip(xs, ys, strict=True)]).to(dtype)


def log_sizes(xs: Tensors, grads: Tensors, dtype: torch.dtype) -> Tensor:
    """(Σ log|x_i|, number of terms) over the entries of each tensor where x_i ≠ 0 and g_i ≠ 0, shape (tensors, 2).

    A gradient of 0 marks rows of an embedding that the batch does not use, and padding, which may hold anything.
    """
    used = [(x != 0) & (g != 0) for x, g in zip(xs, grads, strict=True)]
    logs = [torch.where(use, x.abs(), 1.0).log().sum() for use, x in zip(used, xs, strict=True)]
    return torch.stack([torch.stack(logs), torch.stack([use.sum() for use in used])], 1).to(dtype)


def square_sizes(xs: Tensors, grads: Tensors, dtype: torch.dtype) -> Tensor:
    """Σ x_i² over the entries of each tensor where g_i ≠ 0, shape (tensors,); as to the others see `log_sizes`."""
    return torch.stack([torch.where(g != 0, x, 0.0).to(dtype).square().sum() for x, g in zip(xs, grads, strict=True)])


def add_scaled(xs: Tensors, ys: Tensors | tuple[Tensor, ...], scale: Tensor) -> None:
    """Add scale·y to x for each pair and a 0-dim ``scale``."""
    torch._foreach_add_(xs, torch._foreach_mul(ys, scale.to(xs[0].dtype)))


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless ``betas`` is a pair of numbers in [0, 1)."""
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0.0 <= float(b) < 1.0 for b in betas)):
        raise ValueError(f"betas={betas!r} is invalid: give a pair of numbers in [0, 1)")


@dataclass(frozen=True)
class Momentum:
    """Quasi-hyperbolic momentum of past gradients, Euclidean metric. Source: arXiv 2309.06274.

    M_t = β1 M_{t-1} + (1-β1) G_{t-1};  d_t = (1-β2) G_t + β2 M_t;  first step: M_1 = G_1, d_1 = G_1.
    G_t is shortened where the step says so. State: G_{t-1} and, unless β2 = 0, M_{t-1}, in the parameter's dtype.

    While ``step`` is 0 the stored tensors are stale: a restart resets ``step`` and writes no memory.
    M_1 is never stored, since all it does is to make M_2 = G_1, which is G_{t-1} at step 2.

    Args:
        betas: (β1, β2), each in [0, 1).
    """

    betas: tuple[float, float] = (0.8, 0.7)
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gp", "pp", "gd", "pd", "dd"})
    backtracks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])

    def state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        names = ("grad_prev", "momentum") if group["betas"][1] else ("grad_prev",)
        return {name: torch.zeros_like(param) for name in names}

    def _last_weights(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """(a, b) of d_{t-1} = a·G_{t-1} + b·M_{t-1}: (0, 0) before a step, and step 1 moved along G_1 alone."""
        beta2 = bucket.group["betas"][1]
        zero = torch.zeros_like(bucket.age)
        b = torch.where(bucket.age > 1, beta2, zero)
        return torch.where(bucket.age > 0, 1.0 - b, zero), b

    def measure(self, bucket: Bucket, needs: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        letters = {"g": bucket.grads, "p": bucket.state["grad_prev"], "m": bucket.state.get("momentum")}
        past = (bucket.age > 0).to(dtype)
        a, b = (weight.to(dtype) for weight in self._last_weights(bucket))
        known: dict[str, Tensor] = {}

        def product(name: str) -> Tensor:
            """The products of two letters, taken once; a momentum that is not kept is zero."""
            if name not in known:
                xs, ys = letters[name[0]], letters[name[1]]
                known[name] = dots(xs, ys, dtype) if xs and ys else a.new_zeros(len(bucket.grads))
            return known[name]

        columns = {
            "gg": lambda: product("gg"),
            "gp": lambda: past * product("gp"),
            "pp": lambda: past * product("pp"),
            "gd": lambda: a * product("gp") + b * product("gm"),
            "pd": lambda: a * product("pp") + b * product("pm"),
            "dd": lambda: a * a * product("pp") + 2 * a * b * product("pm") + b * b * product("mm"),
        }
        return torch.stack([columns[need]() for need in needs], dim=1)

    def update(self, bucket: Bucket, move: Move) -> None:
        beta1, beta2 = bucket.group["betas"]
        params, previous, momenta = bucket.params, bucket.state["grad_prev"], bucket.state.get("momentum")
        zero = torch.zeros_like(bucket.age)
        if move.back is not None:
            a, b = self._last_weights(bucket)
            add_scaled(params, previous, move.back * a)
            if momenta is not None:
                add_scaled(params, momenta, move.back * b)
        if move.decay is not None:
            torch._foreach_mul_(params, move.decay)
        now = torch.where(bucket.age > 0, beta2, zero)  # β2, or 0 in the first step
        if momenta is not None:
            # M += w (G_{t-1} - M): w = 1 makes M_2 = G_1, and 0 leaves M where nothing is taken or all is stale
            w = torch.where(bucket.age == 1, 1.0, zero + (1.0 - beta1)) * (move.taken & (bucket.age > 0))
            add_scaled(momenta, torch._foreach_sub(previous, momenta), w)
            add_scaled(params, momenta, -move.rate * now)
        for p, g in zip(previous, bucket.grads, strict=True):
            torch.where(move.taken, g, p, out=p)
        if move.clip is not None:
            torch._foreach_mul_(previous, torch.where(move.taken, move.clip, 1.0))
        # G_t as stored, so that a non-finite one never meets x
        add_scaled(params, previous, -move.rate * (1.0 - now))

    def count(self, bucket: Bucket, move: Move) -> Tensor:
        return torch.where(move.restart, 0.0, bucket.step + move.taken)


@dataclass(frozen=True)
class Adam:
    """Adam's direction d_t = P_t^{-1} m̂_t in its own metric, P_t = diag(√v̂_t + ε). Source: arXiv 1412.6980.

    Gradients are measured with P^{-1} and steps with P: gg = ⟨G, P^{-1} G⟩, dd = ⟨d, P d⟩, with P and d of step t-1, which
    follow from m and v before they are updated. A restart forgets m and keeps v.
    State: m in the parameter's dtype; v in float32 at least, since a change by 1-β2 = 0.001 is below the resolution of
    bfloat16, and a v kept there would never fall.

    Args:
        betas: (β1, β2), each in [0, 1).
        eps: ε > 0.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    offers: ClassVar[frozenset[str]] = frozenset({"gg", "gd", "dd"})
    backtracks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check(self.defaults())

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        if not (math.isfinite(group["eps"]) and group["eps"] > 0.0):
            raise ValueError(f"eps={group['eps']!r} is invalid: give a small positive number, e.g. 1e-8")

    def state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        wide = torch.promote_types(param.dtype, torch.float32)
        return {"mean": torch.zeros_like(param), "variance": torch.zeros_like(param, dtype=wide)}

    @staticmethod
    def _correction(beta: float, step: Tensor) -> Tensor:
        """1 / (1 - β^step); 0 at step 0. expm1 keeps the digits that 1 - β^step loses in float32."""
        kept = -torch.expm1(step * math.log(beta)) if beta > 0.0 else torch.ones_like(step)
        return torch.where(step > 0, 1.0 / kept, 0.0)

    def _denominators(self, bucket: Bucket, step: Tensor) -> Tensors:
        """√v̂ + ε after ``step`` steps."""
        denominators = list(torch._foreach_sqrt(bucket.state["variance"]))
        scale = self._correction(bucket.group["betas"][1], step).sqrt()
        torch._foreach_mul_(denominators, scale.to(denominators[0].dtype))
        torch._foreach_add_(denominators, bucket.group["eps"])
        return denominators

    def measure(self, bucket: Bucket, needs: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        grads, means = bucket.grads, bucket.state["mean"]
        denominators = self._denominators(bucket, bucket.age)
        mean_hat = self._correction(bucket.group["betas"][0], bucket.age).to(dtype)
        grads_metric = list(torch._foreach_div(grads, denominators))
        columns = {
            "gg": lambda: dots(grads_metric, grads, dtype),
            "gd": lambda: dots(grads_metric, means, dtype) * mean_hat,
            "dd": lambda: dots(list(torch._foreach_div(means, denominators)), means, dtype) * mean_hat.square(),
        }
        return torch.stack([columns[need]() for need in needs], dim=1)

    def update(self, bucket: Bucket, move: Move) -> None:
        beta1, beta2 = bucket.group["betas"]
        params, means, variances = bucket.params, bucket.state["mean"], bucket.state["variance"]
        if move.back is not None:
            directions = torch._foreach_div(means, self._denominators(bucket, bucket.age))
            add_scaled(params, directions, move.back * self._correction(beta1, bucket.age))
        if move.decay is not None:
            torch._foreach_mul_(params, move.decay)
        grads = [torch.where(move.taken, g, 0.0) for g in bucket.grads]
        one = torch.ones_like(move.rate)
        torch._foreach_mul_(means, torch.where(move.restart, 0.0, torch.where(move.taken, beta1, one)))
        torch._foreach_add_(means, grads, alpha=1.0 - beta1)
        torch._foreach_mul_(variances, torch.where(move.taken, beta2, one))
        torch._foreach_addcmul_(variances, grads, grads, value=1.0 - beta2)
        after = bucket.age + 1
        directions = torch._foreach_div(means, self._denominators(bucket, after))
        add_scaled(params, directions, -move.rate * self._correction(beta1, after))

    def count(self, bucket: Bucket, move: Move) -> Tensor:
        return bucket.step + move.taken
