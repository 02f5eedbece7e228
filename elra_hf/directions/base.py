"""What a direction is: the letters, what a step is told, and what `Elra` asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import is_number
from ..pieces import Piece, Scalar

Counts = Mapping[str, Any]  # of one age, by name; `Scalar`s
PRODUCTS = ("gg", "gm", "gs", "mm", "ss")  # in the order in which kernels return them


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
        share: of x_{t+1} in the average of the iterates.
    """

    beta1: Scalar
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
        passing: the inner products are taken in passing, while the step is, and serve the next one; see `Adam`. Beforehand
            only ``gg`` is, and that is ‖G_t‖².
        power: in the average of the iterates the k-th weighs k^power; 0 or 1.
    """

    offers: ClassVar[frozenset[str]]
    counters: ClassVar[tuple[str, ...]]
    explodes: ClassVar[bool]
    relative: ClassVar[bool]
    passing: ClassVar[bool]
    power: ClassVar[int]

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
        """What the update multiplies with, by its η. For kernels."""
        ...

    def measure(self, piece: Piece, counts: Counts, needs: tuple[str, ...]) -> list[Tensor]:
        """Return the inner products ``needs`` of a piece, 0-dim, before the step."""
        ...

    def update(self, piece: Piece, counts: Counts, move: Move) -> list[Tensor]:
        """Take the step: change ``p`` and ``state`` of the piece in place.

        Returns:
            `PRODUCTS` of what the step began with where they are taken in passing, 0-dim, of no meaning unless G_t is taken;
            else nothing.
        """
        ...

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        """Return the counts as they are after the step."""
        ...


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless ``betas`` is a pair of numbers in [0, 1)."""
    pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(map(is_number, betas))
    if not (pair and all(0.0 <= float(b) < 1.0 for b in betas)):
        raise ValueError(f"betas={betas!r} is invalid: give a pair of numbers in [0, 1)")


def gradient(piece: Piece, move: Move) -> Tensor:
    """G_t, or 0 where it is not taken: a bad number must not meet the state even with a weight of 0."""
    if isinstance(move.taken, float):
        return piece.g if move.taken else torch.zeros_like(piece.g)
    return torch.where(move.taken > 0, piece.g, 0.0)


def decaying(p: Tensor) -> Tensor:
    """What a weight decay takes a share of: ``p``, without what is forbidden by -inf, which stays."""
    return p.nan_to_num(math.nan, 0.0, 0.0)


def share(step: Scalar, power: int) -> Scalar:
    """The share of x_{t+1} in the average of x_1, …, x_{t+1}, ``step`` = t: 1 / (t + 1), or where x_k weighs k 2 / (t + 2)."""
    result: Scalar = (1.0 + power) / (step + 1.0 + power)
    return result


def way_dtype(param: Tensor, bf16_average: bool) -> torch.dtype:
    """Of x̄ - x: that of the weights, or of float32 weights bfloat16."""
    return torch.bfloat16 if bf16_average and param.dtype == torch.float32 else param.dtype


def as_number(flag: Any) -> Any:
    """1 or 0, as a float or a tensor."""
    return flag.float() if isinstance(flag, Tensor) else float(flag)


@dataclass(frozen=True)
class QuasiHyperbolic:
    """What `Momentum` and `SuccessiveGradients` have in common.

    Args:
        betas: (β1, β2), each in [0, 1).
    """

    betas: tuple[float, float] = (0.8, 0.7)
    counters: ClassVar[tuple[str, ...]] = ("step",)
    explodes: ClassVar[bool] = True
    relative: ClassVar[bool] = False
    passing: ClassVar[bool] = False
    power: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_betas(self.betas)

    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas}

    def check(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])

    def count(self, group: dict[str, Any], counts: Counts, move: Move) -> dict[str, Any]:
        return {"step": (counts["step"] + move.taken) * move.kept}
