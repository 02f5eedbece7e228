"""The kernels for accelerators, in Triton: one launch measures a bucket and one updates it, whatever the number of tensors.

The tensors are found through a table of addresses, and cut into chunks of `CHUNK` entries, one a program. Sums are taken chunk
by chunk and then over the chunks, so that they are the same in every run. Numbers that depend on the run lie on the device.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import Adam, Direction, Momentum, Move, Numbers
from ..pieces import PLAIN_TENSORS, Bucket, Scalar

CHUNK = 2**14
BLOCK = 2**10
PRODUCTS = ("gg", "gm", "gs", "mm", "ss")
COLUMNS = ("p", "g", "way", "mean", "variance")
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _column(table, column: tl.constexpr, tensors, k, start, dtype: tl.constexpr, aligned: tl.constexpr):
    """Where the chunk begins in one of the columns."""
    pointer = tl.load(table + column * tensors + k).to(tl.pointer_type(dtype)) + start
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _measure(
    table, chunks, tensors, numbers, sums, sign, eps,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, aligned: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The five products of one chunk, to ``sums``, shape (chunks, 5)."""
    at = tl.program_id(0)
    k, start, n = tl.load(chunks + 3 * at), tl.load(chunks + 3 * at + 1), tl.load(chunks + 3 * at + 2)
    g_at = _column(table, 1, tensors, k, start, grad, aligned)
    way_at = _column(table, 2, tensors, k, start, dtype, aligned)
    m_at = _column(table, 3, tensors, k, start, dtype, aligned)
    v_at = _column(table, 4, tensors, k, start, tl.float32, aligned)
    fresh = tl.load(numbers)
    gg = tl.zeros((BLOCK,), tl.float32)
    gm = tl.zeros((BLOCK,), tl.float32)
    gs = tl.zeros((BLOCK,), tl.float32)
    mm = tl.zeros((BLOCK,), tl.float32)
    ss = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < n
        g = sign * tl.load(g_at + i, inside, 0.0).to(tl.float32)
        way = tl.load(way_at + i, inside, 0.0).to(tl.float32)
        m = tl.zeros((BLOCK,), tl.float32)
        if momentum:
            m = tl.load(m_at + i, inside, 0.0).to(tl.float32)
        metric = tl.full((BLOCK,), 1.0, tl.float32)
        if adam:
            v = tl.load(v_at + i, inside, 0.0)
            metric = tl.sqrt(v * (1.0 - fresh) + fresh * g * g) + eps
        gg += g * g / metric
        gm += g * m / metric
        gs += g * way
        mm += m * m / metric
        ss += way * way * metric
    tl.store(sums + 5 * at, tl.sum(gg))
    tl.store(sums + 5 * at + 1, tl.sum(gm))
    tl.store(sums + 5 * at + 2, tl.sum(gs))
    tl.store(sums + 5 * at + 3, tl.sum(mm))
    tl.store(sums + 5 * at + 4, tl.sum(ss))


