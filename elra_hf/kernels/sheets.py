"""What the launches of the Triton kernels work on: a table of addresses, and which chunk of which tensor is whose."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..directions import Adam, Direction
from ..pieces import Bucket, is_captured

CHUNK = 2**14
SPARE: dict[tuple[int, int], Tensor] = {}  # by number of the launch and of its tensors
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Sheet(NamedTuple):
    """What one launch works on.

    Attributes:
        table: addresses, and whether all of a tensor's are multiples of 16, shape (6, tensors).
        chunks: (tensor, first entry, entries, bucket, place of its sums), shape (chunks, 5).
        held: what must live as long as the table.
        options: constants of the kernels; see `triton`.
    """

    table: Tensor
    chunks: Tensor
    held: list[Tensor]
    options: dict[str, Any]


def sheets_of(direction: Direction, buckets: Sequence[Bucket]) -> tuple[list[Sheet], Tensor]:
    """The launches of these buckets, found once a step; and where their sums begin and end, shape (buckets, 2)."""
    kept = buckets[0].tables
    if "sheets" not in kept:
        device = buckets[0].params[0].device
        kinds: dict[tuple[Any, ...], list[tuple[int, list[Tensor], list[Tensor] | None]]] = {}
        for b, bucket in enumerate(buckets):
            grads = [g.contiguous() if g.dtype in TYPES else g.float().contiguous() for g in bucket.grads]
            if len({g.dtype for g in grads}) > 1:
                grads = [g.float() for g in grads]
            momentum = bucket.state.get("mean") or bucket.state.get("momentum")
            chance = bucket.group["stochastic_rounding"] and bucket.params[0].dtype == torch.bfloat16
            kind = bucket.params[0].dtype, grads[0].dtype, momentum is not None, chance
            kinds.setdefault(kind, []).append((b, grads, momentum))
        sizes = tuple(
            tuple((b, tuple(p.numel() for p in buckets[b].params)) for b, *_ in members) for members in kinds.values()
        )
        chunks, bounds = _chunks(sizes, device)
        sheets: list[Sheet] = []
        for (dtype, grad, with_momentum, chance), members, rows in zip(kinds, kinds.values(), chunks, strict=True):
            columns: list[list[int]] = [[], [], [], [], []]
            for b, grads, momentum in members:
                state = buckets[b].state
                every = (buckets[b].params, grads, state["way"], momentum, state.get("variance"))
                for column, tensors in zip(columns, every, strict=True):
                    column += [t.data_ptr() for t in tensors] if tensors else [0] * len(grads)
            options = {
                "adam": isinstance(direction, Adam),
                "momentum": with_momentum,
                "dtype": TYPES[dtype],
                "grad": TYPES[grad],
                "chance": chance,
            }
            aligned = [int(all(address % 16 == 0 for address in addresses)) for addresses in zip(*columns, strict=True)]
            held = [g for _, grads, _ in members for g in grads]
            host = _spare(len(sheets), len(aligned), device)
            if is_captured():  # each replay brings the table to the device anew, from memory that nobody writes to any more
                table = host.copy_(torch.tensor([*columns, aligned], device="cpu")).to(device, non_blocking=True)
                held.append(SPARE.pop((len(sheets), len(aligned))))
            else:
                table = _uploaded(tuple(map(tuple, [*columns, aligned])), device)
            sheets.append(Sheet(table, rows, held, options))
        kept["sheets"] = sheets, bounds
    found: tuple[list[Sheet], Tensor] = kept["sheets"]
    return found


@functools.lru_cache(maxsize=16)
def _uploaded(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table on the device; kept, since most steps find the same addresses."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def _spare(sheet: int, tensors: int, device: torch.device) -> Tensor:
    """Host memory for the table of a captured step; none can be had while a graph is recorded."""
    key = sheet, tensors
    if key not in SPARE:
        SPARE[key] = torch.empty((6, tensors), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return SPARE[key]


@functools.lru_cache(maxsize=16)
def _chunks(sheets: tuple[Any, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The chunks of each sheet, given as (bucket, numbers of entries of its tensors), and the bounds of all buckets."""
    found, bounds, at = [], {}, 0
    for members in sheets:
        rows, k = [], 0
        for b, sizes in members:
            start = at
            for n in sizes:
                parts = range(0, n, CHUNK)
                rows += [(k, i, min(CHUNK, n - i), b, at + j) for j, i in enumerate(parts)]
                at, k = at + len(parts), k + 1
            bounds[b] = start, at
        found.append(torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 5).to(device))
    return found, torch.tensor([bounds[b] for b in sorted(bounds)], dtype=torch.int64, device="cpu").to(device)
