"""The kernels for accelerators, in Triton: two launches measure and one updates, whatever the number of buckets and tensors.

That of Adam takes the products while it updates, with a launch more to sum them up; it measures the gradient's square.

The tensors are found through a table of addresses, and cut into chunks of `CHUNK` entries, one a program. Sums are taken chunk
by chunk and then over the chunks, so that they are the same in every run. Numbers that depend on the run lie on the device.
Tensors of another dtype take launches of their own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import PRODUCTS, Counts, Direction, Move
from ..pieces import MIX, SALT, SEED, SPREAD, Bucket
from .native import fits
from .sheets import Layout, Sheet, sheets_of

BLOCK = 2**10
# What a bucket's row of numbers holds, in the order of the kernels; see `Numbers` and `Move`.
NUMBERS = ("fresh", "first", "rate", "share", "taken", "back", "decay", "beta1", "beta2", "eps", "sign", "step")
WIDTH = tl.constexpr(len(NUMBERS))
SPREADS = tl.constexpr((SPREAD, SEED, SALT, *MIX))


@triton.jit
def _chunk(table, chunks, tensors, place):
    """A chunk's tensor, first entry, number of entries, bucket and place; and whether it is loaded 16 bytes at a time.

    The last has to be known where the loop is compiled.
    """
    row = chunks + 5 * place
    k, start, n = tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    return k, start, n, tl.load(row + 3), tl.load(row + 4), (tl.load(table + 5 * tensors + k) != 0) & (n % 16 == 0)


@triton.jit
def _column(table, column: tl.constexpr, tensors, k, start, dtype: tl.constexpr, wide: tl.constexpr):
    """Where the chunk begins in one of the columns."""
    pointer = tl.load(table + column * tensors + k).to(tl.pointer_type(dtype)) + start
    return tl.multiple_of(pointer, 16) if wide else pointer


@triton.jit
def _columns(table, tensors, k, start, n, dtype: tl.constexpr, grad: tl.constexpr, of_way: tl.constexpr, wide: tl.constexpr):
    """The number of entries, and where the chunk begins in x, G, the way, m and v."""
    if wide:
        n = n // 16 * 16  # which the compiler understands
    p = _column(table, 0, tensors, k, start, dtype, wide)
    g = _column(table, 1, tensors, k, start, grad, wide)
    way = _column(table, 2, tensors, k, start, of_way, wide)
    m = _column(table, 3, tensors, k, start, dtype, wide)
    return n, p, g, way, m, _column(table, 4, tensors, k, start, tl.float32, wide)


@triton.jit
def _measure(
    table, chunks, tensors, signs, sums,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, of_way: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The five products of one chunk, of Adam ‖G_t‖² alone, to ``sums``, shape (chunks, 5)."""
    k, start, n, b, place, wide = _chunk(table, chunks, tensors, tl.program_id(0))
    sign, to = tl.load(signs + b), sums + 5 * place
    if wide:
        _measure_chunk(table, tensors, k, start, n, sign, to, adam, momentum, dtype, grad, of_way, True, BLOCK)
    else:
        _measure_chunk(table, tensors, k, start, n, sign, to, adam, momentum, dtype, grad, of_way, False, BLOCK)


