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

from ..directions import PRODUCTS, Counts, Direction, Move
from ..pieces import Bucket
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
        return "native" if native.takes(direction, p, state, group) else "plain"
    if p.device.type == "cuda" and accelerated() and accelerated().takes(direction, p, state, group):
        return "triton"
    return "plain"


def measure(direction: Direction, bucket: Bucket, counts: Counts, needs: tuple[str, ...]) -> Tensor:
    """The inner products ``needs`` of a bucket, shape (len(needs),), from the state before the step."""
    if bucket.kernels == "plain":
        return torch.stack([torch.stack(direction.measure(piece, counts, needs)) for piece in bucket.pieces()]).sum(0)
    found = native.measure(direction, bucket) if bucket.kernels == "native" else accelerated().measure(direction, [bucket])[0]
    # a list as index would wait for the device
    return torch.stack([found[PRODUCTS.index(need)] for need in needs])


def update(direction: Direction, bucket: Bucket, counts: Counts, move: Move) -> Tensor:
    """Take the step of a bucket; `PRODUCTS` where they are taken in passing, else nothing, shape (5,) or (0,)."""
    if bucket.kernels == "triton":
        like = torch.empty((), dtype=torch.float32, device=bucket.params[0].device)
        numbers = accelerated().numbers(direction, bucket, counts, move, like)[None]
        found: Tensor = accelerated().update(direction, [bucket], numbers)[0]
        return found
    if bucket.kernels == "native" and move.taken and not move.back:
        return native.update(direction, bucket, direction.numbers(bucket.group, counts, move.rate), move)
    rows = []
    for piece in bucket.pieces():
        rows.append(direction.update(piece, counts, move))
        piece.close()
    return torch.stack([torch.stack(row) if row else piece.p.new_empty(0) for row in rows]).sum(0)
