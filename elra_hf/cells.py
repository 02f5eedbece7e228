"""A cell is what shares one rate: everything, a group or a tensor, by the scope. Their numbers, from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gather import Gatherer
from .groups import is_wide
from .pieces import Bucket
from .reduce import local

# What is left of the longest gradient's square after a step.
NORM_MEMORY = 0.98


class Verdict(NamedTuple):
    """What becomes of a step.

    Attributes:
        alpha: the rates of the step, shape (cells,).
        last: those of the step before, shape (cells,).
        cos: the cosines that the rule saw, shape (cells,).
        memory: what the cells keep, by name, each of shape (cells,).
        taken: G_t is finite, not zero, and no explosion; 0-dim bool.
        bad: a restart; 0-dim bool.
        back: the restart undoes what led to it; 0-dim bool.
        clamped: a rate met its bounds; 0-dim bool.
        square: ‖G_t‖² in the metric of the direction, 0-dim.
    """

    alpha: Tensor
    last: Tensor
    cos: Tensor
    memory: dict[str, Tensor]
    taken: Tensor
    bad: Tensor
    back: Tensor
    clamped: Tensor
    square: Tensor


class Cells(Gatherer):
    """What `Elra` remembers of each rate: read before the decision, written after the update."""

    def _absent(self, group: dict[str, Any]) -> bool:
        """Whether the step leaves a group alone: ZeRO-3 empties all but the one whose turn it is."""
        return not group["params"] and self.scope != "global" and self.dealt is None

    def _enter(self, params: list[Tensor], buckets: list[Bucket]) -> list[tuple[Tensor, Tensor]]:
        """Bring the groups' numbers to the device of the step; return full and present share of each group there."""
        if not params and self.dealt is not None:
            params = [self.dealt]
        device = buckets[0].params[0].device if buckets else local(params[0]).device
        dtype = torch.float64 if any(map(is_wide, params)) else torch.float32
        for group in self.param_groups:
            for name in ("alpha", *self._scalars):  # numbers, where a wrapper has loaded them past load_state_dict
                group[f"elra_{name}"] = torch.as_tensor(group[f"elra_{name}"], device=device, dtype=dtype)
        shares = self._shares()
        zero = torch.zeros((), device=device, dtype=dtype)
        return [(zero + full, zero + now) for full, now in shares]

    def _recall(self, params: list[Tensor]) -> dict[str, Tensor]:
        """α and what else the cells keep, by name, each of shape (cells,)."""
        names = ["alpha", *self._cell_names]
        of_groups = {name: self._of_cells([group[f"elra_{name}"] for group in self.param_groups]) for name in names}
        if self.scope != "tensor" or not params:
            return of_groups
        of_groups["steps"] = torch.zeros_like(of_groups["steps"])  # of what has no state yet
        common = torch.stack(list(of_groups.values()), 1)
        rows = [self.state[p]["elra"].to(row) if self.state.get(p) else row for p, row in zip(params, common, strict=True)]
        return dict(zip(names, torch.stack(rows).unbind(1), strict=True))

    def _of_cells(self, values: list[Tensor]) -> Tensor:
        """Values of the groups as values of the cells, shape (cells,)."""
        if self.scope == "global":
            return values[0].view(1)
        if self.scope == "group":
            return torch.stack(values)
        return torch.cat([value.expand(len(group["params"])) for value, group in zip(values, self.param_groups, strict=True)])

    def _publish(self, params: list[Tensor], verdict: Verdict, shares: list[tuple[Tensor, Tensor]]) -> None:
        """Write rates and memory to where users, checkpoints and the next step find them."""
        cells = {"alpha": verdict.alpha, **verdict.memory}
        start, (taken, bad) = 0, (verdict.taken, verdict.bad)
        for index, (group, (_, now)) in enumerate(zip(self.param_groups, shares, strict=True)):
            if self._absent(group):
                continue
            if self.scope == "tensor" and not group["params"]:
                own, seen = {}, group["elra_cos"]
            elif self.scope == "tensor":
                stop = start + len(group["params"])
                rows = torch.stack([value[start:stop] for value in cells.values()], 1)
                for p, row in zip(params[start:stop], rows.unbind(), strict=True):
                    if self.state.get(p):
                        self.state[p]["elra"] = row.clone()
                seen = verdict.cos[start:stop].mean()
                born = (verdict.memory["steps"][start:stop] > 0).to(verdict.alpha)
                means = {name: (born * value[start:stop]).sum() / born.sum() for name, value in cells.items()}
                means["alpha"] = ((born * verdict.alpha[start:stop].log()).sum() / born.sum()).exp()
                own = {name: torch.where(born.any(), mean, group[f"elra_{name}"]) for name, mean in means.items()}
                start = stop
            else:
                cell = self._cell(index, 0)
                own, seen = {name: value[cell] for name, value in cells.items()}, verdict.cos[cell]
            peak = torch.maximum(group["elra_peak"], now)
            longest = torch.maximum(NORM_MEMORY * group["elra_longest"], verdict.square)
            own |= {
                "cos": torch.where(taken, seen, group["elra_cos"]),
                "restarts": group["elra_restarts"] + bad,
                "skipped": (~torch.isfinite(verdict.square)).to(verdict.square),
                "clamps": group["elra_clamps"] + verdict.clamped,
                "longest": torch.where(taken, longest, group["elra_longest"]),
                "peak": torch.where(taken, peak, group["elra_peak"]),
                "multiplier": torch.where(bad, 0.0, torch.where(taken, now, group["elra_multiplier"])),
            }
            group |= {f"elra_{name}": value for name, value in own.items()}
            group["elra_calls"] = min(group["elra_calls"] + 1, 2)
            self._show(group)