@triton.jit
def _measure_chunk(
    table, tensors, k, start, n, sign, to,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, of_way: tl.constexpr,
    wide: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, _, g_at, way_at, m_at, _ = _columns(table, tensors, k, start, n, dtype, grad, of_way, wide)
    gg = tl.zeros((BLOCK,), tl.float32)
    gm = tl.zeros((BLOCK,), tl.float32)
    gs = tl.zeros((BLOCK,), tl.float32)
    mm = tl.zeros((BLOCK,), tl.float32)
    ss = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < n
        g = sign * tl.load(g_at + i, inside, 0.0).to(tl.float32)
        gg += g * g
        if not adam:
            way = tl.load(way_at + i, inside, 0.0).to(tl.float32)
            gs += g * way
            ss += way * way
            if momentum:
                m = tl.load(m_at + i, inside, 0.0).to(tl.float32)
                gm += g * m
                mm += m * m
    _store(to, gg, gm, gs, mm, ss)


@triton.jit
def _fours(x, BLOCK: tl.constexpr):
    """The sums of four neighbours, which lie in one thread: fewer sums to hold."""
    return tl.sum(tl.reshape(x, (BLOCK // 4, 4)), 1)


@triton.jit
def _store(to, gg, gm, gs, mm, ss):
    """The sums of a chunk."""
    tl.store(to, tl.sum(gg))
    tl.store(to + 1, tl.sum(gm))
    tl.store(to + 2, tl.sum(gs))
    tl.store(to + 3, tl.sum(mm))
    tl.store(to + 4, tl.sum(ss))


@triton.jit
def _total(sums, bounds, rows, BLOCK: tl.constexpr):
    """The sums of the chunks of one bucket, to its row of ``rows``, shape (buckets, 5)."""
    b = tl.program_id(0)
    start, stop = tl.load(bounds + 2 * b), tl.load(bounds + 2 * b + 1)
    column = tl.arange(0, 8)
    total = tl.zeros((BLOCK, 8), tl.float32)
    for first in range(start, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = (i < stop)[:, None] & (column < 5)[None, :]
        total += tl.load(sums + i[:, None] * 5 + column[None, :], inside, 0.0)
    tl.store(rows + 5 * b + column, tl.sum(total, 0), column < 5)


@triton.jit
def _rounded(x, i, seed, salt: tl.constexpr, dtype: tl.constexpr, chance: tl.constexpr):
    """In that dtype, bfloat16 up or down by chance; see `pieces.rounded`."""
    if chance and dtype == tl.bfloat16:
        h = i * SPREADS[0] + (seed * SPREADS[1] + salt * SPREADS[2])
        h = (h ^ ((h >> 16) & 0xFFFF)) * SPREADS[3]
        h = (h ^ ((h >> 13) & 0x7FFFF)) * SPREADS[4]
        up = (x.to(tl.int32, bitcast=True) + ((h ^ (h >> 16)) & 0xFFFF)) & -65536
        up = up.to(tl.float32, bitcast=True)
        x = tl.where((tl.abs(x) < float("inf")) & (tl.abs(up) < float("inf")), up, x)
    return x.to(dtype)


@triton.jit
def _update(
    table, chunks, tensors, numbers, sums,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, of_way: tl.constexpr,
    chance: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step of one chunk, as `directions` does; a gradient that is not taken counts as 0.

    That of Adam takes the five products, to ``sums``. From the last chunk to the first, since what was measured last is in the
    cache.
    """
    k, start, n, b, place, wide = _chunk(table, chunks, tensors, tl.num_programs(0) - 1 - tl.program_id(0))
    mine, to = numbers + WIDTH * b, sums + 5 * place
    if wide:
        _update_chunk(table, tensors, k, start, n, mine, to, adam, momentum, dtype, grad, of_way, chance, True, BLOCK)
    else:
        _update_chunk(table, tensors, k, start, n, mine, to, adam, momentum, dtype, grad, of_way, chance, False, BLOCK)


@triton.jit
def _update_chunk(
    table, tensors, k, start, n, mine, to,
    adam: tl.constexpr, momentum: tl.constexpr, dtype: tl.constexpr, grad: tl.constexpr, of_way: tl.constexpr,
    chance: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, p_at, g_at, way_at, m_at, v_at = _columns(table, tensors, k, start, n, dtype, grad, of_way, wide)
    taken, back, decay = tl.load(mine + 4), tl.load(mine + 5), tl.load(mine + 6)
    fresh, first = tl.load(mine) * taken, tl.load(mine + 1) * taken
    rate, share = tl.load(mine + 2), tl.load(mine + 3) * taken
    step = tl.load(mine + 11)
    seed, reach = step.to(tl.int32), 1.0 + 2.0 / tl.maximum(step, 1.0)  # as `Adam._reach`, of power 1
    beta1, beta2, eps, sign = tl.load(mine + 7), tl.load(mine + 8), tl.load(mine + 9), tl.load(mine + 10)
    gg = tl.zeros((BLOCK // 4,), tl.float32)
    gm = tl.zeros((BLOCK // 4,), tl.float32)
    gs = tl.zeros((BLOCK // 4,), tl.float32)
    mm = tl.zeros((BLOCK // 4,), tl.float32)
    ss = tl.zeros((BLOCK // 4,), tl.float32)
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside, at = i < n, (start + i).to(tl.int32)
        g = tl.where(taken > 0, sign * tl.load(g_at + i, inside, 0.0).to(tl.float32), 0.0)
        p = tl.load(p_at + i, inside, 0.0).to(tl.float32)
        way = tl.load(way_at + i, inside, 0.0).to(tl.float32)
        p += back * (reach if adam else 1.0) * way
        way *= 1.0 - back
        lost = tl.where(tl.abs(p) < float("inf"), decay * p, 0.0)
        if adam:
            m = tl.load(m_at + i, inside, 0.0).to(tl.float32) * (1.0 - back)
            v = tl.load(v_at + i, inside, 0.0)
            v = v * (1.0 - fresh) + fresh * g * g
            metric = tl.sqrt(v) + eps
            inverse = 1.0 / metric
            gg += _fours(g * g * inverse, BLOCK)
            gm += _fours(g * m * inverse, BLOCK)
            gs += _fours(g * way, BLOCK)
            mm += _fours(m * m * inverse, BLOCK)
            ss += _fours(way * way * metric, BLOCK)
            m += (1.0 - beta1) * taken * (g - m)
            lost += rate * m * inverse
            tl.store(m_at + i, _rounded(m, at, seed, 2, dtype, chance), inside)
            tl.store(v_at + i, v, inside)
        elif momentum:
            m = tl.load(m_at + i, inside, 0.0).to(tl.float32)
            m += first * (g - m)
            lost += rate * (beta2 * m + (1.0 - beta2) * g)
            m += (1.0 - beta1) * taken * (g - m)
            tl.store(m_at + i, _rounded(m, at, seed, 2, dtype, chance), inside)
        else:
            lost += rate * g
        tl.store(p_at + i, _rounded(p - lost, at, seed, 0, dtype, chance), inside)
        tl.store(way_at + i, _rounded((way + lost) * (1.0 - share), at, seed, 1, of_way, chance), inside)
    if adam:
        _store(to, gg, gm, gs, mm, ss)


def takes(direction: Direction, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether the kernels can work on the parameter ``p`` with this state."""
    return fits(direction, p, state, group) and not torch.compiler.is_compiling()


def numbers(direction: Direction, bucket: Bucket, counts: Counts, move: Move, like: Tensor) -> Tensor:
    """What the kernels multiply with in one bucket, shape (len(`NUMBERS`),), in dtype and device of ``like``."""
    c = direction.numbers(bucket.group, counts, move.rate)
    decay, sign = 0.0 if move.decay is None else move.decay, -1.0 if bucket.group["maximize"] else 1.0
    values = (c.fresh, c.first, c.rate, c.share, move.taken, move.back, decay, c.beta1, c.beta2, c.eps, sign, counts["step"])
    return torch.stack([v.to(like) if isinstance(v, Tensor) else like.new_full((), v) for v in values])


def measure(direction: Direction, buckets: Sequence[Bucket]) -> Tensor:
    """`PRODUCTS` of each bucket, shape (buckets, 5), of Adam ‖G_t‖² alone and zeros."""
    sheets, layout = sheets_of(direction, buckets)
    sums = _sums(sheets, layout)
    for sheet in sheets:
        arguments = (sheet.table, sheet.chunks, sheet.table.shape[1], layout.signs, sums)
        options = {name: value for name, value in sheet.options.items() if name != "chance"}
        _measure[(len(sheet.chunks),)](*arguments, **options, BLOCK=BLOCK)
    return _rows(sums, layout)


def update(direction: Direction, buckets: Sequence[Bucket], numbers: Tensor) -> Tensor:
    """Take a step, or undo one; `PRODUCTS` of each bucket, shape (buckets, 5), where they are taken in passing."""
    sheets, layout = sheets_of(direction, buckets)
    sums = _sums(sheets, layout) if direction.passing else layout.signs  # of which nothing is written
    for sheet in sheets:
        arguments = (sheet.table, sheet.chunks, sheet.table.shape[1], numbers, sums)
        _update[(len(sheet.chunks),)](*arguments, **sheet.options, BLOCK=BLOCK)
    for bucket in buckets:
        torch.autograd.graph.increment_version(bucket.params)
    return _rows(sums, layout) if direction.passing else sums.new_empty(len(buckets), 0)


def _sums(sheets: Sequence[Sheet], layout: Layout) -> Tensor:
    """Room for the products of all chunks."""
    return layout.signs.new_empty(sum(len(sheet.chunks) for sheet in sheets), len(PRODUCTS))


def _rows(sums: Tensor, layout: Layout) -> Tensor:
    """The products of each bucket."""
    rows = sums.new_empty(len(layout.bounds), len(PRODUCTS))
    _total[(len(rows),)](sums, layout.bounds, rows, BLOCK=512)
    return rows
