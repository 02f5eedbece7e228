"""The rate that a run found, and what it is worth to other optimizers. Needs no framework."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elra_hf.average import reshard
from elra_hf.directions import Adam
from elra_hf.optimizer import Elra, unwrap
from elra_hf.reduce import local

# Between as many and twice as many steps of a run are kept, at equal distances.
KEPT = 512
# A rate has settled when its mean over the last quarter of the search is within this factor of that over the quarter before.
SETTLED = 1.2
# A run shorter than that is not said to have settled.
LEAST = 100


@dataclass(frozen=True)
class Found:
    """The rate of a run, before the share of it that the schedule lets through.

    The geometric mean of α over the second half of the run, each step weighed with the schedule's share: the first half is
    for the search, and what a decayed rate was multiplied with hardly moved the weights.

    Attributes:
        optimizer: the name of its class.
        adamw: whether it moves along AdamW's direction, so that its rate is one for AdamW.
        rates: of each parameter group.
        drift: mean rate of the last quarter of the search over that of the quarter before; of the group that drifts most. Where
            a schedule has fallen to half of its highest share the search is over, and the rate stands still for that reason.
        steps: how many steps were seen.
    """

    optimizer: str
    adamw: bool
    rates: tuple[float, ...]
    drift: float
    steps: int

    @property
    def rate(self) -> float:
        """That of the first group."""
        return self.rates[0]

    @property
    def settled(self) -> bool:
        """Whether longer runs would hardly find another rate."""
        return self.steps >= LEAST and 1.0 / SETTLED < self.drift < SETTLED

    def line(self, schedule: str) -> str:
        """One line for people.

        Args:
            schedule: the schedule of the run, in words.
        """
        return sentence(self.optimizer, self.adamw, self.rates, schedule) + self._doubt()

    def _doubt(self) -> str:
        if self.settled:
            return ""
        if 1.0 / SETTLED < self.drift < SETTLED:
            return f" These were {self.steps} steps; of fewer than {LEAST} the rate is a first guess."
        return f" It was still {'rising' if self.drift > 1.0 else 'falling'} at the end, so that a longer run may find another."


def sentence(optimizer: str, adamw: bool, rates: tuple[float, ...], schedule: str) -> str:
    """What `Found.line` says of a rate that has settled."""

    def listed(factor: float = 1.0) -> str:
        shown = list(dict.fromkeys(f"{factor * rate:.2g}" for rate in rates))
        if len(shown) == 1:
            return shown[0]
        return f"{', '.join(f'{factor * rate:.2g}' for rate in rates)} by parameter group"

    if adamw:
        return f"{optimizer} found the rate {listed()}. The same for AdamW: lr {listed()}, schedule as here ({schedule})."
    return (
        f"{optimizer} found the rate {listed()}. It is a rate for SGD (with momentum 0.9: lr {listed(0.1)}, schedule as here, "
        f"{schedule}) and none for AdamW; elra_adamw finds that."
    )


def facts(optimizer: str, adamw: bool, rate: float, schedule: str) -> dict[str, Any]:
    """What a model card says of a rate that was found, for `write_card`."""
    rounded = float(f"{rate:.3g}")
    own = {"adamw_lr": rounded} if adamw else {}
    return {"optimizer": optimizer, "found_rate": rounded, **own, "schedule": schedule}


class Trace:
    """The rates of a run's steps, thinned out, so that a long run takes no more memory. Never waits for the device."""

    def __init__(self) -> None:
        self.steps = 0
        self._stride = 1
        self._rows: list[Tensor] = []
        self._name, self._adamw = "", False
        self._ratios: list[tuple[Any, Any]] = []

    def add(self, optimizer: Elra) -> None:
        """Look at the step just taken."""
        groups = optimizer.param_groups
        if self.steps % self._stride == 0:
            # copies, since nobody promises that a step makes new tensors
            self._rows.append(torch.stack([g[f"elra_{name}"] for name in ("alpha", "multiplier") for g in groups]))
        if len(self._rows) == 2 * KEPT:
            self._rows, self._stride = self._rows[::2], 2 * self._stride
        self.steps += 1
        self._name, self._adamw = type(optimizer).__name__, isinstance(optimizer.direction, Adam)
        self._ratios = [(g["elra_full"], g["elra_base"]) for g in groups]

    def found(self) -> Found | None:
        """What was found; None before a step. Waits for the device."""
        if not self._rows:
            return None
        # a group may have come late
        table = torch.stack([row for row in self._rows if len(row) == len(self._rows[-1])]).double().cpu()
        alphas, shares = table.chunk(2, 1)
        logs, n = alphas.log(), len(table)
        weights = shares[n // 2 :]
        weights = torch.where(weights.sum(0) > 0, weights, 1.0)  # a group may be held still
        means = ((logs[n // 2 :] * weights).sum(0) / weights.sum(0)).exp()
        ratios = [float(full or 0.0) / float(base or 1.0) for full, base in self._ratios]
        searching = shares > 0.5 * shares.cummax(0).values
        drifts = [_drift(column[on]) for column, on in zip(logs.unbind(1), searching.unbind(1), strict=True)]
        drift = math.exp(max(drifts, key=abs))
        rates = tuple(ratio * mean for ratio, mean in zip(ratios, means.tolist(), strict=True))
        return Found(self._name, self._adamw, rates, drift, self.steps)


def _drift(logs: Tensor) -> float:
    """Mean of the last quarter less that of the quarter before; infinite where that cannot be told."""
    n = len(logs)
    if 0 < n < 4:
        return math.inf
    return (logs[n - n // 4 :].mean() - logs[n // 2 : n - n // 4].mean()).item() if n else 0.0


class Snapshot:
    """What a training is about to change, to be put back bit for bit. Kept on the CPU.

    Args:
        module: holds the weights and buffers.
        optimizer: ours, or a wrapper of it.

    Raises:
        TypeError: there is no ELRA optimizer inside.
        ValueError: the optimizer trains what are no parameters of ``module``, or under torch's ZeroRedundancyOptimizer.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self.module, self.optimizer = module, unwrap(optimizer)
        if self.optimizer.dealt is not None:
            raise ValueError(
                "RateFinder: ZeroRedundancyOptimizer gives each rank an optimizer of some of the weights, which could not put "
                "the others back: find the rate without it, on one device or with DDP or FSDP"
            )
        own = {id(p) for p in module.parameters()}
        if not all(id(p) in own for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "RateFinder: the optimizer trains copies or slices of the weights, as under DeepSpeed, which cannot be put "
                "back: find the rate without DeepSpeed, on one device or with DDP or FSDP"
            )
        self.tensors: dict[Tensor, Tensor] = {}
        self.keep([p for group in self.optimizer.param_groups for p in group["params"]])
        self.keep(module.buffers())
        self.state = copy.deepcopy(self.optimizer.state_dict())
        self.handle = self.optimizer.register_step_pre_hook(self._keep_late)
        self.numpy = getattr(sys.modules.get("numpy"), "random", None)  # where somebody uses it
        self.random = (random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all())
        self.random_numpy = self.numpy.get_state() if self.numpy else None

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep ``tensors``, unless they are kept already."""
        for tensor in tensors:
            if tensor not in self.tensors:
                self.tensors[tensor] = local(tensor.detach()).to("cpu", copy=True)

    def _keep_late(self, *_: Any) -> None:
        """Before each step, keep what parameter groups bring that have been added since."""
        for group in self.optimizer.param_groups[len(self.state["param_groups"]) :]:
            self.keep(group["params"])

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back."""
        self.handle.remove()
        for tensor, saved in self.tensors.items():
            local(tensor.detach()).copy_(saved)
        reshard(self.module)
        del self.optimizer.param_groups[len(self.state["param_groups"]) :]
        self.optimizer.load_state_dict(self.state)
        self.optimizer.zero_grad()
        python, cpu, cuda = self.random
        random.setstate(python)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        if self.numpy:
            self.numpy.set_state(self.random_numpy)


class Search:
    """The part of a `RateFinder` that all frameworks share.

    Args:
        steps: stop after so many; None: once the rate has settled.

    Raises:
        ValueError: ``steps`` is no positive number.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and not (isinstance(steps, int) and steps > 0):
            raise ValueError(f"RateFinder: steps={steps!r} is invalid: give a positive whole number, or None to stop by itself")
        self.steps = steps
        self.found: Found | None = None
        self.trace = Trace()
        self._before: Snapshot | None = None

    def start(self, module: nn.Module, optimizer: Any) -> None:
        """Remember how everything is.

        Raises:
            ValueError: the optimizer is none of ours, or DeepSpeed has cut the weights into slices.
        """
        try:
            self._before = Snapshot(module, optimizer)
        except TypeError as error:
            name = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ValueError(f"RateFinder: {name} finds no rate: train with ElraAdamW (optim=elra_adamw)") from error
        self.trace = Trace()

    def hold(self, optimizer: Any) -> None:
        """Before each step, hold the schedule at its full rate: a warm-up or decay would hide the rate that is looked for."""
        for group in unwrap(optimizer).param_groups:
            full = group.get("max_lr", group.get("initial_lr"))
            if isinstance(group["lr"], Tensor) and full is not None:
                group["lr"].fill_(full)
            elif full is not None:
                group["lr"] = full

    def look(self, optimizer: Any) -> bool:
        """After each step: whether to stop."""
        self.trace.add(unwrap(optimizer))
        if self.steps is not None:
            return self.trace.steps >= self.steps
        found = self.trace.found() if self.trace.steps % 25 == 0 else None  # reading waits for the device
        return found is not None and found.settled

    def finish(self) -> str:
        """Put everything back; return what to say."""
        self.found = self.trace.found()
        if self._before is not None:
            self._before.restore()
            self._before = None
        return f"RateFinder: {self.trace.steps} steps; weights, optimizer and random numbers are as before."
