"""What each part and constant of the rules is worth: the run without it, and with half and double of each constant.

Loss over that of the rule as it is, same tasks and seeds. Rows first, then FILE.md from the rows. The same command continues
after a stop of any kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from elra_hf import Adam, C2Min, Momentum, P2Min, Tracking
from elra_hf.directions import Direction
from elra_hf.pieces import Scalar
from elra_hf.rules import Decision, Dots, Memory, Rule
from elra_hf.variants import ADAM_FIRST
from recipes.sweep import Row

from .cells import geometric_mean, markdown, mean, ratio
from .optimizers import OPTIMIZERS, Optimizer
from .paper import attempt, command, own_rate
from .report import losses
from .run import TUNING_SEED, Done, Run, train, versions
from .tasks import TASKS

SEEDS = range(TUNING_SEED + 1, TUNING_SEED + 4)
AS_IT_IS = "as it is"
SHOWN = ("linear", "constant")

# ---- without a part --------------------------------------------------------------------------------------------------------


def blind(dots: Dots) -> Dots:
    """With the momentum at a right angle to the gradient, so that nothing outvotes the way back."""
    return {**dots, "gm": torch.zeros_like(dots["gm"])}


def restless(dots: Dots) -> Dots:
    """As if each step were one at the full rate, also those of a decay."""
    whole = (dots["steps"] > 0).to(dots["weight"])
    return {**dots, "weight": whole, "fading": whole}


def otherwise(dots: Dots) -> Dots:
    """With the other weights in the upper half of a decay: those that fall for those that do not, and the other way round."""
    return {**dots, "weight": dots["fading"], "fading": dots["weight"]}


@dataclass(frozen=True)
class Altered:
    """A rule that sees something else, or starts elsewhere.

    Args:
        rule: what decides.
        seen: what it is shown in place of the products.
        first: factor on its first rate.
    """

    rule: Rule
    seen: Callable[[Dots], Dots] = dict
    first: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Those of the rule."""
        return self.rule.needs

    @property
    def memory(self) -> Mapping[str, float]:
        """That of the rule."""
        return self.rule.memory

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        """Return what the rule makes of it."""
        decision = self.rule(alpha, self.seen(dots), memory)
        return decision._replace(alpha=torch.where(dots["steps"] == 0, self.first, 1.0) * decision.alpha)


class EvenAdam(Adam):
    """Adam as it was published: each gradient counts alike, whatever the rate that it was met at."""

    @staticmethod
    def _fresh(beta: float, weight: Scalar, rate: Scalar, least: float = 0.0) -> tuple[Any, Any]:
        total = beta * weight + 1.0
        return total, 1.0 / total


class MeanAdam(Adam):
    """All iterates weigh alike in the average."""

    power: ClassVar[int] = 0


class LateMomentum(Momentum):
    """The average weighs the k-th iterate with k."""

    power: ClassVar[int] = 1


class Careless(Momentum):
    """A gradient that has suddenly grown is followed like any other."""

    explodes: ClassVar[bool] = False


# ---- variants --------------------------------------------------------------------------------------------------------------

Variant = tuple[Direction, Rule]


def halves(direction: Direction, rule: Any, *names: str) -> dict[str, Variant]:
    """Half and double of each constant."""
    return {
        f"{name} {sign} 2": (direction, replace(rule, **{name: getattr(rule, name) * factor}))
        for name in names
        for sign, factor in (("/", 0.5), ("×", 2.0))
    }


