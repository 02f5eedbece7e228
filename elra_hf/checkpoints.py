"""Saving, loading and pickling of what groups and parameters carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .groups import OWN, Groups, number
from .hands import MARKS, Hands
from .pieces import PLAIN_TENSORS


class Checkpoints(Groups):
    """What `Elra` hands to checkpoints, and takes from them."""

    def __getstate__(self) -> dict[str, Any]:
        """Everything but ``process_group`` and what goes with it, which does not pickle: pass it again where it is needed."""
        self._look_at_hands()
        own = ("direction", "rule", "scope", "bounds", "restart_factor", "check_sync")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_hands": Hands(self._hands.marks)}

    def _look_at_hands(self) -> None:
        """Let what is saved know what others have done to the parameters since the last step."""
        if self.process_group is None:  # slices are written to by those who cut them
            self._hands.look([p for group in self.param_groups for p in group["params"]], self.state, self.direction.power)
        self._hands.tell(self.state, self.direction.power)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._all_groups = list(self.param_groups)
        # what is loaded is nobody's move
        marks = {}
        for group in self.param_groups:
            for entry in group.pop("elra_moved", "").split():
                position = entry.rstrip("".join(MARKS))
                marks[group["params"][int(position)]] = entry.removeprefix(position)
        if "_hands" not in state:  # of a pickle
            self._hands = Hands(marks)
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
        self._look_at_hands()
        state_dict = super().state_dict()
        marks = self._hands.marks
        for group, mine in zip(state_dict["param_groups"], self.param_groups, strict=False):
            group["elra_ages"] = self._ages(mine)
            group["elra_moved"] = " ".join(f"{i}{marks[p]}" for i, p in enumerate(mine["params"]) if p in marks)
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
            ValueError: ``state_dict`` is that of another optimizer, or of parameters of other shapes.
        """
        seen: dict[str, Any] = {}

        def look(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            # after all other hooks, which may hand over another dictionary
            seen.update(given, param_groups=self._mended(given["param_groups"]))
            self._refuse_foreign(seen)
            self._refuse_shapes(seen)
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
            self.state[p].pop("elra", None)
            if self.scope == "tensor":  # what its group knows, where the checkpoint is one of another scope
                known = [group[f"elra_{name}"] for name in ("alpha", *self._cell_names)]
                self.state[p]["elra"] = loaded["elra"].detach().clone() if "elra" in loaded else torch.stack(known)
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

    def _refuse_shapes(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for the state of parameters of other shapes; the step sees those of slices."""
        pairs = list(zip(state_dict["param_groups"], self.param_groups, strict=False))
        if self.process_group is not None or any(len(given["params"]) != len(own["params"]) for given, own in pairs):
            return  # torch refuses other numbers of parameters
        for given, group in pairs:
            for i, p in zip(given["params"], group["params"], strict=True):
                state = state_dict["state"].get(i, {}) if type(p) in PLAIN_TENSORS else {}
                if not state:
                    continue
                for shape in (state[name].shape for name in self.direction.dtypes(p, group) if name in state):
                    if shape != p.shape:
                        raise ValueError(
                            f"load_state_dict: state_dict has a state of shape {tuple(shape)} for a parameter of shape "
                            f"{tuple(p.shape)}: it is that of another model, or its parameters came in another order. Load it "
                            "into the model that it was saved with, or start the optimizer afresh (under the Trainer: delete "
                            "optimizer.pt in the checkpoint)"
                        )
