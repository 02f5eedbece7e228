"""The step on an accelerator: the same decision, written out as programs of one launch each.

`optimizer` holds the definition. Here its functions of a few numbers are fused, and the kernels take all buckets at once.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .cells import Verdict
from .directions import Move
from .hands import FOLLOWED, Hands
from .judge import Judge
from .pieces import SIZES, Bucket
from .reduce import Groups as Ranks
from .reduce import all_sum

log = logging.getLogger(__name__)

# The largest η·weight_decay of a step. Where gradients vanish, as on separable data, α may grow until this alone would
# bring all weights to zero within a few steps.
MOST_DECAY = 0.01


class Programs(NamedTuple):
    """A step's functions of a few numbers, each a launch.

    Attributes:
        before: what the kernels measure with, from the table and the counts.
        weigh: the parts of the sums, from the products of the buckets, the table and the shares.
        decide: the next table twice, what the kernels update with and the next counts; from sums, table, shares and counts.
        counts: the slots of each bucket's counts among the distinct ones.
    """

    before: Any
    weigh: Any
    decide: Any
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
        return alpha[bucket.cell] * 0.0 if bucket.idle else self._met(bucket, alpha, groups)

    def _met(self, bucket: Bucket, alpha: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """η that G_t is weighed with in the metric that it is measured in: that of the last step.

        Also for tensors that sat that step out: entries that were never met would be an infinite length, beside which no cosine
        is seen.
        """
        return alpha[bucket.cell] * groups["multiplier"][bucket.index]

    def _weigh(self, bucket: Bucket, products: Tensor, sizes: Tensor, shares: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """What a bucket adds to the sums of its cell, shape (columns,); see `Elra._measure`."""
        full = shares[bucket.index, 0]
        known, live = self.scope == "global" or not (bucket.new or bucket.idle), full > 0
        square = products[-1:]
        return torch.cat([products * self._metric(bucket, full, groups), square, square * known, square * live, sizes * live])

    def _metric(self, bucket: Bucket, full: Tensor, groups: dict[str, Tensor]) -> Tensor:
        """What the products of a group weigh: gradients by how far the group moves, ways by its inverse."""
        if "pp" in self.rule.needs:  # products along the last step, by how far that went
            return torch.zeros_like(full) if bucket.idle else groups["multiplier"][bucket.index]
        inverse = torch.where(full > 0, 1.0 / full, 0.0)
        by_name = {"gg": full, "gm": full, "mm": full, "gs": torch.ones_like(full), "ss": inverse}
        return torch.stack([by_name[need] for need in self._needs])

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
        positions = [triton.PRODUCTS.index(need) for need in needs]

        def counts_of(counts: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
            return [{name: counts[slot] for name, slot in own.items()} for own in slots]

        def before(table: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            alpha, rows = self._recall([], groups)["alpha"], []
            for bucket, own in zip(buckets, counts_of(counts), strict=True):
                met = self._met(bucket, alpha, groups)
                rows.append(triton.numbers(self.direction, bucket, own, Move(met, None, 1.0, 0.0, 1.0, met), table))
            return (torch.stack(rows),)

        def weigh(rows: Tensor, table: Tensor, shares: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            cells = len(self._recall([], groups)["alpha"])
            parts = {of: [table.new_zeros(len(needs) + 3 + len(SIZES))] * cells for of in dict.fromkeys(ranks)}
            for bucket, row in zip(buckets, rows.unbind(), strict=True):
                products = torch.stack([row[position] for position in positions])
                added = self._weigh(bucket, products, table.new_zeros(len(SIZES)), shares, groups)
                parts[bucket.ranks][bucket.cell] = parts[bucket.ranks][bucket.cell] + added
            return tuple(torch.stack(part) for part in parts.values())

        def decide(total: Tensor, table: Tensor, shares: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
            groups = dict(zip(names, table.unbind(1), strict=True))
            verdict = self._decide(total, groups, self._recall([], groups), shares, None)
            rows, after = [], dict(enumerate(counts))
            for bucket, own, places in zip(buckets, counts_of(counts), slots, strict=True):
                move = self._move(bucket, verdict, shares, groups)
                rows.append(triton.numbers(self.direction, bucket, own, move, table))
                after |= {places[name]: value for name, value in self.direction.count(bucket.group, own, move).items()}
            written = self._written(verdict, groups, shares)
            return written, written, torch.stack(rows), *after.values()

        cells, columns = len(self._of_cells(like[:, 0])), len(needs) + 3 + len(SIZES)
        counts = [like.new_ones(()) for _ in {slot for own in slots for slot in own.values()}]
        rows, shares, total = like.new_ones(len(buckets), 5), like.new_ones(len(like), 2), like.new_ones(cells, columns)
        numbers, table = like.new_ones(len(buckets), len(triton.NUMBERS)), torch.ones_like(like)
        parts = [torch.ones_like(total) for _ in dict.fromkeys(ranks)]
        try:
            from .kernels.fuse import Fused

            result = Programs(
                Fused(before, [table, *counts]),
                Fused(weigh, [rows, table, shares]),
                Fused(decide, [total, table, shares, *counts]),
                slots,
            )
            result.before([table, *counts], [numbers])
            result.weigh([rows, table, shares], parts)
            result.decide([total, table, shares, *counts], [table, torch.ones_like(table), numbers, *counts])
        except Exception as error:  # whatever the compiler has to say, the long way is open
            log.debug("elra_hf: the decision takes many launches: %s", error)
            return None
        return result

    def _launch(self, programs: Programs, buckets: list[Bucket], ranks: list[Ranks], shares: Tensor) -> None:
        """Measure, reduce, decide and update."""
        triton, table = kernels.accelerated(), self._table
        assert table is not None
        found: dict[int, Tensor] = {}
        for bucket, own in zip(buckets, programs.counts, strict=True):
            found |= {slot: bucket.counts[name] for name, slot in own.items()}
        counts = [found[slot] for slot in range(len(found))]
        numbers = table.new_empty(len(buckets), len(triton.NUMBERS))
        programs.before([table, *counts], [numbers])
        rows = triton.measure(self.direction, buckets, numbers)
        cells = len(self._of_cells(table[:, 0]))
        parts = {of: table.new_empty(cells, len(self._needs) + 3 + len(SIZES)) for of in dict.fromkeys(ranks)}
        programs.weigh([rows, table, shares], [*parts.values()])
        total = all_sum(parts)
        shown = torch.empty_like(table)
        programs.decide([total, table, shares, *counts], [table, shown, numbers, *counts])
        triton.update(self.direction, buckets, numbers)
        self._show_all(shown)
