"""The optimizers of the bench, each with ONE configuration for all tasks; only a baseline's learning rate is swept.

Packages are imported when an optimizer is made, so that a missing one costs only its own rows.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min

from .tasks import Task

BOTH = ("constant", "linear")


def warm_up(share: float, then: Callable[[float], float]) -> Callable[[int, int], float]:
    """Rise linearly over that share of the steps, then follow ``then``: of the share of the other steps taken → factor."""

    def factor(step: int, steps: int) -> float:
        rising = math.ceil(share * steps)
        return (step + 1) / rising if step < rising else then((step - rising) / (steps - rising))

    return factor


# name → (step, steps) → factor of the learning rate
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1.0 - step / steps,
    "warmup-constant": warm_up(0.05, lambda share: 1.0),
    "warmup-linear": warm_up(0.05, lambda share: 1.0 - share),
    "warmup-cosine": warm_up(0.02, lambda share: (1.0 + math.cos(math.pi * share)) / 2.0),
}


@dataclass(frozen=True)
class Optimizer:
    """A declaration.

    Attributes:
        path: of the class, as module:name.
        rate: the learning rate for all tasks; None: swept.
        options: further arguments; what is not named stays at the package's default.
        scale: usual rate over AdamW's usual rate, where the rate is swept.
        centre: usual rate on every task; takes the place of ``scale``.
        schedules: those of `SCHEDULES` that it runs with.
        package: the name to install it by, with version.
        quick: belongs to the quick suite.
        ours: is one of this package's.
        averaged: keeps the average of the iterates, which is evaluated, too.
    """

    path: str
    rate: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    centre: float | None = None
    schedules: tuple[str, ...] = BOTH
    package: str = "torch"
    quick: bool = False
    ours: bool = False
    averaged: bool = False

    @property
    def configuration(self) -> str:
        """Class and options, for the record."""
        return f"{self.path.replace(':', '.')}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def usual(self, task: Task) -> float:
        """The centre of the sweep on ``task``."""
        return self.centre or self.scale * task.usual

    def missing(self) -> str | None:
        """What to do about a package that is not installed, or None."""
        if importlib.util.find_spec(self.path.split(":")[0].split(".")[0]):
            return None
        return f"{self.package} is not installed: run `make bench`, or `pip install --no-deps {self.package}`"

    def make(self, params: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
        """The optimizer of ``params``, with ``rate`` as its learning rate."""
        return pkgutil.resolve_name(self.path)(list(params), lr=rate, **self.options)


def ours(cls: type[torch.optim.Optimizer]) -> Optimizer:
    """With nothing set."""
    rate = inspect.signature(cls).parameters["lr"].default
    return Optimizer(f"elra_hf:{cls.__name__}", rate, package="elra_hf", quick=True, ours=True, averaged=True)


OPTIMIZERS: dict[str, Optimizer] = {
    "elra_adamw": ours(ElraAdamW),
    "elra_c2min": ours(ElraC2Min),
    "elra_p2min": ours(ElraP2Min),
    "adamw": Optimizer("torch.optim:AdamW", quick=True),
    "sgd-momentum": Optimizer("torch.optim:SGD", options={"momentum": 0.9}, scale=10.0, quick=True),
    "adam": Optimizer("torch.optim:Adam"),
    "sgd": Optimizer("torch.optim:SGD", scale=100.0),
    "adadelta": Optimizer("torch.optim:Adadelta", centre=1.0),
    "lion": Optimizer("lion_pytorch:Lion", scale=0.1, package="lion-pytorch==0.2.5"),
    "ranger": Optimizer("pytorch_optimizer:Ranger", package="pytorch_optimizer==4.1.0"),
    # what the Trainer does when nothing is set
    "hf-default": Optimizer("torch.optim:AdamW", 5e-5, {"weight_decay": 0.0}, schedules=("linear",), quick=True),
    "adamw-1e-3": Optimizer("torch.optim:AdamW", 1e-3, schedules=("linear",), quick=True),
    # the rules of thumb for adapters and for all weights
    "adamw-2e-4": Optimizer("torch.optim:AdamW", 2e-4, schedules=("linear",)),
    "adamw-2e-5": Optimizer("torch.optim:AdamW", 2e-5, schedules=("linear",)),
    # AlgoPerf's fixed point; its momentum follows no schedule of its own, which torch's does unless that is over at once
    "nadamw": Optimizer(
        "torch.optim:NAdam",
        1.749e-3,
        {"betas": (0.93266, 0.99552), "weight_decay": 0.0812, "decoupled_weight_decay": True, "momentum_decay": 1e3},
        schedules=("warmup-cosine",),
    ),
    "prodigy": Optimizer("prodigyopt:Prodigy", 1.0, package="prodigyopt==1.1.2", quick=True),
    "prodigy-safeguard": Optimizer("prodigyopt:Prodigy", 1.0, {"safeguard_warmup": True}, package="prodigyopt==1.1.2"),
    "dadapt-adam": Optimizer("dadaptation:DAdaptAdam", 1.0, package="dadaptation==3.2", quick=True),
    "schedule-free": Optimizer(
        "schedulefree:AdamWScheduleFree", 2.5e-3, schedules=("constant",), package="schedulefree==1.4.1", quick=True
    ),
    "schedule-free-warmup": Optimizer(
        "schedulefree:AdamWScheduleFree",
        2.5e-3,
        {"betas": (0.9, 0.9955)},
        schedules=("warmup-constant",),
        package="schedulefree==1.4.1",
    ),
}


def half_decade(index: int) -> float:
    """The rates of all sweeps: …, 1e-3, 3.16e-3, 1e-2, …."""
    return 10.0 ** (index / 2)


def nearest(rate: float) -> int:
    """The index of the rate nearest to ``rate``."""
    return round(2 * math.log10(rate))
