"""Where a bucket's step runs. `directions` defines it in plain torch; kernels do the same in fewer passes, where they can.

What a kernel cannot take, another dtype or layout or a step that is undone, plain torch does. ELRA_KERNELS=plain in the
environment has it do everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..directions import Counts, Direction, Move
from ..pieces import Bucket, Scalar
from . import native

__all__ = ["measure", "update"]


def measure(direction: Direction, bucket: Bucket, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> Tensor:
    """The inner products ``needs`` of a bucket, shape (len(needs),), from the state before the step."""
    if bucket.native:
        found = native.measure(direction, bucket, direction.numbers(bucket.group, counts, last))
        return torch.stack([found[need] for need in needs])
    return torch.stack([torch.stack(direction.measure(piece, counts, last, needs)) for piece in bucket.pieces()]).sum(0)


def update(direction: Direction, bucket: Bucket, counts: Counts, move: Move) -> None:
    """Take the step of a bucket."""
    if bucket.native and move.taken and not move.back and not isinstance(move.decay, Tensor):
        native.update(direction, bucket, direction.numbers(bucket.group, counts, move.rate), move.decay)
        return
    for piece in bucket.pieces():
        direction.update(piece, counts, move)
        piece.close()
