"""The decision of a step: the rule adapts the rates, or the run restarts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .cells import Cells, Verdict
from .pieces import SIZES
from .rules import Decision
from .witness import NORMS, WITNESS, exploded_loss, exploded_norm, norms


class Judge(Cells):
    """What `Elra` makes of the measured products."""

    bounds: tuple[float, float]
    restart_factor: float

    @property
    def _needs(self) -> tuple[str, ...]:
        """The products that are measured before the step, in their order; the last is ``gg``."""
        return ("gg",) if self._passing else (*sorted(self.rule.needs - {"gg"}), "gg")

    def _decide(
        self,
        total: Tensor,
        groups: dict[str, Tensor],
        before: dict[str, Tensor],
        shares: Tensor,
        loss: float | Tensor | None,
    ) -> Verdict:
        """Let the rule adapt the rates; restart, or bound them."""
        needs, alpha = self._needs, before["alpha"]
        live = total[:, len(needs) + 2] != 0
        dots = dict(zip(needs, total.unbind(1), strict=False)) | {name: before[name] for name in self._passing}
        # whether the gradient points back to the average of the iterates, of which the paper's rule has none
        ahead = dots.get("gs", torch.zeros_like(alpha))
        sums = torch.cat([total.sum(0), torch.stack([self._unbounded(alpha, before["scale"]).sum(), ahead.sum()])])
        if self._apart:  # all restart, or none
            dist.all_reduce(sums, group=self.process_group)
        square, known, unbounded, overshot = sums[len(needs)], sums[len(needs) + 1], sums[-2], sums[-1] < 0
        memory = {name: before[name] for name in self._cell_names}
        young = memory["steps"] == 0  # ranks, groups and tensors may be born one by one
        for name, column in zip(SIZES, total[:, len(needs) + 3 :].unbind(1), strict=False):
            memory[name] = memory[name] + young * column
        logs, count, fans, entries, size = (memory[name] for name in SIZES)
        typical = torch.where(count > 0, logs / count, fans / entries).exp()
        memory["scale"] = torch.where(entries > 0, typical, memory["scale"])
        # weights that start at 0 count as what is drawn for others of their shape
        dots |= {"scale": memory["scale"], "size": torch.where(size > 0, size, entries * typical.square())}
        # before, nothing has moved that could say anything
        dots |= {"steps": memory["steps"]} | {name: ~young * said for name, said in self._weights(groups, shares).items()}
        decision: Decision = self.rule(alpha, dots, memory)

        some, finite = square != 0, torch.isfinite(square)
        there = [i for i, group in enumerate(self.param_groups) if not self._absent(group)] or [*range(len(shares))]
        # what all groups share, of one whose turn it is
        longest, lasting, calm, skipped, *seen = (groups[name][there[0]] for name in (*NORMS, "skipped", *WITNESS))
        moved = groups["multiplier"].unbind()
        moving = torch.stack([moved[i] for i in there]).amax() > 0
        exploded = exploded_norm(known, longest, lasting, calm, overshot) & moving & (unbounded > 0)
        # so that a step along the new gradient is no longer than one along the longest was
        shrink = torch.where(exploded, (longest / known).sqrt().clamp(max=self.restart_factor), self.restart_factor)
        back = exploded
        if loss is not None:
            value = torch.zeros_like(square) + (loss.detach().reshape(()).to(square) if isinstance(loss, Tensor) else loss)
            refused, *seen = exploded_loss(value, *seen)
            back = back | (refused & moving)
        bad = ~finite | back
        taken = some & ~bad
        # gradients that are not finite take from the rate while they last, once however many: broken rows must not bring it to
        # nothing
        healed = torch.where(skipped > 0, decision.alpha / self.restart_factor, decision.alpha)
        lowered = torch.where(finite | (skipped == 0), alpha * shrink, alpha)
        adapted = torch.where(bad, lowered, healed)
        adapted = torch.where(some & (live | young) & torch.isfinite(adapted), adapted, alpha)
        bounded = torch.where(some, adapted.clamp(*self.bounds), alpha)
        after = {**decision.memory, "steps": memory["steps"] + 1.0}
        memory |= {name: torch.where(taken & live, value, memory[name]) for name, value in after.items()}
        clamped, witness = (bounded != adapted).any(), dict(zip(WITNESS, seen, strict=True))
        lengths = dict(zip(NORMS, norms(square, known, longest, lasting, calm, moving), strict=True))
        return Verdict(bounded, alpha, decision.cos, memory, witness, lengths, taken, bad, back, clamped, square)

    def _unbounded(self, alpha: Tensor, scale: Tensor) -> Tensor:
        """1 for each cell in which a gradient that has grown makes a step that has grown, else 0.

        A direction whose entries are of order 1 bounds its steps by the rate. That is no bound where the rate is above the size
        of the weights, as it gets to be where gradients vanish and the squares of Adam are those of long ago.
        """
        if self.direction.explodes:
            return torch.ones_like(alpha)
        return ((alpha > scale) & (scale > 0)).to(alpha)

    def _weights(self, groups: dict[str, Tensor], shares: Tensor) -> dict[str, Tensor]:
        """What the last step of each cell says about the schedule's full rate, and the highest share so far, by name.

        All are in [0, 1], and 0 before there was a step. ``weight`` is the share itself, so that α does not undo a warm-up, and
        0 from half of the highest share so far on: smaller steps make cosines rise, and answering would undo the decay.
        ``fading`` falls until there. Under scope "global" those of the group that has most.
        """
        full, multiplier, peak = shares[:, 0], groups["multiplier"], groups["peak"]
        share, left = (multiplier / full).clamp(max=1.0), multiplier / peak
        weights = {"weight": share * (left > 0.5), "fading": share * (2.0 * left - 1.0).clamp(0.0, 1.0)}
        found = {name: said.nan_to_num(0.0) for name, said in {**weights, "reached": (peak / full).clamp(max=1.0)}.items()}
        if self.scope == "global":
            return {name: said.amax(0, keepdim=True) for name, said in found.items()}
        return {name: self._of_cells(said) for name, said in found.items()}
