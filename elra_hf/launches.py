"""The step on an accelerator: the same decision, written out as programs of one launch each.

`optimizer` holds the definition. Here its functions of a few numbers are fused, and the kernels take all buckets at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .cells import Verdict
from .directions import PRODUCTS, Move
from .hands import FOLLOWED, Hands
from .judge import Judge
from .pieces import SIZES, Bucket
from .reduce import Groups as Ranks
from .reduce import all_sum

log = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]

# The largest η·weight_decay of a step. Where gradients vanish, as on separable data, α may grow until this alone would
# bring all weights to zero within a few steps.
MOST_DECAY = 0.01


class Summed:
    """A function of sums over ranks as one launch, or two where parameters are sharded.

    Args:
        add: the parts of the sums that this rank has, one for each member of ``ranks``, from the first three of ``inputs``: the
            products of the buckets, the table and the shares.
        then: of the sums and the rest of ``inputs``.
        ranks: the groups of ranks of the parameters.
        inputs: examples, whose numbers mean nothing.
        outputs: examples of what ``then`` returns.
    """

    def __init__(self, add: Function, then: Function, ranks: list[Ranks], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        from .kernels.fuse import Fused

        rows, *rest = inputs
        self._parts = dict(zip(dict.fromkeys(ranks), add(*inputs[:3]), strict=True))
        self._add = Fused(add, inputs[:3]) if any(ranks) else None
        if self._add:
            rows = next(iter(self._parts.values()))
            self._add(inputs[:3], [torch.empty_like(part) for part in self._parts.values()])
            self._then = Fused(then, [rows, *rest])
        else:
            self._then = Fused(lambda rows, *rest: then(*add(rows, *rest[:2]), *rest), inputs)
        self._then([rows, *rest], outputs)

    def __call__(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Write the results to ``outputs``, which may be among ``inputs``."""
        rows, *rest = inputs
        if self._add:
            parts = {of: torch.empty_like(part) for of, part in self._parts.items()}
            self._add(inputs[:3], [*parts.values()])
            rows = all_sum(parts)
        self._then([rows, *rest], outputs)


class Programs(NamedTuple):
    """A step's functions of a few numbers.

    Attributes:
        decide: the next table twice, what the kernels update with, and the next counts; from the products of the buckets, the
            table, the shares and the counts.
        note: the next table, from the products taken in passing, the table and the shares; None where there are none.
        counts: the slots of each bucket's counts among the distinct ones.
    """

    decide: Summed
    note: Summed | None
    counts: tuple[dict[str, int], ...]