@triton.jit
def _update(
    table, chunks, tensors, numbers, sign, beta1, beta2, eps,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, aligned: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step of one chunk, as `directions` does; a gradient that is not taken counts as 0."""
    at = tl.program_id(0)
    k, start, n = tl.load(chunks + 3 * at), tl.load(chunks + 3 * at + 1), tl.load(chunks + 3 * at + 2)
    p_at = _column(table, 0, tensors, k, start, dtype, aligned)
    g_at = _column(table, 1, tensors, k, start, grad, aligned)
    way_at = _column(table, 2, tensors, k, start, dtype, aligned)
    m_at = _column(table, 3, tensors, k, start, dtype, aligned)
    v_at = _column(table, 4, tensors, k, start, tl.float32, aligned)
    taken, back, decay = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    fresh, first = tl.load(numbers) * taken, tl.load(numbers + 1) * taken
    rate, share = tl.load(numbers + 2), tl.load(numbers + 3) * taken
    for begin in range(0, CHUNK, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < n
        g = tl.where(taken > 0, sign * tl.load(g_at + i, inside, 0.0).to(tl.float32), 0.0)
        p = tl.load(p_at + i, inside, 0.0).to(tl.float32)
        way = tl.load(way_at + i, inside, 0.0).to(tl.float32)
        p += back * way
        way *= 1.0 - back
        lost = decay * p
        if adam:
            m = tl.load(m_at + i, inside, 0.0).to(tl.float32) * (1.0 - back)
            m += (1.0 - beta1) * taken * (g - m)
            v = tl.load(v_at + i, inside, 0.0)
            v = v * (1.0 - fresh) + fresh * g * g
            lost += rate * m / (tl.sqrt(v) + eps)
            tl.store(m_at + i, m.to(dtype), inside)
            tl.store(v_at + i, v, inside)
        elif momentum:
            m = tl.load(m_at + i, inside, 0.0).to(tl.float32)
            m += first * (g - m)
            lost += rate * (beta2 * m + (1.0 - beta2) * g)
            m += (1.0 - beta1) * taken * (g - m)
            tl.store(m_at + i, m.to(dtype), inside)
        else:
            lost += rate * g
        tl.store(p_at + i, (p - lost).to(dtype), inside)
        tl.store(way_at + i, ((way + lost) * (1.0 - share)).to(dtype), inside)


def takes(direction: Direction, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether the kernels can work on the parameter ``p`` with this state."""
    if type(direction) not in (Adam, Momentum) or torch.compiler.is_compiling() or group["stochastic_rounding"]:
        return False
    dtypes = {"variance": torch.float32}
    return p.dtype in TYPES and all(
        t.dtype == dtypes.get(name, p.dtype) and t.is_contiguous() and type(t) in PLAIN_TENSORS
        for name, t in {"p": p, **state}.items()
    )


def measure(direction: Direction, bucket: Bucket, numbers: Numbers) -> dict[str, Tensor]:
    """The inner products by name, 0-dim."""
    table, chunks, options = _tables(direction, bucket)
    sums = torch.empty(len(chunks), len(PRODUCTS), dtype=torch.float32, device=chunks.device)
    scalars = _scalars(chunks.device, numbers.fresh)
    _measure[(len(chunks),)](table, chunks, table.shape[1], scalars, sums, options.pop("sign"), numbers.eps, **options)
    return dict(zip(PRODUCTS, sums.sum(0).unbind(), strict=True))


def update(direction: Direction, bucket: Bucket, numbers: Numbers, move: Move) -> None:
    """Take a step, or undo one."""
    table, chunks, options = _tables(direction, bucket)
    c, decay = numbers, 0.0 if move.decay is None else move.decay
    scalars = _scalars(chunks.device, c.fresh, c.first, c.rate, c.share, move.taken, move.back, decay)
    arguments = (table, chunks, table.shape[1], scalars, options.pop("sign"), c.beta1, c.beta2, c.eps)
    _update[(len(chunks),)](*arguments, **options)
    torch.autograd.graph.increment_version(bucket.params)


def _scalars(device: torch.device, *values: Scalar) -> Tensor:
    """Numbers of the host and of the device, side by side on the device."""
    return torch.stack(
        [v.float() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float32, device=device) for v in values]
    )


def _tables(direction: Direction, bucket: Bucket) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Addresses, shape (5, tensors); chunks as (tensor, first entry, entries), shape (chunks, 3); options of the kernels."""
    device = bucket.params[0].device
    if not bucket.tables:
        grads = [g.contiguous() if g.dtype in TYPES else g.float().contiguous() for g in bucket.grads]
        if len({g.dtype for g in grads}) > 1:
            grads = [g.float() for g in grads]
        momentum = bucket.state.get("mean") or bucket.state.get("momentum")
        columns = [bucket.params, grads, bucket.state["way"], momentum, bucket.state.get("variance")]
        addresses = tuple(tuple(t.data_ptr() for t in column) if column else (0,) * len(grads) for column in columns)
        aligned = all(address % 16 == 0 for column in addresses for address in column)
        bucket.tables.update(
            table=_uploaded(addresses, device),
            chunks=_chunks(tuple(p.numel() for p in bucket.params), device),
            grads=grads,  # copies must live as long as their addresses
            options={
                "sign": -1.0 if bucket.group["maximize"] else 1.0,
                "adam": isinstance(direction, Adam),
                "momentum": momentum is not None,
                "dtype": TYPES[bucket.params[0].dtype],
                "grad": TYPES[grads[0].dtype],
                "aligned": aligned,
                "CHUNK": CHUNK,
                "BLOCK": BLOCK,
            },
        )
    return bucket.tables["table"], bucket.tables["chunks"], dict(bucket.tables["options"])


@functools.lru_cache(maxsize=16)
def _uploaded(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table on the device; kept, since most steps find the same addresses."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [(k, i, min(CHUNK, n - i)) for k, n in enumerate(sizes) for i in range(0, n, CHUNK)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3).to(device)
