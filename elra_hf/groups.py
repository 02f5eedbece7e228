"""What a parameter group and a parameter carry from step to step, and what a schedule makes of it. No mathematics."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .checks import check_number
from .directions import Direction
from .pieces import SIZES
from .rules import Rule

# Of every optimizer, beside what its rule declares: 0-dim tensors in each group, with the values that a run starts from. They
# live under names that begin with "elra_", since wrappers and users put keys of their own into groups.
SCALARS = {
    "cos": 0.0,
    "restarts": 0.0,
    "clamps": 0.0,
    "skipped": 0.0,
    "longest": 0.0,
    "lasting": 0.0,
    "calm": 0.0,
    "multiplier": 0.0,
    "peak": 0.0,
    "loss": 0.0,
    "spread": 0.0,
    "losses": 0.0,
    "effective_lr": 0.0,
}
# Of these, what says how far a group has moved itself, and not what all share.
OWN = ("multiplier", "peak", "effective_lr")
# What users and other people's displays read, under plain names, where a group has no key of its own of that name.
PUBLIC = ("alpha", "cos", "restarts", "clamps", "scale", "effective_lr")
# What is no tensor, beside the lr of the optimizer, what tells its checkpoints and which names of PUBLIC are ours: the lr that
# all others refer to, the lr of the group at the schedule's full rate and the highest seen, positions that sat out the last
# step, calls of step() up to 2.
PLAIN: dict[str, Any] = {"elra_base": None, "elra_full": None, "elra_top": None, "elra_idle": "", "elra_calls": 0}
# The most that a group's lr may be above the lr that α stands for: a group further below the highest is meant to stand still,
# and not to make the others' rates α times 10 to the 25.
MOST_RATIO = 100.0


WIDE = {torch.float64, torch.complex128}  # call for a rate in float64


def is_wide(param: Tensor) -> bool:
    """Whether ``param`` calls for a rate in float64."""
    return param.dtype in WIDE


def number(lr: Any) -> Any:
    """A learning rate as a float, or as a 0-dim tensor where it is a tensor of one number."""
    return lr.detach().reshape(()) if isinstance(lr, Tensor) else float(lr)


def _usable(lr: Any) -> Any:
    """``lr`` as somebody wrote it into a group, at least 0. A tensor is not looked at, which would wait for its device.

    Raises:
        ValueError: it is no finite number.
    """
    if isinstance(lr, Tensor):
        return lr.clamp(min=0.0)
    if 0.0 <= lr < math.inf:
        return lr
    if not lr < 0.0:
        raise ValueError(
            f"step: lr={lr} of a parameter group is invalid: a schedule or callback must write finite numbers there, from 0 to "
            "the group's own lr"
        )
    warnings.warn(
        "a schedule lets lr of a parameter group fall below 0, which would lead uphill; it counts as 0. The schedule is "
        "shorter than the run: give it the number of steps that are taken",
        stacklevel=4,
    )
    return 0.0


class Groups(Optimizer):
    """The upkeep of `Elra`, which adds the step."""

    direction: Direction
    rule: Rule
    scope: str
    process_group: dist.ProcessGroup | None
    _all_groups: list[dict[str, Any]]

    @property
    def _passing(self) -> tuple[str, ...]:
        """The products that a step takes in passing, for the next one; none where they are measured beforehand."""
        return tuple(sorted(self.rule.needs)) if self.direction.passing else ()

    @property
    def _cell_names(self) -> dict[str, float]:
        """What is kept for each rate beside α, with start values.

        Sizes of the weights, steps taken, the memory of the rule, and products of the step before.
        """
        return {**dict.fromkeys(("scale", *SIZES, "steps"), 0.0), **self.rule.memory, **dict.fromkeys(self._passing, 0.0)}

    @property
    def _scalars(self) -> dict[str, float]:
        """Names and start values of all 0-dim tensors of a group but α."""
        return {**SCALARS, **self._cell_names}

    @property
    def _kind(self) -> str:
        """What tells whether a checkpoint is one of this optimizer."""
        return f"{type(self.direction).__name__}/{type(self.rule).__name__}"

    def __repr__(self) -> str:
        head = f"{type(self).__name__} (direction={self.direction!r}, rule={self.rule!r}, scope={self.scope!r})"
        return head + super().__repr__().removeprefix(type(self).__name__)

    # ---- groups -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also in mid-training: it then shares the rate, or under other scopes finds its own."""
        # a group of another optimizer's brings its state along, which is not this one's
        mine = {
            name
            for name, value in param_group.items()
            if name.startswith("elra_") or (name in PUBLIC and isinstance(value, Tensor))
        }
        super().add_param_group({name: value for name, value in param_group.items() if name not in mine})
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._fill_group(group)
        self._all_groups.append(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check_number(name, group[name])
        unknown = set(group) - set(self.defaults) - {"params", "initial_lr", "param_names", "name"}
        for name in sorted(unknown & {"gain", "growth_limit", "horizon", "scope", "bounds", "restart_factor"}):
            if group[name] == getattr(self, name, getattr(self.rule, name, None)):
                continue  # ZeroRedundancyOptimizer copies what it was given for the optimizer into every group
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group is not supported: the rate rule is one for all groups; "
                f"pass {name} to the optimizer"
            )
        self.direction.check(group)

    def _fill_group(self, group: dict[str, Any]) -> None:
        """Give ``group`` the state that it lacks, and tensors in place of the numbers of a checkpoint."""
        first = self.param_groups[0]
        # a group may be empty for a while, as on ranks that hold nothing of it, and must not round the others' numbers then
        wide = not group["params"] or any(is_wide(p) for each in self.param_groups for p in each["params"])
        dtype = torch.float64 if wide else torch.float32
        ours = " ".join(name for name in PUBLIC if name not in group)
        lr = first.get("elra_lr", float(self.defaults["lr"]))
        for name, value in {**PLAIN, "elra_kind": self._kind, "elra_shown": ours, "elra_lr": lr}.items():
            group.setdefault(name, value)
        for name, start in {"alpha": float(self.defaults["lr"]), **self._scalars}.items():
            key = f"elra_{name}"
            value = group.get(key)
            shared = name not in self._cell_names or self.scope == "global"
            if value is None and shared and name not in ("multiplier", "effective_lr"):  # a late group has not moved
                value = first.get(key)
            # whatever the default device is; the step brings it to what all parameters call for, not those of this group alone
            value = torch.tensor(start if value is None else float(value), dtype=dtype, device="cpu")
            if not isinstance(group.get(key), Tensor):
                group[key] = value
        self._show(group)

    def _show(self, group: dict[str, Any]) -> None:
        """Publish what users read, unless the group brought a key of that name."""
        group |= {name: group[f"elra_{name}"] for name in group["elra_shown"].split()}

    # ---- schedule ---------------------------------------------------------------------------------------------------------

    def _shares(self) -> list[tuple[Any, Any]]:
        """(full, now) of each group: what η is over α at the schedule's full rate, and in this step. Floats, or 0-dim tensors.

        full is the group's lr over that of the optimizer, or over the lowest of the groups where no group has that. The
        schedule can only hold a rate down: what it writes counts as a share of the highest lr so far, ``initial_lr`` and
        ``max_lr`` of torch's schedulers included.
        """
        given = [_usable(number(group["lr"])) for group in self.param_groups]
        # DeepSpeed ZeRO takes groups away from param_groups while it steps another one
        known = list(self._all_groups)
        known += [each for each in self.param_groups if all(each is not one for one in self._all_groups)]
        own = float(self.param_groups[0]["elra_lr"])  # a scheduler fills a tensor lr in place
        bases = [group["elra_base"] for group in known if group["elra_base"] is not None]
        base = bases[0] if bases else None
        for group in known:
            if group["elra_full"] is None:  # reads a tensor, but once
                full = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
                if full > 0.0:
                    lr = number(group["lr"])
                    group["elra_top"] = torch.full_like(lr, full) if isinstance(lr, Tensor) else full
                    group["elra_full"] = full if base is None else self._late(full, base)
        fulls = [float(group["elra_full"]) for group in known if group["elra_full"] is not None]
        if base is None and fulls:
            base = own if any(math.isclose(full, own, rel_tol=1e-6) for full in fulls) else min(fulls)
            if max(fulls) > MOST_RATIO * base * (1.0 + 1e-6):
                base = max(fulls) / MOST_RATIO
            if base != own:  # as if it had been the optimizer's
                for group in known:
                    group["elra_alpha"].fill_(base)
        for group in known:
            group["elra_base"] = base
        shares: list[tuple[Any, Any]] = []
        for group, lr in zip(self.param_groups, given, strict=True):
            full, top = group["elra_full"], group["elra_top"]
            if full is None:
                shares.append((0.0, 0.0))
                continue
            ratio = float(full) / (base or own)
            if isinstance(top, Tensor):
                top.copy_(torch.maximum(top, torch.as_tensor(lr).to(top)))  # in place, for a CUDA graph
                shares.append((ratio, ratio * (lr / top)))
                continue
            if isinstance(lr, Tensor):  # put there for a step, as by distributed checkpoints
                shares.append((ratio, ratio * (lr / top)))
                continue
            if lr > top * (1.0 + 1e-6):
                if top == full:
                    warnings.warn(
                        f"a schedule raised lr of a parameter group from {top:g} to {lr:g}. ELRA finds the rate itself, and a "
                        "schedule can only hold it down: what is highest so far counts as the full rate. Give the scheduler "
                        f"rates relative to the group's, such as max_lr={full:g} or eta_min={0.01 * full:g}. If this is a "
                        "warm-up written by hand, set initial_lr of the group to its highest lr before the first step",
                        stacklevel=3,
                    )
                top = group["elra_top"] = lr
            shares.append((ratio, ratio * lr / top))
        return shares

    @staticmethod
    def _late(full: float, base: float) -> float:
        """What counts of the full lr of a group that comes when α has been found."""
        if full <= MOST_RATIO * base * (1.0 + 1e-6):
            return full
        warnings.warn(
            f"lr={full:g} of a parameter group that came late is {full / base:.3g} times lr={base:g}, which the rate was found "
            f"with; it counts as {MOST_RATIO:g} times. A group's lr is relative to the others': give one near theirs",
            stacklevel=4,
        )
        return MOST_RATIO * base

    # ---- states -----------------------------------------------------------------------------------------------------------

    def _peers(self, index: int, member: int, p: Tensor) -> tuple[Any, ...]:
        """What parameters have in common that count together: a group, as ZeRO steps groups apart, and a rate."""
        return index, member if self.scope == "tensor" else -1, p.device

    def _raise_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Bring the state of ``p`` to its device and to the dtype that it calls for, after ``model.float()`` or ``to()``."""
        state = self.state[p]
        for name, dtype in self.direction.dtypes(p, group).items():
            if name not in state:
                raise RuntimeError(
                    f"step: a parameter of shape {tuple(p.shape)} has no {name!r} in its state, which betas={group['betas']} "
                    "of its group call for: give them before the first step, or start the parameter afresh with "
                    "del optimizer.state[parameter]"
                )
            if state[name].shape != p.shape:  # kernels would read and write beyond it
                raise RuntimeError(
                    f"step: a parameter of shape {tuple(p.shape)} has a state of shape {tuple(state[name].shape)}: it was "
                    "resized, or its state is that of another model. To start it afresh, del optimizer.state[parameter]"
                )
            if state[name].dtype != dtype or state[name].device != p.device:
                state[name] = state[name].to(p.device, dtype)

    def _raise_counters(self) -> None:
        """Bring counters to the device of those that share them, and to the precision that the widest of these calls for."""
        having = [(p, self.state[p]) for group in self.param_groups for p in group["params"] if self.state.get(p)]
        wide = {id(state["step"]) for p, state in having if is_wide(p)}
        moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # (before, after), for the peers to go on sharing
        for p, state in having:
            dtype = torch.float64 if id(state["step"]) in wide else torch.float32
            for name in self.direction.counters:
                old = state[name]
                if old.dtype != dtype or old.device != p.device:
                    state[name] = moved.setdefault((id(old), p.device), (old, old.to(p.device, dtype)))[1]