class Launches(Judge):
    """Functions of a few numbers that the step consists of, and the step made of them in few launches."""

    check_sync: bool
    _hands: Hands
    _captured: tuple[Any, ...] = ()  # what CUDA graphs read, and would be freed after the step
    # what the step before was like, and the programs for that: None before they are written, False where that failed
    _programs: tuple[Any, Programs | Literal[False] | None] = (None, None)

    # ---- the functions ----------------------------------------------------------------------------------------------------

    def _last(self, bucket: Bucket, alpha: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """η of the last step, 0 where that did not move these tensors."""
        return alpha[bucket.cell] * (0.0 if bucket.idle else groups["multiplier"][bucket.index])

    def _parts(self, ranks: list[Ranks], like: Tensor, columns: int) -> dict[Ranks, Tensor]:
        """Room for the sums of each cell, by the groups of ranks that hold the rest of them, shape (cells, columns).

        Every rank enters every collective, also with nothing to add.
        """
        return {of: like.new_zeros(len(self._of_cells(like[:, 0])), columns) for of in dict.fromkeys(ranks)}

    def _weigh(self, bucket: Bucket, products: Tensor, sizes: Tensor, shares: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """What a bucket adds to the sums of its cell, shape (columns,); see `Elra._measure`."""
        full = shares[bucket.index, 0]
        known, live = self.scope == "global" or not (bucket.new or bucket.idle), full > 0
        square = products[-1:]
        metric = self._metric(bucket, self._needs, full, groups)
        return torch.cat([products * metric, square, square * known, square * live, sizes * live])

    def _note(self, bucket: Bucket, products: Tensor, shares: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """What a bucket adds to the `_passing` of its cell, from the `PRODUCTS` taken in passing."""
        found = [products[PRODUCTS.index(name)] for name in self._passing]
        return torch.stack(found) * self._metric(bucket, self._passing, shares[bucket.index, 0], groups) if found else products

    def _noted(self, total: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the next step sees of the products taken in passing, by name, each of shape (cells,).

        Of a gradient that is not taken nothing: it counts as 0.
        """
        found = dict(zip(self._passing, total.unbind(1), strict=True))
        return {name: torch.where(found["gg"] != 0, value, before[name]) for name, value in found.items()}

    def _metric(self, bucket: Bucket, names: tuple[str, ...], full: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """What the products of a group weigh: gradients by how far the group moves, ways by its inverse."""
        if "pp" in self.rule.needs:  # products along the last step, by how far that went
            return torch.zeros_like(full) if bucket.idle else groups["multiplier"][bucket.index]
        inverse = torch.where(full > 0, 1.0 / full, 0.0)
        by_name = {"gg": full, "gm": full, "mm": full, "gs": torch.ones_like(full), "ss": inverse}
        return torch.stack([by_name[name] for name in names])

    def _move(self, bucket: Bucket, verdict: Verdict, shares: Tensor, groups: dict[str, Tensor]) -> Move:
        """The verdict for one bucket, in 0-dim tensors."""
        rate = torch.where(verdict.taken, verdict.alpha[bucket.cell] * shares[bucket.index, 1], 0.0)
        lost = -torch.expm1(-(rate * bucket.group["weight_decay"]).clamp(max=MOST_DECAY))
        last = self._last(bucket, verdict.last, groups)
        taken, back, kept = (flag.to(rate) for flag in (verdict.taken, verdict.back, ~verdict.bad))
        return Move(rate, lost if bucket.group["weight_decay"] else None, taken, back, kept, last)

    # ---- in few launches --------------------------------------------------------------------------------------------------

    def _fused(self, buckets: list[Bucket], ranks: list[Ranks]) -> Programs | None:
        """The programs of this step; None where it has to take the long way.

        They are written for what the step before was like, too: with a schedule of weight decay or momentum each step would
        want programs of its own.
        """
        plan, table = self._plan, self._table
        steady = plan is not None and plan.buckets is buckets and not any(bucket.new for bucket in buckets)
        if not (buckets and steady and table is not None and table.dtype == torch.float32) or self.check_sync or self._apart:
            return None
        if any(bucket.kernels != "triton" or bucket.params[0].device != table.device for bucket in buckets):
            return None
        slots: dict[int, int] = {}
        counts = tuple(
            {name: slots.setdefault(id(count), len(slots)) for name, count in bucket.counts.items()} for bucket in buckets
        )
        key = (
            (self.rule, self.bounds, self.restart_factor),
            tuple(dict.fromkeys(ranks)),
            tuple((b.index, b.cell, b.idle, b.ranks, tuple(c.values())) for b, c in zip(buckets, counts, strict=True)),
            [(self._absent(g), *(g.get(name) for name in self.defaults if name != "lr")) for g in self.param_groups],
        )
        if self._programs[0] != key:
            self._programs = key, None
        elif self._programs[1] is None:
            self._programs = key, self._write(buckets, ranks, counts) or False
        return self._programs[1] or None

    def _require_repeatable(self, few: bool) -> None:
        """Refuse to be captured where a replay would not be the step that is meant.

        Args:
            few: the step runs in few launches.
        """
        table = self._table
        lrs = [group["lr"] for group in self.param_groups]
        reason = None
        if not few:
            reason = (
                "this step does not run in few launches. Take three steps like it before the capture; there are no such "
                'launches with loss=, check_sync=True, scope="tensor", in float64 or without Triton'
            )
        elif any(isinstance(lr, Tensor) and table is not None and lr.device != table.device for lr in lrs):
            reason = "lr lies on another device and would not be read again. Give lr=torch.tensor(1e-5, device='cuda')"
        elif any("initial_lr" in group and not isinstance(group["lr"], Tensor) for group in self.param_groups):
            reason = (
                "a schedule writes lr as a float, which a graph would not read again. Give the optimizer "
                "lr=torch.tensor(1e-5, device='cuda'), which torch's schedulers fill in place"
            )
        elif FOLLOWED in self._hands.marks.values():
            reason = "somebody else writes to the parameters between steps, and a replay would not see that"
        if reason is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph here: {reason}. Or capture the forward and "
                "backward pass only, and call step() after the replay"
            )

    def _write(self, buckets: list[Bucket], ranks: list[Ranks], slots: tuple[dict[str, int], ...]) -> Programs | None:
        """Trace the functions, and try the programs on numbers of no meaning."""
        triton, like, names, needs = kernels.accelerated(), self._table, self._names, self._needs
        assert like is not None
        positions = [PRODUCTS.index(need) for need in needs]

        def weigh(rows: Tensor, table: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            no_sizes = table.new_zeros(len(SIZES))

            def row_of(bucket: Bucket, row: Tensor) -> Tensor:
                return self._weigh(bucket, torch.stack([row[k] for k in positions]), no_sizes, shares, groups)

            return self._added(buckets, ranks, shares, list(map(row_of, buckets, rows.unbind())))

        def decide(total: Tensor, table: Tensor, shares: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            verdict = self._decide(total, groups, self._recall([], groups), shares, None)
            rows, after = [], dict(enumerate(counts))
            for bucket, places in zip(buckets, slots, strict=True):
                own = {name: counts[slot] for name, slot in places.items()}
                move = self._move(bucket, verdict, shares, groups)
                rows.append(triton.numbers(self.direction, bucket, own, move, table))
                after |= {places[name]: value for name, value in self.direction.count(bucket.group, own, move).items()}
            written = self._written(verdict, groups, shares)
            return written, written, torch.stack(rows), *after.values()

        def weigh_passing(rows: Tensor, table: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            found = [self._note(bucket, row, shares, groups) for bucket, row in zip(buckets, rows.unbind(), strict=True)]
            return self._added(buckets, ranks, shares, found)

        def note(total: Tensor, table: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            noted = self._noted(total, self._recall([], groups))
            groups |= {name: value.expand(len(table)) for name, value in noted.items()}
            return (torch.stack([groups[name] for name in names], 1),)

        rows, shares, table = like.new_ones(len(buckets), len(PRODUCTS)), like.new_ones(len(like), 2), torch.ones_like(like)
        counts = [like.new_ones(()) for _ in {slot for own in slots for slot in own.values()}]
        numbers = like.new_ones(len(buckets), len(triton.NUMBERS))
        try:
            decides = Summed(weigh, decide, ranks, [rows, table, shares, *counts], [table, table.clone(), numbers, *counts])
            notes = Summed(weigh_passing, note, ranks, [rows, table, shares], [table]) if self._passing else None
        except Exception as error:  # whatever the compiler has to say, the long way is open
            log.debug("elra_hf: the decision takes many launches: %s", error)
            return None
        return Programs(decides, notes, slots)

    def _added(self, buckets: list[Bucket], ranks: list[Ranks], shares: Tensor, rows: list[Tensor]) -> tuple[Tensor, ...]:
        """The sums of each cell of what the buckets add, by the groups of ranks, without writing to a tensor."""
        cells = len(self._of_cells(shares[:, 0]))
        parts = {of: [torch.zeros_like(rows[0])] * cells for of in dict.fromkeys(ranks)}
        for bucket, row in zip(buckets, rows, strict=True):
            parts[bucket.ranks][bucket.cell] = parts[bucket.ranks][bucket.cell] + row
        return tuple(torch.stack(part) for part in parts.values())

    def _launch(self, programs: Programs, buckets: list[Bucket], shares: Tensor) -> None:
        """Measure, reduce, decide and update."""
        triton, table = kernels.accelerated(), self._table
        assert table is not None
        found: dict[int, Tensor] = {}
        for bucket, own in zip(buckets, programs.counts, strict=True):
            found |= {slot: bucket.counts[name] for name, slot in own.items()}
        counts = [found[slot] for slot in range(len(found))]
        rows = triton.measure(self.direction, buckets)
        shown = torch.empty_like(table)
        numbers = table.new_empty(len(buckets), len(triton.NUMBERS))
        programs.decide([rows, table, shares, *counts], [table, shown, numbers, *counts])
        rows = triton.update(self.direction, buckets, numbers)
        if programs.note:
            programs.note([rows, table, shares], [table])
        self._show_all(shown)
