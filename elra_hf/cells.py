"""A cell is what shares one rate: everything, a group or a tensor, by the scope. Their numbers, from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gather import Gatherer
from .groups import WIDE
from .pieces import Bucket, is_captured
from .reduce import local


class Verdict(NamedTuple):
    """What becomes of a step.

    Attributes:
        alpha: the rates of the step, shape (cells,).
        last: those of the step before, shape (cells,).
        cos: the cosines that the rule saw, shape (cells,).
        memory: what the cells keep, by name, each of shape (cells,).
        witness: what all groups keep of the losses, by name, 0-dim.
        lengths: what they keep of the gradients' norms, by name, 0-dim.
        taken: G_t is finite, not zero, and no explosion; 0-dim bool.
        bad: a restart; 0-dim bool.
        back: the restart undoes what led to it; 0-dim bool.
        clamped: a rate met its bounds; 0-dim bool.
        square: ‖G_t‖², 0-dim.
    """

    alpha: Tensor
    last: Tensor
    cos: Tensor
    memory: dict[str, Tensor]
    witness: dict[str, Tensor]
    lengths: dict[str, Tensor]
    taken: Tensor
    bad: Tensor
    back: Tensor
    clamped: Tensor
    square: Tensor


class Cells(Gatherer):
    """What `Elra` remembers of each rate: read before the decision, written after the update."""

    # What the groups keep, shape (groups, names); their entries are views of it, so that a step writes all of them at once.
    _table: Tensor | None = None
    _views: tuple[dict[str, Tensor], ...] = ()
    _uploaded: tuple[Any, Tensor] | None = None

    @property
    def _names(self) -> tuple[str, ...]:
        """The columns of the table."""
        return ("alpha", *self._scalars)

    def _absent(self, group: dict[str, Any]) -> bool:
        """Whether the step leaves a group alone: ZeRO-3 empties all but the one whose turn it is."""
        return not group["params"] and self.scope != "global" and self.dealt is None

    def _enter(self, params: list[Tensor], buckets: list[Bucket]) -> tuple[dict[str, Tensor], Tensor]:
        """Bring the groups' numbers to the device of the step.

        Returns:
            What they keep, by name, each of shape (groups,); and their full and present shares, shape (groups, 2).
        """
        if not params and self.dealt is not None:
            params = [self.dealt]
        device = buckets[0].params[0].device if buckets else local(params[0]).device
        dtype = torch.float64 if {p.dtype for p in params} & WIDE else torch.float32
        groups, table = self.param_groups, self._table
        known = len(groups) == len(self._views) and all(
            group.get(key) is view for group, views in zip(groups, self._views, strict=True) for key, view in views.items()
        )
        if table is None or not known or table.device != device or table.dtype != dtype:
            rows = []
            for group in groups:  # numbers, where a wrapper has loaded them past load_state_dict
                values = [torch.as_tensor(group[f"elra_{name}"], device=device, dtype=dtype) for name in self._names]
                rows.append(torch.stack(values))
            self._table = table = torch.stack(rows)
            views: list[dict[str, Tensor]] = []
            for group, row in zip(groups, table.unbind(), strict=True):
                entries = dict(zip(self._names, row.unbind(), strict=True))
                views.append({f"elra_{name}": view for name, view in entries.items()})
                group |= views[-1]
            self._views = tuple(views)
        return dict(zip(self._names, table.unbind(1), strict=True)), self._on_device(self._shares(), table)

    def _on_device(self, pairs: list[tuple[Any, Any]], like: Tensor) -> Tensor:
        """Pairs of numbers or 0-dim tensors as a tensor of shape (pairs, 2), without waiting for its device."""
        if is_captured() or any(isinstance(value, Tensor) for pair in pairs for value in pair):
            zero = like.new_zeros(())
            return torch.stack([torch.stack([zero + full, zero + now]) for full, now in pairs])
        key = (pairs, like.device, like.dtype)
        if self._uploaded is None or self._uploaded[0] != key:
            result = torch.tensor(pairs, dtype=like.dtype, device="cpu")
            if like.device.type == "cuda":
                result = result.pin_memory()
            self._uploaded = key, result.to(like.device, non_blocking=True)
        return self._uploaded[1]

    def _recall(self, params: list[Tensor], groups: dict[str, Tensor]) -> dict[str, Tensor]:
        """α and what else the cells keep, by name, each of shape (cells,)."""
        names = ["alpha", *self._cell_names]
        of_groups = {name: self._of_cells(groups[name]) for name in names}
        if self.scope != "tensor" or not params:
            return of_groups
        for name in ("steps", *self._passing):  # of what has no state yet
            of_groups[name] = torch.zeros_like(of_groups[name])
        common = torch.stack(list(of_groups.values()), 1)
        rows = [self.state[p]["elra"].to(row) if self.state.get(p) else row for p, row in zip(params, common, strict=True)]
        return dict(zip(names, torch.stack(rows).unbind(1), strict=True))

    def _of_cells(self, values: Tensor) -> Tensor:
        """Values of the groups as values of the cells, shape (cells,)."""
        if self.scope == "global":
            return values[:1]
        if self.scope == "group":
            return values
        sizes = [len(group["params"]) for group in self.param_groups]
        return torch.cat([value.expand(size) for value, size in zip(values.unbind(), sizes, strict=True)])

    def _of_groups(self, verdict: Verdict, groups: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the groups keep of their cells after the step, by name, each of shape (groups,)."""
        cells = {"alpha": verdict.alpha, **verdict.memory, "cos": verdict.cos}
        if self.scope != "tensor":
            return {name: value.expand(len(self.param_groups)) for name, value in cells.items()}
        rows, start = [], 0
        for index, group in enumerate(self.param_groups):
            part = slice(start, start := start + len(group["params"]))
            if not group["params"]:
                rows.append([groups[name][index] for name in cells])
                continue
            born = (verdict.memory["steps"][part] > 0).to(verdict.alpha)
            means = {name: (born * value[part]).sum() / born.sum() for name, value in cells.items()}
            means["alpha"] = ((born * verdict.alpha[part].log()).sum() / born.sum()).exp()
            own = {name: torch.where(born.any(), mean, groups[name][index]) for name, mean in means.items()}
            rows.append([*(own | {"cos": verdict.cos[part].mean()}).values()])
        return dict(zip(cells, torch.stack([torch.stack(row) for row in rows]).unbind(1), strict=True))

    def _written(self, verdict: Verdict, groups: dict[str, Tensor], shares: Tensor) -> Tensor:
        """The table after the step, shape (groups, names)."""
        own, taken, now = self._of_groups(verdict, groups), verdict.taken, shares[:, 1]
        own |= {
            **{name: value.expand_as(now) for name, value in verdict.witness.items()},
            "cos": torch.where(taken, own["cos"], groups["cos"]),
            "restarts": groups["restarts"] + verdict.bad,
            # a gradient of zeros teaches nothing, and heals nothing
            "skipped": torch.where(verdict.square != 0, (~torch.isfinite(verdict.square)).to(now), groups["skipped"]),
            "clamps": groups["clamps"] + verdict.clamped,
            **{name: torch.where(taken, value, groups[name]) for name, value in verdict.lengths.items()},
            "peak": torch.where(taken, torch.maximum(groups["peak"], now), groups["peak"]),
            "multiplier": torch.where(verdict.bad, 0.0, torch.where(taken, now, groups["multiplier"])),
        }
        own["effective_lr"] = own["alpha"] * own["multiplier"]
        new = torch.stack([own[name] for name in self._names], 1)
        absent = [self._absent(group) for group in self.param_groups]
        if not any(absent):
            return new
        old = torch.stack([groups[name] for name in self._names], 1)
        # the losses are of all groups, whosever turn it is
        for column, name in enumerate(self._names):
            if name in verdict.witness:
                old[:, column] = new[:, column]
        return torch.stack([before if gone else after for gone, before, after in zip(absent, old, new, strict=True)])

    def _show_all(self, table: Tensor) -> None:
        """Publish what users read, in tensors that no later step writes to."""
        names = self._names
        for group, row in zip(self.param_groups, table.unbind(), strict=True):
            entries = dict(zip(names, row.unbind(), strict=True))
            group |= {name: entries[name] for name in group["elra_shown"].split()}

    def _publish(self, params: list[Tensor], verdict: Verdict, table: Tensor) -> None:
        """Write rates and memory to where users, checkpoints and the next step find them."""
        assert self._table is not None
        self._table.copy_(table)
        self._show_all(table)
        if self.scope == "tensor":
            rows = torch.stack([verdict.alpha, *verdict.memory.values()], 1) if params else verdict.alpha
            for p, row in zip(params, rows.unbind(), strict=True):
                if self.state.get(p):
                    self.state[p]["elra"] = row.clone()
