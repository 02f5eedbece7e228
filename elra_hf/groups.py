"""What a parameter group and a parameter carry from step to step: filling, loading, saving, pickling. No mathematics."""

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


def is_wide(param: Tensor) -> bool:
    """Whether ``param`` calls for a rate in float64."""
    return param.dtype in (torch.float64, torch.complex128)


def number(lr: Any) -> Any:
    """A learning rate as a float, or as a 0-dim tensor where it is a tensor of one number."""
    return lr.detach().reshape(()) if isinstance(lr, Tensor) else float(lr)


class Groups(Optimizer):
    """The upkeep of `Elra`, which adds the step."""

    direction: Direction
    rule: Rule
    scope: str
    process_group: dist.ProcessGroup | None

    @property
    def _cell_names(self) -> dict[str, float]:
        """What is kept for each rate beside α, with start values: sizes of the weights, steps taken, the memory of the rule."""
        return {"scale": 0.0, **dict.fromkeys(SIZES, 0.0), "steps": 0.0, **self.rule.memory}

    @property
    def _scalars(self) -> dict[str, float]:
        """Names and start values of all 0-dim tensors of a group but α."""
        return {**SCALARS, **self._cell_names}

    @property
    def _kind(self) -> str:
        """What tells whether a checkpoint is one of this optimizer."""
        return f"{type(self.direction).__name__}/{type(self.rule).__name__}"

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
        for group in self.param_groups:
            lr, full, top = number(group["lr"]), group["elra_full"], group["elra_top"]
            if full is None:
                shares.append((0.0, 0.0))
                continue
            ratio = float(full) / (base or own)
            if isinstance(top, Tensor):
                top = group["elra_top"] = torch.maximum(top, torch.as_tensor(lr).to(top))
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
                        f"rates relative to the group's, such as max_lr={full:g} or eta_min={0.01 * full:g}",
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

    # ---- saving and loading -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Everything but ``process_group`` and what goes with it, which does not pickle: pass it again where it is needed."""
        own = ("direction", "rule", "scope", "bounds", "restart_factor", "check_sync")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = list(self.param_groups)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("dealt", None)
        self.__dict__.setdefault("check_sync", False)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch puts it among the defaults, and no fresh group has it
                    group.setdefault(name, value)
            for name in ("elra_tensor", "elra_ages"):  # of checkpoints only
                group.pop(name, None)
            self._fill_group(group)
            if isinstance(group["lr"], Tensor) and group["elra_top"] is not None:  # a number in the checkpoint
                group["elra_top"] = torch.as_tensor(group["elra_top"]).to(number(group["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """As torch does, with numbers for the tensors of a group, and a counter for each parameter.

        Numbers, since they go into JSON and to any device; a counter each, since distributed checkpoints load in place.
        """
        state_dict = super().state_dict()
        for group, mine in zip(state_dict["param_groups"], self.param_groups, strict=False):
            group["elra_ages"] = self._ages(mine)
            own = {name for name in group if name.startswith("elra_")} | set(group["elra_shown"].split())
            group |= {name: float(group[name]) for name in own if isinstance(group[name], Tensor)}
            if self.process_group is not None:  # FSDP1's checkpoints take a group without a tensor for one thing
                group["elra_tensor"] = torch.zeros((), device="cpu")
        for key, state in state_dict["state"].items():
            if isinstance(state, dict):  # hooks put in what they like
                state_dict["state"][key] = {
                    name: value.clone() if name in self.direction.counters else value for name, value in state.items()
                }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, with each state tensor in the dtype that its parameter calls for.

        Raises:
            ValueError: ``state_dict`` is that of another optimizer.
        """
        seen: dict[str, Any] = {}

        def look(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # after all other hooks, which may hand over another dictionary
            seen.update(given, param_groups=self._mended(given["param_groups"]))
            self._refuse_foreign(seen)
            return seen

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        state_dict = seen
        saved = [(i, age) for group in state_dict["param_groups"] for i, age in self._aged(group)]
        params = [(index, group, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        shared: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        for member, ((i, age), (index, group, p)) in enumerate(zip(saved, params, strict=True)):
            loaded = state_dict["state"].get(i, {})
            if not loaded:
                continue
            dtypes = self.direction.dtypes(p, group)
            for name, dtype in dtypes.items():
                if name in loaded and loaded[name].dtype != self.state[p][name].dtype:  # torch has rounded it
                    self.state[p][name] = loaded[name].to(device=p.device, dtype=dtype, copy=True)
                elif name in self.state[p]:
                    self.state[p][name] = self.state[p][name].to(dtype)
            if "elra" in loaded:
                self.state[p]["elra"] = loaded["elra"].detach().clone()
            # peers of one age share their counters; others may have come to the same count, and go on apart
            counts = {name: float(loaded.get(name, 0.0)) for name in self.direction.counters}
            fresh = {name: torch.tensor(n, dtype=torch.float64, device="cpu") for name, n in counts.items()}
            self.state[p].update(shared.setdefault((self._peers(index, member, p), age, *counts.values()), fresh))
        self._raise_counters()

    def _ages(self, group: dict[str, Any]) -> str:
        """Which parameters of ``group`` share their counters: a number for each, those of one number do; "" where all do.

        A string, as the rest of what distributed checkpoints expect to be of one length. "" also of slices, of which each rank
        has others.
        """
        if self.process_group is not None:
            return ""
        numbers: dict[int, str] = {}
        ages = [id(self.state[p]["step"]) if self.state.get(p) else 0 for p in group["params"]]
        names = [numbers.setdefault(age, str(len(numbers))) for age in ages]
        return " ".join(names) if len(numbers) > 1 else ""

    @staticmethod
    def _aged(group: dict[str, Any]) -> list[tuple[Any, str]]:
        """The parameters of a group of a checkpoint, each with its age."""
        ages = group.get("elra_ages", "").split()
        return list(zip(group["params"], ages + [""] * len(group["params"]), strict=False))

    def _mended(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``groups`` of a checkpoint, those without parameters made whole: what they hold gets lost on torch's way."""
        full = next((group for group in groups if group["params"]), None)
        if full is None or len(groups) != len(self.param_groups):
            return groups
        names = {"kind", "base", "calls"}
        if self.scope == "global":  # all have one rate, and the step reads it from the first
            names |= {"alpha", *self._scalars} - {*OWN}
        common = {key: full[key] for name in names if (key := f"elra_{name}") in full}
        return [
            group if group["params"] else {**own, **group, **common}
            for group, own in zip(groups, self.param_groups, strict=True)
        ]

    def _peers(self, index: int, member: int, p: Tensor) -> tuple[Any, ...]:
        """What parameters have in common that count together: a group, as ZeRO steps groups apart, and a rate."""
        return index, member if self.scope == "tensor" else -1, p.device

    def _refuse_foreign(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for the state of another optimizer, or of another of ours."""
        groups = state_dict["param_groups"]
        kinds = {group.get("elra_kind") for group in groups}
        if kinds <= {self._kind}:
            return
        had = next((kind for kind in kinds if kind), None)
        what = f"an ELRA optimizer of direction/rule {had}" if had else "another optimizer, or of ELRA before version 0.2"
        raise ValueError(
            f"load_state_dict: state_dict is the state of {what}, and this is {type(self).__name__} ({self._kind}). "
            "Continue with the optimizer that the run was started with, or start this one afresh from the weights alone "
            "(under the Trainer: delete optimizer.pt in the checkpoint)"
        )

    def __repr__(self) -> str:
        head = f"{type(self).__name__} (direction={self.direction!r}, rule={self.rule!r}, scope={self.scope!r})"
        return head + super().__repr__().removeprefix(type(self).__name__)

    def _raise_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Bring the state of ``p`` to its device and to the dtype that it calls for, after ``model.float()`` or ``to()``."""
        state = self.state[p]
        for name, dtype in self.direction.dtypes(p, group).items():
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
