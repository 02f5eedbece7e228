"""`Elra`: one step, in the order of the method. gradient → measure → reduce → adapt → bound or restart → update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from .bucket import Bucket
from .directions import Direction, dots, log_sizes, square_sizes
from .reduce import Groups, all_sum, gradient, groups_of, is_bare, local, require_same, world_size
from .rules import CEILING, RECORD, SHORT, SHORT_OF_ONE, SHORT_OF_SLICES, STRAIGHT, TREND_MEMORY, Rule

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

Scope = Literal["global", "group", "tensor"]
SCOPES: tuple[Scope, ...] = ("global", "group", "tensor")

# A gradient this many times longer than the longest of late is taken for an explosion: a run with growth limit 2 cannot reach
# it in one step on a quadratic before the rate has passed the edge of stability. Not than the one before: where most of the
# data are learnt, a batch now and then has a gradient that is ten times as long as that of the others, and a restart for each
# brought the rate of nets for digits down to its lower bound.
NORM_EXPLOSION = 10.0
# What is left of that longest gradient's square after a step.
NORM_MEMORY = 0.98
# A loss this many times the best one, and above the first one, is taken for an explosion. Source: the method's authors (25).
LOSS_EXPLOSION = 25.0
# The largest η·weight_decay of a step. Where gradients vanish, as on separable data, α grows until this alone would
# bring all weights to zero within a few steps.
MOST_DECAY = 0.01


# What every group carries from step to step, as 0-dim tensors, with the values that a run starts from.
SCALARS = {
    "cos": 0.0,
    "restarts": 0.0,
    "clamps": 0.0,
    "steps": 0.0,
    "clock": 0.0,
    "trend": 1.0,
    "longest": 0.0,
    "scale": 0.0,
    "hurdle": 0.0,
    "ceiling": 0.0,
    "multiplier": 0.0,
    "peak": 0.0,
    "first_loss": math.inf,
    "best_loss": math.inf,
}


def is_wide(param: Tensor) -> bool:
    """Whether ``param`` calls for a rate in float64."""
    return param.dtype in (torch.float64, torch.complex128)


def real(tensor: Tensor) -> Tensor:
    """The local part of ``tensor``, complex numbers as pairs of real ones; shares its memory."""
    tensor = local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Elra(Optimizer):
    """Gradient descent whose rate adapts itself, from a direction and a rate rule. Source: arXiv 2309.06274.

    x_{t+1} = x_t - η_t d_t with η_t = α_t · group["lr"] / α_0. The rule turns the inner products of the gradient with the
    last gradient and direction into α_t. ``lr`` is α_0, the first rate; a scheduler that writes ``group["lr"]``
    multiplies, and never touches α. Every group carries the same public state, 0-dim tensors:
    ``group["alpha"]`` (α_t; under scope "tensor" the geometric mean of the group's), ``group["cos"]`` (the cosine the rule
    saw), ``group["restarts"]``, ``group["clamps"]`` (how often α met its bounds), ``group["steps"]`` (taken so far),
    ``group["multiplier"]`` (lr / α_0 of the last step), ``group["peak"]`` (the highest so far), ``group["clock"]`` (steps or
    overshoots, less where the schedule held the rate down), ``group["trend"]`` (of steps that stop short, 1, and
    overshoot, -1), ``group["longest"]`` (square of the longest gradient of late), for relative rules ``group["scale"]``
    (typical size of a weight at the start), and for those that count overshoots ``group["hurdle"]`` (square of the length
    that a step must have had for them to count; 0 once one had it) and ``group["ceiling"]`` (square of the longest gradient
    with which the run went straight).

    ``step()`` never waits for the device. It issues no collective unless parameters are sharded; see `reduce`.

    Args:
        params: parameters or parameter groups; groups may set ``lr``, ``weight_decay`` and the direction's hyperparameters.
        direction: along what to move, e.g. ``Momentum()`` or ``Adam()``.
        rule: how the rate follows, e.g. ``C2Min()``, ``P2Min()`` or ``Tracking()``.
        lr: α_0 > 0, a float or a 0-dim tensor.
        weight_decay: decoupled; x is multiplied by exp(-η·weight_decay), at most by exp(-0.01), which never changes a sign.
        scope: over what the inner products are summed and one rate is kept: "global", "group" or "tensor".
        bounds: (lowest, highest) α; beyond them it is clamped and ``clamps`` counts.
        restart_factor: factor on α at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        foreach: all tensors of a bucket in one call (True), or one at a time with less temporary memory (False).
            None: True on accelerators. Both give the same bits.
        process_group: the ranks that hold other slices of the parameters, where that cannot be seen from them
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
        foreach: bool | None = None,
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
        if not (len(bounds) == 2 and 0.0 < bounds[0] < bounds[1] < math.inf):
            raise ValueError(f"bounds={bounds!r} is invalid: give (lowest, highest) with 0 < lowest < highest < inf")
        if scope == "tensor" and process_group is not None:
            raise ValueError(
                'scope="tensor" does not go with process_group=: FSDP1 and DeepSpeed ZeRO cut parameters where they like, '
                'and ranks without a part of one would not know its rate. Take scope="global" or "group", or FSDP2'
            )
        if not 0.0 < restart_factor < 1.0:
            raise ValueError(f"restart_factor={restart_factor!r} is invalid: give a factor in (0, 1), e.g. 1/3")
        if not (math.isfinite(float(lr)) and float(lr) > 0.0):
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
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **direction.defaults(),
            "maximize": maximize,
            "foreach": foreach,
            "alpha0": float(lr),
            "alpha": None,
            **dict.fromkeys(SCALARS),
            "idle": "",
            "calls": 0,
        }
        super().__init__(params, defaults)

    # ---- groups and state -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training: it then starts at the rate reached so far."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._fill_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            value = float(group[name])
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name}={group[name]!r} is invalid: give a finite number >= 0")
        unknown = set(group) - set(self.defaults) - {"params", "initial_lr", "param_names", "name"}
        for name in sorted(unknown & {"gain", "target", "growth_limit", "scope", "bounds", "restart_factor"}):
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group is not supported: the rate rule is one for all groups; "
                f"pass {name} to the optimizer"
            )
        self.direction.check(group)

    def _fill_group(self, group: dict[str, Any]) -> None:
        """Give ``group`` whatever state it lacks: a late group, or a pickle from before a key existed."""
        first = self.param_groups[0]
        dtype = torch.float64 if any(map(is_wide, group["params"])) else torch.float32
        for name, start in {"alpha": group["alpha0"], **SCALARS}.items():
            if group[name] is None:
                # the last move of a late group has no length
                value = None if name == "multiplier" else first[name]
                group[name] = torch.tensor(start, dtype=dtype) if value is None else value.clone()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but ``process_group``, which does not pickle: pass it again where it is needed."""
        own = ("direction", "rule", "scope", "bounds", "restart_factor", "check_sync")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("check_sync", False)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._fill_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch does, with a counter for each parameter: distributed checkpoints load in place, one by one."""
        state_dict = super().state_dict()
        for key, state in state_dict["state"].items():
            if "step" in state:
                state_dict["state"][key] = {**state, "step": state["step"].clone()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep each state tensor's own dtype, which torch would cast to the parameter's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        counters: dict[tuple[int, torch.device, float], Tensor] = {}
        for i, (index, p) in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                value = value.to(p.device)
                if name == "step":  # a group's parameters of one age share one counter; ZeRO steps the groups apart
                    value = counters.setdefault((index, p.device, float(value)), value.clone())
                elif value.dtype != self.state[p][name].dtype:
                    value = value.clone()
                else:
                    value = self.state[p][name]
                self.state[p][name] = value

    def __repr__(self) -> str:
        head = f"{type(self).__name__} (direction={self.direction!r}, rule={self.rule!r}, scope={self.scope!r})"
        return head + super().__repr__().removeprefix(type(self).__name__)

    # ---- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss; called once, first, with gradients enabled.
            loss: the loss at x_t, equal on all ranks. Optional: with it, a step after which the loss exploded is undone.
                Taken from ``closure`` if not given, unless there are several ranks, each with a loss of its own.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: a sparse gradient, or sharded parameters whose group cannot be known.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            if loss is None and world_size() == 1:
                loss = result
        self._step(loss)
        return result

    def _step(self, loss: float | Tensor | None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        splits = groups_of(params, self.process_group)
        buckets = self._gather(splits)
        self._require_all(params)
        if not buckets and not any(splits) and not self.check_sync:
            return
        device = buckets[0].params[0].device if buckets else local(params[0]).device
        dtype = torch.float64 if any(map(is_wide, params)) else torch.float32
        for group in self.param_groups:
            for name in ("alpha", *SCALARS):
                group[name] = group[name].to(device, dtype)

        # measure, reduce
        needs = (*sorted(self.rule.needs - {"gg"}), "gg")
        parts = self._measure(buckets, splits, needs, device, dtype)
        total = all_sum(parts)
        square = total[:, len(needs)].sum()  # ‖G_t‖², without the weights of the last step

        # adapt
        present = [group for group in self.param_groups if not self._absent(group)] or self.param_groups
        longest = present[0]["longest"]
        weights = self._weights()
        if self.rule.relative:
            dots = self._survey(total, needs)
        else:
            cells = self._cells(total)
            dots = dict(zip(needs, cells.unbind(1), strict=False))
        for name in ("clock", "steps"):
            dots[name] = self._of_cells([group[name] for group in self.param_groups])
        dots["weight"] = self._of_cells(weights)
        alphas = self._alphas(params)
        if self.rule.clock == "overshoots":
            self._note_hurdle(total[:, len(needs) + 1 : len(needs) + 3])
            # of a step along the longer one of G_t and G_{t-1}
            lengths = alphas.square() * torch.maximum(dots["gg"], dots["pp"])
            short = [self._sum_of(lengths, index) < group["hurdle"] for index, group in enumerate(self.param_groups)]
            trends = self._trends(dots, short)
            dots |= {"trend": self._of_cells(trends), "short": self._of_cells(short)}
            dots["record"] = square > RECORD**2 * longest
            if self.rule.clips:
                squares = [self._sum_of(cells[:, len(needs)], index) for index in range(len(trends))]
                straight = self._straight(trends)
                clips = self._clips(squares, straight)
                shorter = self._of_cells(clips)
                for name in needs:
                    dots[name] = dots[name] * shorter ** name.count("g")
        adapted, cos = self.rule(alphas, dots)
        some = square != 0
        bad = ~torch.isfinite(square)
        shrink = torch.full_like(square, self.restart_factor)
        if "pp" in dots:
            exploded = (dots["pp"].sum() > 0) & torch.isfinite(square) & (square > NORM_EXPLOSION**2 * longest)
            bad = bad | exploded
            # so that a step along the new gradient is no longer than one along the longest was
            shrink = torch.where(exploded, torch.minimum(shrink, (longest / square).sqrt()), shrink)
        if loss is not None:
            bad = bad | self._exploded(loss)
        taken = some & ~bad

        # bound, or restart
        adapted = torch.where(bad, alphas * shrink, adapted)
        adapted = torch.where(some & torch.isfinite(adapted), adapted, alphas)
        bounded = torch.where(some, adapted.clamp(*self.bounds), alphas)

        if self.check_sync:
            # also of what is whole on every rank, since the sum takes that from one rank only
            seen = torch.stack([total, parts.get((), total)])
            products = len(needs) + 1
            require_same(seen[..., products:], seen[..., :products], bounded)

        # update
        undo = self.direction.backtracks or loss is not None
        multipliers = [torch.zeros_like(g["alpha"]) + g["lr"] / g["alpha0"] for g in self.param_groups]
        counts: dict[int, tuple[Tensor, Tensor]] = {}
        for bucket in buckets:
            group, cell = bucket.group, self._cell(bucket.index, bucket.members[0])
            rate = torch.where(taken, bounded[cell] * multipliers[bucket.index], 0.0)
            back = torch.where(bad, alphas[cell] * group["multiplier"], 0.0) if undo and not bucket.idle else None
            decay = None
            if group["weight_decay"]:
                lost = (rate * group["weight_decay"]).clamp(max=MOST_DECAY)
                if back is not None:
                    lost = lost - (back * group["weight_decay"]).clamp(max=MOST_DECAY)
                decay = torch.exp(-lost)
            move = bucket.move(rate, decay, back, taken, bad, clips[bucket.index] if self.rule.clips else None)
            for chunk in bucket.chunks():
                work = chunk.opened()
                self.direction.update(work, move)
                chunk.close(work)
            counts[id(bucket.step)] = bucket.step, self.direction.count(bucket, move)
        for step, count in counts.values():
            step.copy_(count)
        self._publish(params, bounded, cos, taken)
        clamps = (bounded != adapted).any()
        longest = torch.where(taken, torch.maximum(NORM_MEMORY * longest, square), longest)
        for index, (group, multiplier) in enumerate(zip(self.param_groups, multipliers, strict=True)):
            if self._absent(group):
                continue
            if self.rule.clock == "steps":
                group["clock"] = group["clock"] + taken * weights[index]
            else:
                trend, clock = trends[index], group["clock"]
                clock = torch.where(trend < 0, clock + weights[index], torch.where(trend < STRAIGHT, clock, 0.0))
                for name, value in (("trend", trend), ("clock", clock)):
                    group[name] = torch.where(bad, SCALARS[name], torch.where(taken, value, group[name]))
                group["hurdle"] = torch.where(taken & ~short[index], 0.0, group["hurdle"])
                if self.rule.clips:
                    longer = torch.maximum(group["ceiling"], squares[index])
                    group["ceiling"] = torch.where(taken & straight[index], longer, group["ceiling"])
            group["calls"] = min(group["calls"] + 1, 2)
            group["restarts"] = group["restarts"] + bad
            group["clamps"] = group["clamps"] + clamps
            group["steps"] = group["steps"] + taken
            group["longest"] = longest
            group["peak"] = torch.where(taken, torch.maximum(group["peak"], multiplier), group["peak"])
            group["multiplier"] = torch.where(bad, 0.0, torch.where(taken, multiplier, group["multiplier"]))

    def _note_hurdle(self, starts: Tensor) -> None:
        """Set ``group["hurdle"]`` in the first step; see `SHORT`.

        Args:
            starts: ‖x_1‖² and ‖G_1‖² of each tensor, or of each cell where tensors are hidden, shape (tensors or cells, 2).
        """
        for group, rows in zip(self.param_groups, self._shared(starts), strict=True):
            if group["calls"] < 2:
                start, square = rows.unbind(1)
                whole = (SHORT if self.process_group is None else SHORT_OF_SLICES) ** 2 * start.sum()
                # the whole length where the part in one tensor is long enough
                each = torch.where((start > 0) & (square > 0), SHORT_OF_ONE**2 * start * square.sum() / square, whole)
                hurdle = torch.cat([whole[None], each]).amin()
                group["hurdle"] = torch.where((group["steps"] == 0) & (whole > 0), hurdle, group["hurdle"])

    def _trends(self, dots: dict[str, Tensor], short: list[Tensor]) -> list[Tensor]:
        """The trend of each group with the last step in it, unless that was too short to tell; see `Clock`."""
        trends = []
        for index, group in enumerate(self.param_groups):
            end, moved = (self._sum_of(dots[name], index) for name in ("gd", "pp"))
            trend = TREND_MEMORY * group["trend"] + (1.0 - TREND_MEMORY) * end.sign()
            trends.append(torch.where((moved > 0) & ~short[index], trend, group["trend"]))
        return trends

    def _straight(self, trends: list[Tensor]) -> list[Tensor]:
        """Whether each group is yet to overshoot, went straight for long again, or knows of no gradient (an older pickle)."""
        groups = zip(self.param_groups, trends, strict=True)
        return [torch.logical_or(trend > STRAIGHT, group["ceiling"] == 0) for group, trend in groups]

    def _clips(self, squares: list[Tensor], straight: list[Tensor]) -> list[Tensor]:
        """What G_t is multiplied by in each group, from ‖G_t‖² and whether the run goes straight; see `CEILING`."""
        clips = []
        for group, square, free in zip(self.param_groups, squares, straight, strict=True):
            limit = (CEILING**2 * group["ceiling"] / square).sqrt().clamp(max=1.0)
            clips.append(torch.where(free | (square == 0), 1.0, limit))
        return clips

    def _sum_of(self, cells: Tensor, index: int) -> Tensor:
        """Of one number a cell, the sum over those of a group."""
        return self._by_group(cells)[index].sum() if self.scope == "tensor" else cells[self._cell(index, 0)]

    def _cell(self, group: int, member: int) -> int:
        """Where the rate of a parameter stands in the vector of rates, under the scope."""
        return {"global": 0, "group": group, "tensor": member}[self.scope]

    def _absent(self, group: dict[str, Any]) -> bool:
        """Whether the step leaves a group alone: ZeRO-3 empties all but the one whose turn it is."""
        return not group["params"] and self.scope != "global"

    def _require_all(self, params: list[Tensor]) -> None:
        """Refuse to share a rate between parameters that never meet in one step."""
        if self.scope == "global" and len(self.state) > len(params) and any(map(is_bare, params)):
            raise RuntimeError(
                f"step() sees {len(params)} of {len(self.state)} parameters: DeepSpeed ZeRO steps each parameter group by "
                "itself, and ZeRO-3 pieces of sub_group_size numbers, so that they cannot share a rate. Give the optimizer one "
                'parameter group, or scope="group" for a rate each; with ZeRO-3 also '
                "process_group=elra_hf.adapters.deepspeed.sharding_group(model, config), which checks sub_group_size"
            )

    def _gather(self, splits: list[Groups]) -> list[Bucket]:
        """Sort the parameters that have a gradient into buckets, and create the state of new ones."""
        buckets: dict[tuple[Any, ...], Bucket] = {}
        newborn: dict[torch.device, Tensor] = {}
        member = -1
        for index, group in enumerate(self.param_groups):
            # a string, since distributed checkpoints take lists apart and expect the same length when they load
            idle = {int(position) for position in group["idle"].split()}
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
                    state["step"] = newborn.setdefault(p.device, torch.zeros((), device=p.device))
                    if self.scope == "tensor":
                        state["alpha"] = group["alpha"].clone()
                    state.update(self.direction.state(p, group))
                if state["step"].device != p.device:
                    state["step"] = state["step"].to(p.device)
                key = (
                    (member,)
                    if self.scope == "tensor"
                    else (index, p.device, p.dtype, id(state["step"]), position in idle, splits[member])
                )
                if key not in buckets:
                    lists: dict[str, list[Tensor]] = {name: [] for name in state if name not in ("step", "alpha")}
                    buckets[key] = Bucket(index, group, [], position in idle, group["calls"] < 2, state["step"], [], [], lists)
                bucket = buckets[key]
                bucket.members.append(member)
                bucket.params.append(real(p))
                bucket.grads.append(real(gradient(p)))
                for name, tensors in bucket.state.items():
                    tensors.append(real(state[name]))
            group["idle"] = " ".join(absent)
        return list(buckets.values())

    def _measure(
        self, buckets: list[Bucket], splits: list[Groups], needs: tuple[str, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[Groups, Tensor]:
        """This rank's inner products of each cell or tensor, by the groups that hold the rest of them, a row each.

        In the metric of the step taken last, where a group that moved w times as far counts w times; behind ``needs`` comes
        ``gg`` once more, without these weights. A relative rule adds `log_sizes`, any other `square_sizes` and ``gg`` in the
        same metric, as it is at the schedule's full rate, ``check_sync`` ‖x_t‖².
        """
        cells = len(splits) if self._by_tensor else 1 if self.scope == "global" else len(self.param_groups)
        # every rank enters every collective, also with nothing to add
        columns = len(needs) + 3 + self.check_sync
        parts = {groups: torch.zeros(cells, columns, device=device, dtype=dtype) for groups in splits}
        for bucket in buckets:
            rows = torch.cat([self._products(chunk.opened(), needs, dtype) for chunk in bucket.chunks()]).to(device)
            weighted = rows[:, : len(needs)] * (0.0 if bucket.idle else bucket.group["multiplier"])
            if bucket.new and not self.rule.relative:
                group = bucket.group
                full = group.get("max_lr", group.get("initial_lr", group["lr"]))
                full = torch.zeros_like(group["alpha"]) + full / group["alpha0"]
                rows[:, len(needs)] *= torch.where(full > 0, 1.0 / full, 0.0)
                rows[:, len(needs) + 1] *= full
            rows = torch.cat([weighted, rows[:, len(needs) - 1 :]], 1)
            into = parts[splits[bucket.members[0]]]
            if self._by_tensor:
                torch._foreach_add_([into[member] for member in bucket.members], list(rows.unbind()))
            else:
                into[self._cell(bucket.index, bucket.members[0])] += rows.sum(0)
        return parts

    def _products(self, work: Bucket, needs: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """The inner products of each tensor, and what `_measure` adds."""
        columns = [self.direction.measure(work, needs, dtype)]
        if not work.new:
            columns.append(columns[0].new_zeros(len(work.params), 2))
        elif self.rule.relative:
            columns.append(log_sizes(work.params, work.grads, dtype))
        else:
            columns.append(torch.stack([square_sizes(work.params, work.grads, dtype), columns[0][:, -1]], 1))
        if self.check_sync:
            columns.append(dots(work.params, work.params, dtype)[:, None])
        return torch.cat(columns, 1)

    @property
    def _by_tensor(self) -> bool:
        """Whether products are kept apart by tensor, if only in the first steps. The slices of FSDP1 and ZeRO are none."""
        first = self.rule.clock == "overshoots" and any(group["calls"] < 2 for group in self.param_groups if group["params"])
        return self.scope == "tensor" or ((self.rule.votes or first) and self.process_group is None)

    def _survey(self, total: Tensor, needs: tuple[str, ...]) -> dict[str, Tensor]:
        """What a relative rule gets: products and ``size`` of each cell's voters, and what is known of the run."""
        self._note_scale(total[:, len(needs) + 1 : len(needs) + 3])
        size = torch.ones_like(total[:, 0])
        if self._by_tensor:
            # as arguments of a kernel: a tensor made from a list would wait for the device
            torch._foreach_mul_(list(size.unbind()), [p.numel() for group in self.param_groups for p in group["params"]])
        dots = {name: self._voters(total[:, i]) for i, name in enumerate(needs)} | {"size": self._voters(size)}
        return dots | {"scale": self._of_cells([group["scale"] for group in self.param_groups])}

    def _by_group(self, rows: Tensor) -> list[Tensor]:
        """The rows of each group's parameters, of something with a row a tensor."""
        return list(torch.split(rows, [len(group["params"]) for group in self.param_groups]))  # type: ignore[no-untyped-call]

    def _shared(self, rows: Tensor) -> list[Tensor]:
        """The rows of all that each group shares its rate with, of something with a row a tensor, or else a cell."""
        if self.scope == "global":
            return [rows] * len(self.param_groups)
        return self._by_group(rows) if self._by_tensor else list(rows[:, None].unbind())

    def _cells(self, rows: Tensor) -> Tensor:
        """The sums over the tensors of each cell, of something with a row a tensor, or else a cell."""
        if self.scope == "tensor" or not self._by_tensor:
            return rows
        return torch.stack([part.sum(0) for part in (self._by_group(rows) if self.scope == "group" else [rows])])

    def _voters(self, column: Tensor) -> Tensor:
        """A number a tensor, or a cell, as a matrix with a row a cell, filled up with zeros."""
        if self.scope == "tensor" or not self._by_tensor:
            return column[:, None]
        return column[None] if self.scope == "global" else pad_sequence(self._by_group(column), batch_first=True)

    def _weights(self) -> list[Tensor]:
        """How much the last step of each group says about the schedule's full rate, in [0, 1]; 0 before there was a step.

        In a warm-up the share of the full lr that was reached. In a decay less for a rule that settles with the steps: nothing
        below half of the highest lr so far, since smaller steps make cosines rise, and answering would undo the decay. A rule
        that settles with the overshoots answers by then too little for that, unless its rate is still to be found.
        Under scope "global" that of the group that has most.
        """
        weights = []
        for group in self.param_groups:
            multiplier, peak = group["multiplier"], group["peak"]
            full = group.get("max_lr", group.get("initial_lr"))  # where torch's schedulers keep it
            full = multiplier if full is None else full / group["alpha0"]
            weight = (peak / full).clamp(max=1.0)
            if self.rule.clock == "steps":
                weight = (2.0 * multiplier / peak - 1.0).clamp(0.0, 1.0) * (multiplier / full).clamp(max=1.0)
            weights.append(weight.nan_to_num(0.0))
        return [torch.stack(weights).max()] * len(weights) if self.scope == "global" else weights

    def _note_scale(self, sizes: Tensor) -> None:
        """Set ``group["scale"]``, the geometric mean of |x| at the start, from the sums of `log_sizes` of each row."""
        for group, rows in zip(self.param_groups, self._shared(sizes), strict=True):
            if group["calls"] < 2:
                logs, count = rows.sum(0)
                group["scale"] = torch.where((count > 0) & (group["scale"] == 0), (logs / count).exp(), group["scale"])

    def _of_cells(self, values: list[Tensor]) -> Tensor:
        """Values of the groups as values of the cells, shape (cells,)."""
        if self.scope == "global":
            return values[0].view(1)
        if self.scope == "group":
            return torch.stack(values)
        return torch.cat([value.expand(len(group["params"])) for value, group in zip(values, self.param_groups, strict=True)])

    def _alphas(self, params: list[Tensor]) -> Tensor:
        """The rates as they are, shape (cells,)."""
        of_cells = self._of_cells([group["alpha"] for group in self.param_groups])
        if self.scope != "tensor":
            return of_cells
        own = [self.state.get(p, {}).get("alpha", alpha) for p, alpha in zip(params, of_cells, strict=True)]
        return torch.stack([alpha.to(of_cells) for alpha in own])

    def _publish(self, params: list[Tensor], alphas: Tensor, cos: Tensor, taken: Tensor) -> None:
        """Write the rates and cosines back to where users and checkpoints find them."""
        start = 0
        for index, group in enumerate(self.param_groups):
            if self._absent(group):
                continue
            if self.scope == "tensor":
                stop = start + len(group["params"])
                for p, alpha in zip(params[start:stop], alphas[start:stop].unbind(), strict=True):
                    if p in self.state:
                        self.state[p]["alpha"] = alpha.clone()
                group["alpha"], seen = alphas[start:stop].log().mean().exp(), cos[start:stop].mean()
                start = stop
            else:
                cell = self._cell(index, 0)
                group["alpha"], seen = alphas[cell], cos[cell]
            group["cos"] = torch.where(taken, seen, group["cos"])

    def _exploded(self, loss: float | Tensor) -> Tensor:
        """Whether the loss is beyond what a step may do, as a 0-dim bool; keeps the first and the best."""
        group = self.param_groups[0]
        value = torch.zeros_like(group["alpha"]) + (loss.detach().to(group["alpha"]) if isinstance(loss, Tensor) else loss)
        finite = torch.isfinite(value)
        first = torch.where(torch.isfinite(group["first_loss"]) | ~finite, group["first_loss"], value)
        best = torch.where(finite, torch.minimum(group["best_loss"], value), group["best_loss"])
        for each in self.param_groups:
            each["first_loss"], each["best_loss"] = first, best
        return ~finite | ((best > 0) & (value > LOSS_EXPLOSION * best) & (value > first))


def rate(optimizer: Any) -> float:
    """Return the rate that the last step applied to the first parameter group, η = α·lr/α_0; before it, ``lr``.

    Works through the wrappers of Accelerate, Lightning, Fabric and DeepSpeed. Waits for the device: for logs, not for loops.

    Raises:
        TypeError: there is no ELRA optimizer inside.
    """
    group = unwrap(optimizer).param_groups[0]
    multiplier = float(group["multiplier"])
    return float(group["alpha"]) * multiplier if multiplier else float(group["lr"])


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