TRACKING, C2MIN, P2MIN = Tracking(first=ADAM_FIRST), C2Min(), P2Min()
VARIANTS: dict[str, dict[str, Variant]] = {
    "elra_adamw": {
        AS_IT_IS: (Adam(), TRACKING),
        **halves(Adam(), TRACKING, "gain", "early_gain", "horizon", "first"),
        "never settles": (Adam(), replace(TRACKING, gain=TRACKING.early_gain)),
        "no vote of momentum": (Adam(), Altered(TRACKING, blind)),
        "listens in a decay": (Adam(), Altered(TRACKING, restless)),
        "listens less from the start of a decay": (Adam(), Altered(TRACKING, otherwise)),
        "starts at 1e-5": (Adam(), replace(TRACKING, first=None)),
        "gradients count alike": (EvenAdam(), TRACKING),
        "plain mean of the iterates": (MeanAdam(), TRACKING),
    },
    "elra_c2min": {
        AS_IT_IS: (Momentum(), C2MIN),
        **halves(Momentum(), C2MIN, "horizon"),
        "gain / 2": (Momentum(), replace(C2MIN, gain=0.25)),
        "gain 0.9": (Momentum(), replace(C2MIN, gain=0.9)),
        "first / 2": (Momentum(), Altered(C2MIN, first=0.5)),
        "first × 2": (Momentum(), Altered(C2MIN, first=2.0)),
        "no vote of momentum": (Momentum(), Altered(C2MIN, blind)),
        "listens in a decay": (Momentum(), Altered(C2MIN, restless)),
        "listens until half of the rate": (Momentum(), Altered(C2MIN, otherwise)),
        "follows exploded gradients": (Careless(), C2MIN),
        "later iterates weigh more": (LateMomentum(), C2MIN),
    },
    "elra_p2min": {
        AS_IT_IS: (Momentum(), P2MIN),
        **halves(Momentum(), P2MIN, "horizon"),
        "growth_limit 1.5": (Momentum(), replace(P2MIN, growth_limit=1.5)),
        "growth_limit 4": (Momentum(), replace(P2MIN, growth_limit=4.0)),
        "first / 2": (Momentum(), Altered(P2MIN, first=0.5)),
        "first × 2": (Momentum(), Altered(P2MIN, first=2.0)),
        "no vote of momentum": (Momentum(), Altered(P2MIN, blind)),
        "listens until half of the rate": (Momentum(), Altered(P2MIN, otherwise)),
        "follows exploded gradients": (Careless(), P2MIN),
        "later iterates weigh more": (LateMomentum(), P2MIN),
    },
}
IMAGES = ("digits-mlp", "digits-cnn", "mnist-mlp", "mnist-cnn")
CHOSEN = {
    "elra_adamw": ("gpt-small", "minilm-probe", *IMAGES),
    "elra_c2min": ("mnist-autoencoder", *IMAGES),
    "elra_p2min": ("mnist-autoencoder", *IMAGES),
}


# ---- rows ------------------------------------------------------------------------------------------------------------------


def wanted(name: str, done: Done) -> list[Run]:
    """The runs of one of ours that are lacking."""
    runs = (
        Run(task, f"{name}, {variant}", schedule, f"{own_rate(name):.3g}", seed, TASKS[task].steps)
        for task in CHOSEN[name]
        for variant in VARIANTS[name]
        for schedule in SHOWN
        for seed in SEEDS
    )
    return [run for run in runs if run not in done]


def measure(run: Run) -> Row:
    """What the bench measures of a run."""
    name, _, variant = run.optimizer.partition(", ")
    direction, rule = VARIANTS[name][variant]
    declared = Optimizer(
        "elra_hf:Elra", options={"direction": direction, "rule": rule}, package="elra_hf", ours=True, averaged=True
    )
    return train(run, declared, None)


COLUMNS = [
    *Run._fields, "status", "error", "seconds", "versions", "train_loss", "validation_loss", "test_loss", "averaged_test_loss",
    "alpha",
]  # fmt: skip


def row_of(run: Run, measured: Callable[[Run], Row]) -> Row:
    """The row of a run."""
    row = attempt(run, measured, COLUMNS, versions(OPTIMIZERS[run.optimizer.partition(", ")[0]]))
    return {name: row[name] for name in COLUMNS}


# ---- report ----------------------------------------------------------------------------------------------------------------


def report(name: str, done: Done, _: Path) -> str:
    """Each variant over the rule as it is."""

    def loss(task: str, variant: str, schedule: str) -> float:
        wanted = (task, f"{name}, {variant}", schedule)
        return mean(losses([row for run, row in done.items() if (run.task, run.optimizer, run.schedule) == wanted]))

    rows = []
    for variant in VARIANTS[name]:
        over = {s: [loss(task, variant, s) / loss(task, AS_IT_IS, s) for task in CHOSEN[name]] for s in SHOWN}
        pairs = zip(*over.values(), strict=True)
        means = (ratio(geometric_mean(over[schedule])) for schedule in SHOWN)
        rows.append([variant, *means, *(" / ".join(map(ratio, pair)) for pair in pairs)])
    return f"## {name}\n\n{markdown(['variant', *SHOWN, *CHOSEN[name]], rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parts = {name: (functools.partial(wanted, name), measure, functools.partial(report, name)) for name in VARIANTS}
    title = "What each part and constant is worth"
    command("ablation", title, parts, row_of, argv, __doc__)
