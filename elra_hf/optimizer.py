"""`Elra`: one step, in the order of the method. gather → measure → reduce → decide → update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_number, is_number
from .directions import Direction, Move
from .groups import Groups, is_wide
from .pieces import SIZES, Bucket, dot
from .reduce import Groups as Ranks
from .reduce import all_sum, gradient, groups_of, is_bare, local, require_same
from .rules import Decision, Rule
from .witness import exploded_loss, exploded_norm

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

Scope = Literal["global", "group", "tensor"]
SCOPES: tuple[Scope, ...] = ("global", "group", "tensor")
# What is left of the longest gradient's square after a step.
NORM_MEMORY = 0.98
# The largest η·weight_decay of a step. Where gradients vanish, as on separable data, α may grow until this alone would
# bring all weights to zero within a few steps.
MOST_DECAY = 0.01


def real(tensor: Tensor) -> Tensor:
    """The local part of ``tensor``, complex numbers as pairs of real ones; shares its memory."""
    tensor = local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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


class Elra(Groups):
    """Gradient descent whose rate adapts itself, from a direction and a rate rule. Source: arXiv 2309.06274.

    x_{t+1} = x_t - η_t d_t with η_t = α_t · share_t. The rule turns the inner products of the gradient with where the run comes
    from into α_t. A scheduler that writes ``group["lr"]`` holds the rate down: share_t is lr over the highest lr of the group
    so far, times the ratio of the group's lr to that of the optimizer. Every group shows the same public state, 0-dim tensors:
    ``group["alpha"]`` (α_t; under scope "tensor" the geometric mean of the group's), ``group["cos"]`` (the cosine the rule
    saw), ``group["restarts"]``, ``group["clamps"]`` (how often α met its bounds) and ``group["effective_lr"]`` (η_t), unless
    the group brings a key of that name. The state itself lies under names that begin with "elra_".

    ``step()`` never waits for an accelerator. It issues no collective unless parameters are sharded; see `reduce`.

    Args:
        params: parameters or parameter groups; groups may set ``lr``, ``weight_decay`` and the direction's hyperparameters.
        direction: along what to move, e.g. ``Momentum()`` or ``Adam()``.
        rule: how the rate follows, e.g. ``C2Min()``, ``P2Min()`` or ``Tracking()``.
        lr: α_0 > 0, a float or a tensor of one number.
        weight_decay: decoupled; x is multiplied by exp(-η·weight_decay), at most by exp(-0.01), which never changes a sign.
        scope: over what the inner products are summed and one rate is kept: "global", "group" or "tensor".
        bounds: (lowest, highest) α; beyond them it is clamped and ``clamps`` counts.
        restart_factor: factor on α at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        stochastic_rounding: round weights in bfloat16 up or down by chance, so that small steps move them in the mean.
        process_group: the ranks that hold other parts of the parameters, where that cannot be seen from them
            (FSDP1, DeepSpeed ZeRO). Not for DDP, nor for FSDP2 and tensor parallelism, which are recognised.
        check_sync: at every step, compare parameters, gradient and rate over all ranks, and raise where they have come
            apart. Costs one small all-reduce and a wait for the device: for debugging.

    Raises:
        ValueError: an argument or a group's entry is out of range, or the rule needs products the direction lacks.
    """

    def __init__(
        self,
        params: ParamsT,
        direction: Direction,
        rule: Rule,
        *,
        lr: float | Tensor = 1e-5,
        weight_decay: float = 0.0,
        scope: Scope = "global",
        bounds: tuple[float, float] = (1e-8, 1e6),
        restart_factor: float = 1 / 3,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        process_group: dist.ProcessGroup | None = None,
        check_sync: bool = False,
    ) -> None:
        if not rule.needs <= direction.offers:
            raise ValueError(
                f"rule={rule!r} needs the inner products {sorted(rule.needs - direction.offers)}, which "
                f"direction={direction!r} does not measure; it offers {sorted(direction.offers)}"
            )
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is unknown: give one of {', '.join(map(repr, SCOPES))}")
        pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(is_number, bounds))
        if not (pair and 0.0 < bounds[0] < bounds[1] < math.inf):
            raise ValueError(f"bounds={bounds!r} is invalid: give (lowest, highest) with 0 < lowest < highest < inf")
        if scope == "tensor" and process_group is not None:
            raise ValueError(
                'scope="tensor" does not go with process_group=: FSDP1 and DeepSpeed ZeRO cut parameters where they like, '
                'and ranks without a part of one would not know its rate. Take scope="global" or "group", or FSDP2'
            )
        if not (is_number(restart_factor) and 0.0 < restart_factor < 1.0):
            raise ValueError(f"restart_factor={restart_factor!r} is invalid: give a factor in (0, 1), e.g. 1/3")
        if not check_number("lr", lr) > 0.0:
            raise ValueError(
                f"lr={lr!r} is invalid: it is the first rate and must be positive, e.g. 1e-5. "
                "To hold a parameter group still, set lr=0 in that group only"
            )
        self.direction = direction
        self.rule = rule
        self.scope: Scope = scope
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.restart_factor = float(restart_factor)
        self.process_group = process_group
        self.check_sync = check_sync
        # one of the parameters, where whole ones are dealt out over process_group, so that a rank may hold none
        self.dealt: Tensor | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **direction.defaults(),
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
        }
        self._all_groups: list[dict[str, Any]] = []
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss; called once, first, with gradients enabled. What it returns is
                handed through and not used, since the loss of one batch says little.
            loss: the loss at x_t, a number equal on all ranks. Optional: with it, steps are undone after which it exploded.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: a sparse gradient, or sharded parameters whose group cannot be known.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        ranks = self._ranks(params)
        buckets = self._gather(ranks)
        self._require_all(params)
        if buckets or any(ranks) or self.check_sync or self.dealt is not None:
            shares = self._enter(params, buckets)
            before = self._recall(params)
            parts = self._measure(buckets, ranks, shares, before)
            total = all_sum(parts)
            verdict = self._decide(total, before, shares, loss)
            if self.check_sync and not self._apart:
                # also of what is whole on every rank, since the sum takes that from one rank only
                seen = torch.stack([total, parts.get((), total)])
                n = len(self._needs)
                # gg; what follows from x_t alone; and products with the state, which may have been loaded on some ranks only
                require_same(seen[..., n + 3 :], seen[..., n], torch.cat([verdict.alpha, seen[..., :n].flatten()]))
            self._update(buckets, verdict, shares)
            self._publish(params, verdict, shares)
        return result

    # ---- gather -----------------------------------------------------------------------------------------------------------

    @property
    def _apart(self) -> bool:
        """Whether each rank alone knows the rates of its parameters."""
        return self.dealt is not None and self.scope == "tensor"

    def _ranks(self, params: list[Tensor]) -> list[Ranks]:
        """The groups of ranks that hold the rest of each parameter, or of all of them where they are dealt out."""
        if self.dealt is None:
            return groups_of(params, self.process_group)
        alone = self._apart or dist.get_world_size(self.process_group) == 1
        others: Ranks = () if alone or self.process_group is None else (self.process_group,)
        return [others] * max(len(params), 1)  # a rank without parameters enters the sum, too

    def _gather(self, ranks: list[Ranks]) -> list[Bucket]:
        """Sort the parameters that have a gradient into buckets, and create the state of new ones."""
        buckets: dict[tuple[Any, ...], Bucket] = {}
        newborn: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        member = -1
        for index, group in enumerate(self.param_groups):
            # a string, since distributed checkpoints take lists apart and expect the same length when they load
            idle = {int(position) for position in group["elra_idle"].split()}
            absent = []
            for position, p in enumerate(group["params"]):
                member += 1
                if p.grad is None:
                    if local(p).numel():  # FSDP1 gives no gradient to the ranks that hold nothing of a parameter
                        absent.append(str(position))
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter of shape {tuple(p.shape)}): "
                        "build the embedding with sparse=False"
                    )
                state = self.state[p]
                if not state:
                    self._give_birth(p, group, newborn, self._peers(index, member, p))
                self._raise_state(p, group)
                # a mean of logarithms bears no numbers by chance; one of squares hardly changes
                padded = self.process_group is not None and self.dealt is None and self.direction.relative
                new = any(state["step"] is fresh["step"] for fresh in newborn.values()) or (padded and group["elra_calls"] < 2)
                key = (
                    (member,)
                    if self.scope == "tensor"
                    else (index, p.device, p.dtype, id(state["step"]), position in idle, ranks[member])
                )
                if key not in buckets:
                    counts = {name: state[name] for name in self.direction.counters}
                    names = self.direction.dtypes(p, group)
                    buckets[key] = Bucket(
                        index,
                        self._cell(index, member),
                        group,
                        counts,
                        ranks[member],
                        position in idle,
                        new,
                        padded,
                        {n: [] for n in names},
                    )
                bucket = buckets[key]
                bucket.params.append(real(p))
                bucket.grads.append(real(gradient(p)))
                bucket.fans.append(p.numel() // p.shape[0] if p.ndim > 1 and p.numel() else 1)
                for name, tensors in bucket.state.items():
                    tensors.append(real(state[name]))
            group["elra_idle"] = " ".join(absent)
        return list(buckets.values())

    def _give_birth(
        self, p: Tensor, group: dict[str, Any], newborn: dict[tuple[Any, ...], dict[str, Tensor]], peers: tuple[Any, ...]
    ) -> None:
        """Create the state of a parameter; peers of one step share their counters."""
        state = self.state[p]
        dtype = torch.float64 if is_wide(p) else torch.float32
        fresh = {name: torch.zeros((), dtype=dtype, device=p.device) for name in self.direction.counters}
        state.update(newborn.setdefault(peers, fresh))
        if self.scope == "tensor":
            values = [float(group["elra_alpha"]), *self._cell_names.values()]  # what it knows is its own
            state["elra"] = torch.tensor(values, dtype=group["elra_alpha"].dtype, device=group["elra_alpha"].device)
        for name, dtype in self.direction.dtypes(p, group).items():
            state[name] = torch.zeros_like(p, dtype=dtype)

    def _cell(self, group: int, member: int) -> int:
        """Where the rate of a parameter stands in the vector of rates, under the scope."""
        return {"global": 0, "group": group, "tensor": member}[self.scope]

    def _absent(self, group: dict[str, Any]) -> bool:
        """Whether the step leaves a group alone: ZeRO-3 empties all but the one whose turn it is."""
        return not group["params"] and self.scope != "global" and self.dealt is None

    def _require_all(self, params: list[Tensor]) -> None:
        """Refuse to share a rate between parameters that never meet in one step."""
        if self.scope == "global" and len(self.state) > len(params) and any(map(is_bare, params)):
            raise RuntimeError(
                f"step() sees {len(params)} of {len(self.state)} parameters: DeepSpeed ZeRO steps each parameter group by "
                "itself, and ZeRO-3 pieces of sub_group_size numbers, so that they cannot share a rate. Give the optimizer one "
                'parameter group, or scope="group" for a rate each; with ZeRO-3 also '
                "process_group=elra_hf.adapters.deepspeed.sharding_group(model, config), which checks sub_group_size"
            )

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

    # ---- measure ----------------------------------------------------------------------------------------------------------

    @property
    def _needs(self) -> tuple[str, ...]:
        return (*sorted(self.rule.needs - {"gg"}), "gg")

    def _measure(
        self, buckets: list[Bucket], ranks: list[Ranks], shares: list[tuple[Tensor, Tensor]], before: dict[str, Tensor]
    ) -> dict[Ranks, Tensor]:
        """This rank's inner products of each cell, by the groups of ranks that hold the rest of them, shape (cells, columns).

        The columns are `_needs` in a metric in which a group that moves w times as far counts w times; without that ``gg`` of
        all, of what the last step moved where others have rates of their own, and of what may move at all; the sizes of
        newborn tensors (see `SIZES`); and with ``check_sync`` ‖x_t‖².
        """
        needs, alpha = self._needs, before["alpha"]
        columns = len(needs) + 3 + len(SIZES) + self.check_sync
        # every rank enters every collective, also with nothing to add
        parts = {of: alpha.new_zeros(len(alpha), columns) for of in ranks}
        for bucket in buckets:
            *values, last = read(bucket, *bucket.counts.values(), self._last(bucket, alpha))
            counts = dict(zip(bucket.counts, values, strict=True))
            found = [torch.stack(self.direction.measure(piece, counts, last, needs)) for piece in bucket.pieces()]
            rows = torch.stack(found).to(alpha).sum(0)
            full, known = shares[bucket.index][0], self.scope == "global" or not (bucket.new or bucket.idle)
            row = [
                rows * self._metric(bucket, full),
                rows[-1:].expand(3) * torch.stack([torch.ones_like(full), torch.full_like(full, known), (full > 0).to(full)]),
                bucket.sizes().to(alpha) * (full > 0),
            ]
            if self.check_sync:
                row.append(
                    torch.stack([dot(p.to(bucket.dtype), p.to(bucket.dtype)) for p in bucket.params]).sum()[None].to(alpha)
                )
            parts[bucket.ranks][bucket.cell] += torch.cat(row)
        return parts

    def _last(self, bucket: Bucket, alpha: Tensor) -> Tensor:
        """η of the last step, 0 where that did not move these tensors."""
        return alpha[bucket.cell] * (0.0 if bucket.idle else bucket.group["elra_multiplier"])

    def _metric(self, bucket: Bucket, full: Tensor) -> Tensor:
        """What the products of a group weigh: gradients by how far the group moves, ways by its inverse."""
        if "pp" in self.rule.needs:  # products along the last step, by how far that went
            return full.new_ones(len(self._needs)) * (0.0 if bucket.idle else bucket.group["elra_multiplier"])
        inverse = torch.where(full > 0, 1.0 / full, 0.0)
        by_name = {"gg": full, "gm": full, "mm": full, "gs": torch.ones_like(full), "ss": inverse}
        return torch.stack([by_name[need] for need in self._needs])

    # ---- decide -----------------------------------------------------------------------------------------------------------

    def _decide(
        self, total: Tensor, before: dict[str, Tensor], shares: list[tuple[Tensor, Tensor]], loss: float | Tensor | None
    ) -> Verdict:
        """Let the rule adapt the rates; restart, or bound them."""
        needs, alpha, groups = self._needs, before["alpha"], self.param_groups
        live = total[:, len(needs) + 2] != 0
        squares = total[:, len(needs) : len(needs) + 2].sum(0)
        if self._apart:
            dist.all_reduce(squares, group=self.process_group)  # all restart, or none
        square, known = squares.unbind()
        memory = {name: before[name] for name in self._cell_names}
        young = memory["steps"] == 0  # ranks, groups and tensors may be born one by one
        for name, column in zip(SIZES, total[:, len(needs) + 3 :].unbind(1), strict=False):
            memory[name] = memory[name] + young * column
        logs, count, fans, entries, size = (memory[name] for name in SIZES)
        typical = torch.where(count > 0, logs / count, fans / entries).exp()
        memory["scale"] = torch.where(entries > 0, typical, memory["scale"])
        weights, reached = self._weights(shares)
        dots = dict(zip(needs, total.unbind(1), strict=False))
        # weights that start at 0 count as what is drawn for others of their shape
        dots |= {"scale": memory["scale"], "size": torch.where(size > 0, size, entries * typical.square())}
        old = ~young  # before, nothing has moved that could say anything
        dots |= {"steps": memory["steps"], "weight": old * self._of_cells(weights), "reached": old * self._of_cells(reached)}
        decision: Decision = self.rule(alpha, dots, memory)

        some, finite = square != 0, torch.isfinite(square)
        there = [group for group in groups if not self._absent(group)] or groups
        present = there[0]
        longest = present["elra_longest"]
        moving = torch.stack([group["elra_multiplier"] for group in there]).amax() > 0
        exploded = exploded_norm(known, longest) & moving & self.direction.explodes
        # so that a step along the new gradient is no longer than one along the longest was
        shrink = torch.where(exploded, (longest / known).sqrt().clamp(max=self.restart_factor), self.restart_factor)
        back = exploded
        if loss is not None:
            value = torch.zeros_like(square) + (loss.detach().reshape(()).to(square) if isinstance(loss, Tensor) else loss)
            refused, *seen = exploded_loss(value, present["elra_loss"], present["elra_spread"], present["elra_losses"])
            back = back | (refused & moving)
            for group in groups:
                group["elra_loss"], group["elra_spread"], group["elra_losses"] = seen
        bad = ~finite | back
        taken = some & ~bad
        adapted = torch.where(bad, alpha * shrink, decision.alpha)
        adapted = torch.where(some & (live | young) & torch.isfinite(adapted), adapted, alpha)
        bounded = torch.where(some, adapted.clamp(*self.bounds), alpha)
        after = {**decision.memory, "steps": memory["steps"] + 1.0}
        memory |= {name: torch.where(taken & live, value, memory[name]) for name, value in after.items()}
        return Verdict(bounded, alpha, decision.cos, memory, taken, bad, back, (bounded != adapted).any(), square)

    def _weights(self, shares: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], ...]:
        """How much the last step of each group says about the schedule's full rate, and the highest share so far.

        Both are in [0, 1], and 0 before there was a step. The first is the share that was reached in a warm-up, for α must not
        undo it, and less in a decay: nothing below half of the highest share so far, since smaller steps make cosines rise, and
        answering would undo the decay. Under scope "global" those of the group that has most.
        """
        found = []
        for group, (full, _) in zip(self.param_groups, shares, strict=True):
            multiplier, peak = group["elra_multiplier"], group["elra_peak"]
            weight = (2.0 * multiplier / peak - 1.0).clamp(0.0, 1.0) * (multiplier / full).clamp(max=1.0)
            found.append(torch.stack([weight, (peak / full).clamp(max=1.0)]).nan_to_num(0.0))
        if self.scope == "global":
            found = [torch.stack(found).amax(0)] * len(found)
        return [row[0] for row in found], [row[1] for row in found]

    # ---- update -----------------------------------------------------------------------------------------------------------

    def _update(self, buckets: list[Bucket], verdict: Verdict, shares: list[tuple[Tensor, Tensor]]) -> None:
        """Take the step, or undo what led to an explosion."""
        counted: dict[int, tuple[Bucket, Move, dict[str, Any]]] = {}
        for bucket in buckets:
            rate = torch.where(verdict.taken, verdict.alpha[bucket.cell] * shares[bucket.index][1], 0.0)
            lost = -torch.expm1(-(rate * bucket.group["weight_decay"]).clamp(max=MOST_DECAY))
            last = self._last(bucket, verdict.last)
            *values, rate, lost, taken, back, kept, last = read(
                bucket, *bucket.counts.values(), rate, lost, verdict.taken, verdict.back, ~verdict.bad, last
            )
            counts = dict(zip(bucket.counts, values, strict=True))
            move = Move(rate, lost if bucket.group["weight_decay"] else None, taken, back, kept, last)
            if not isinstance(taken, float) or taken or not kept:
                for piece in bucket.pieces():
                    self.direction.update(piece, counts, move)
                    piece.close()
            counted[id(bucket.counts["step"])] = bucket, move, counts
        for bucket, move, counts in counted.values():
            for name, value in self.direction.count(bucket.group, counts, move).items():
                bucket.counts[name].copy_(value) if isinstance(value, Tensor) else bucket.counts[name].fill_(value)

    # ---- memory -----------------------------------------------------------------------------------------------------------

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
                "clamps": group["elra_clamps"] + verdict.clamped,
                "longest": torch.where(taken, longest, group["elra_longest"]),
                "peak": torch.where(taken, peak, group["elra_peak"]),
                "multiplier": torch.where(bad, 0.0, torch.where(taken, now, group["elra_multiplier"])),
            }
            group |= {f"elra_{name}": value for name, value in own.items()}
            group["elra_calls"] = min(group["elra_calls"] + 1, 2)
            self._show(group)


def read(bucket: Bucket, *values: Tensor) -> list[Any]:
    """0-dim tensors as floats on the CPU, where that waits for nothing, else on the device and in the dtype of the bucket."""
    device, dtype = bucket.params[0].device, bucket.dtype
    if device.type == "cpu" and not torch.compiler.is_compiling() and values[-1].device.type == "cpu":
        return [float(value) for value in values]
    return [value.to(device, dtype) for value in values]


def rate(optimizer: Any) -> float:
    """Return the rate that the last step applied to the first parameter group, η; 0 where it did not move; before it, ``lr``.

    Works through the wrappers of Accelerate, Lightning, Fabric and DeepSpeed. Waits for the device: for logs, not for loops.

    Raises:
        TypeError: there is no ELRA optimizer inside.
    """
    group = unwrap(optimizer).param_groups[0]
    if not group["elra_calls"]:
        return float(group["lr"])
    return float(group["elra_alpha"]) * float(group["elra_multiplier"])


def unwrap(optimizer: Any) -> Elra:
    """The `Elra` inside the wrappers of Accelerate, Lightning, Fabric and DeepSpeed.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, Elra) and getattr(inner, "optimizer", inner) is not inner:
        inner = inner.optimizer
    if not isinstance(inner, Elra):
        raise TypeError(
            f"{type(optimizer).__name__} holds no ELRA optimizer: pass ElraC2Min, ElraP2Min, ElraAdamW or a wrapper of one"
        )
    return inner
