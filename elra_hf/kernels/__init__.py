"""Where a bucket's step runs. `directions` defines it in plain torch; kernels do the same in fewer passes, where they can.

What a kernel cannot take, another dtype or layout, plain torch does; everything with ELRA_KERNELS=plain in the environment.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor

from ..directions import Counts, Direction, Move
from ..pieces import Bucket, Scalar
from . import native

__all__ = ["choose", "measure", "update"]

log = logging.getLogger(__name__)


@functools.cache
def accelerated() -> Any:
    """The module of the Triton kernels; None where Triton is missing."""
    try:
        return importlib.import_module(".triton", __name__)
    except ImportError as error:
        log.debug("elra_hf: no kernels for CUDA, plain torch does the work: %s", error)
        return None


def choose(direction: Direction, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> str:
    """Name the kernels that can work on the parameter ``p`` with this state: "native", "triton" or "plain"."""
    if os.environ.get("ELRA_KERNELS") == "plain" or torch.compiler.is_compiling():
        return "plain"
    if p.device.type == "cpu":
        return "native" if native.takes(direction, p, state) else "plain"
    if p.device.type == "cuda" and accelerated() and accelerated().takes(direction, p, state, group):
        return "triton"
    return "plain"


def measure(direction: Direction, bucket: Bucket, counts: Counts, last: Scalar, needs: tuple[str, ...]) -> Tensor:
    """The inner products ``needs`` of a bucket, shape (len(needs),), from the state before the step."""
    if bucket.kernels == "plain":
        return torch.stack([torch.stack(direction.measure(piece, counts, last, needs)) for piece in bucket.pieces()]).sum(0)
    if bucket.kernels == "native":
        found = native.measure(direction, bucket, direction.numbers(bucket.group, counts, last))
        return torch.stack([found[need] for need in needs])
    triton = accelerated()
    move = Move(last, None, 1.0, 0.0, 1.0, last)
    like = torch.empty((), dtype=torch.float32, device=bucket.params[0].device)
    row: Tensor = triton.measure(direction, [bucket], triton.numbers(direction, bucket, counts, move, like)[None])[0]
    return torch.stack([row[triton.PRODUCTS.index(need)] for need in needs])  # a list as index would wait for the device


def update(direction: Direction, bucket: Bucket, counts: Counts, move: Move) -> None:
    """Take the step of a bucket."""
    if bucket.kernels == "triton":
        like = torch.empty((), dtype=torch.float32, device=bucket.params[0].device)
        accelerated().update(direction, [bucket], accelerated().numbers(direction, bucket, counts, move, like)[None])
    elif bucket.kernels == "native" and move.taken and not move.back:
        native.update(direction, bucket, direction.numbers(bucket.group, counts, move.rate), move)
    else:
        for piece in bucket.pieces():
            direction.update(piece, counts, move)
            piece.close()
