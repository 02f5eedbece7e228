"""What the launches of the Triton kernels work on: a table of addresses, and which chunk of which tensor is whose."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..directions import Adam, Direction
from ..pieces import Bucket, is_captured

CHUNK = 2**14
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Sheet(NamedTuple):
    """What one launch works on.

    Attributes:
        table: addresses, and whether all of a tensor's are multiples of 16, shape (6, tensors).
        chunks: (tensor, first entry, entries, bucket, place of its sums), shape (chunks, 5).
        options: constants of the kernels; see `triton`.
    """

    table: Tensor
    chunks: Tensor
    options: dict[str, Any]


class Layout(NamedTuple):
    """What the sheets of some buckets have in common from step to step.

    Attributes:
        key: the buckets, the dtypes of their gradients, whether they are rounded by chance, and whether they ascend.
        members: the buckets of each sheet.
        columns: the addresses of each sheet but those of the gradients: x, the way, m and v.
        low: their digits below 16, of each tensor.
        chunks: those of each sheet.
        bounds: where the sums of each bucket begin and end, shape (buckets, 2).
        signs: of each bucket's gradients, -1 to ascend, shape (buckets,).
        options: those of each sheet.
        spare: host memory for each sheet's table of a captured step, since none can be had while a graph is recorded.
    """

    key: Any
    members: list[list[int]]
    columns: list[list[tuple[int, ...]]]
    low: list[list[int]]
    chunks: list[Tensor]
    bounds: Tensor
    signs: Tensor
    options: list[dict[str, Any]]
    spare: dict[int, Tensor]


def sheets_of(direction: Direction, buckets: Sequence[Bucket]) -> tuple[list[Sheet], Layout]:
    """The launches of these buckets, found once a step; and what they have in common with those of other steps."""
    kept = buckets[0].tables
    if "sheets" not in kept:
        device = buckets[0].params[0].device
        grads = [of_one_type(bucket.grads) for bucket in buckets]
        kept["held"] = held = [*chain(*grads)]  # copies must live as long as their addresses
        key = [
            (id(bucket), members[0].dtype, bucket.group["stochastic_rounding"], bucket.group["maximize"])
            for bucket, members in zip(buckets, grads, strict=True)
        ]
        layout = buckets[0].lasting.get("layout")
        if layout is None or layout.key != key:
            layout = buckets[0].lasting["layout"] = _layout(direction, buckets, key)
        sheets = []
        for k, members in enumerate(layout.members):
            of_grads = tuple([grad.data_ptr() for b in members for grad in grads[b]])
            x, *states = layout.columns[k]
            aligned = tuple([int((low | address) & 15 == 0) for low, address in zip(layout.low[k], of_grads, strict=True)])
            columns = (x, of_grads, *states, aligned)
            if is_captured():  # each replay brings the table to the device anew, from memory that nobody writes to any more
                held.append(_filled(layout.spare.pop(k, None), columns))
                table = held[-1].to(device, non_blocking=True)
            else:
                if k not in layout.spare:
                    pinned = device.type == "cuda"
                    layout.spare[k] = torch.empty((6, len(aligned)), dtype=torch.int64, device="cpu", pin_memory=pinned)
                table = _uploaded(columns, device)
            sheets.append(Sheet(table, layout.chunks[k], layout.options[k]))
        kept["sheets"] = sheets, layout
    found: tuple[list[Sheet], Layout] = kept["sheets"]
    return found


def of_one_type(grads: list[Tensor]) -> list[Tensor]:
    """Contiguous gradients of one dtype that the kernels know."""
    types = {grad.dtype for grad in grads}
    if len(types) > 1 or not types <= TYPES.keys():
        return [grad.float().contiguous() for grad in grads]
    return [grad.contiguous() for grad in grads]


def _layout(direction: Direction, buckets: Sequence[Bucket], key: list[tuple[int, torch.dtype, bool, bool]]) -> Layout:
    """Where the tensors of these buckets lie, sorted into launches by what is constant in the kernels."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for b, (bucket, (_, grad, by_chance, _)) in enumerate(zip(buckets, key, strict=True)):
        momentum = "mean" in bucket.state or "momentum" in bucket.state
        dtypes = bucket.params[0].dtype, bucket.state["way"][0].dtype
        kinds.setdefault((*dtypes, grad, momentum, by_chance and torch.bfloat16 in dtypes), []).append(b)
    members = [*kinds.values()]
    sizes = tuple(tuple((b, tuple(p.numel() for p in buckets[b].params)) for b in of_sheet) for of_sheet in members)
    chunks, bounds = _chunks(sizes, buckets[0].params[0].device)
    columns: list[list[tuple[int, ...]]] = []
    for of_sheet in members:
        rows: list[list[int]] = [[], [], [], []]
        for bucket in (buckets[b] for b in of_sheet):
            state = bucket.state
            every = (bucket.params, state["way"], state.get("mean") or state.get("momentum"), state.get("variance"))
            for row, tensors in zip(rows, every, strict=True):
                row += [t.data_ptr() for t in tensors] if tensors else [0] * len(bucket.params)
        columns.append([tuple(row) for row in rows])
    low = [[(a | b | c | d) & 15 for a, b, c, d in zip(*of_sheet, strict=True)] for of_sheet in columns]
    options = [
        {
            "adam": isinstance(direction, Adam),
            "momentum": momentum,
            "dtype": TYPES[x],
            "grad": TYPES[grad],
            "of_way": TYPES[way],
            "chance": chance,
        }
        for x, way, grad, momentum, chance in kinds
    ]
    signs = torch.tensor([-1.0 if ascends else 1.0 for *_, ascends in key], device="cpu").to(bounds.device)
    return Layout(key, members, columns, low, chunks, bounds, signs, options, {})


@functools.lru_cache(maxsize=16)
def _uploaded(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table on the device; kept, since most steps find the same addresses."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def _filled(spare: Tensor | None, columns: tuple[tuple[int, ...], ...]) -> Tensor:
    """The table in host memory that lies ready for a captured step.

    Raises:
        RuntimeError: none does, since the last step was captured, too.
    """
    if spare is None:
        raise RuntimeError(
            "step() was captured in a CUDA graph twice in a row: take a step between two captures, and capture one step() in "
            "each graph"
        )
    return spare.copy_(torch.tensor(columns, device="cpu"))


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
