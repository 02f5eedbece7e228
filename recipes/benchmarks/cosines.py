"""What a rate rule can see: cosines along runs at fixed rates, early and late. Source of how each of our rules settles.

A table a task and a direction, a line a rate, averages over stretches of the run beside the validation loss that the rate ends
at. Along AdamW's direction the median vote of the tensors and the one cosine of all; along that of c2min and p2min the cosine
of successive gradients and the share of the steps that overshoot.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from elra_hf import Adam, C2Min, Elra, Momentum
from elra_hf.rules import Clock, Dots, cosine, weighted_median

from .cells import markdown
from .optimizers import OPTIMIZERS, half_decade, nearest
from .run import RESULTS, TUNING_SEED, evaluate
from .tasks import TASKS

STRETCHES = ((1, 10), (10, 30), (30, 100), (100, None))  # steps
RATES = range(-2, 3)  # half decades around the usual rate
DIRECTIONS = {"adamw": Adam(), "sgd-momentum": Momentum()}  # by the baseline whose usual rates are taken


@dataclass(frozen=True)
class Votes:
    """Leaves the rate as it is and notes, step by step, the vote of the tensors and the one cosine of all."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    told: ClassVar[str] = "{:+.2f}; {:+.2f}"
    votes: ClassVar[bool] = True
    clips: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    clock: ClassVar[Clock] = "steps"
    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gd", "dd"})

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        """Return ``alpha`` and the vote."""
        known = (dots["gg"] > 0) & (dots["dd"] > 0)
        vote = weighted_median(cosine(dots["gd"], dots["gg"], dots["dd"]), dots["size"].sqrt() * known)
        whole = cosine(*(dots[name].sum(1) for name in ("gd", "gg", "dd")))
        self.seen.append((vote.item(), whole.item()))
        return alpha, vote


@dataclass(frozen=True)
class Overshoots:
    """Leaves the rate as it is and notes, step by step, the cosine of successive gradients and whether the step overshot."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    told: ClassVar[str] = "{:+.2f}; {:.0%}"
    votes: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    clock: ClassVar[Clock] = "overshoots"
    needs: ClassVar[frozenset[str]] = C2Min.needs

    def __call__(self, alpha: Tensor, dots: Dots) -> tuple[Tensor, Tensor]:
        """Return ``alpha`` and the cosine."""
        cos = cosine(dots["gp"], dots["gg"], dots["pp"])
        self.seen.append((cos.item(), float(dots["gd"] < 0)))
        return alpha, cos


def measure(task: str, direction: Adam | Momentum, rate: float) -> list[str]:
    """A line of the table: rate, in units of the typical weight too with Adam, stretches, last validation loss."""
    problem = TASKS[task].build(TUNING_SEED)
    rule = Votes() if isinstance(direction, Adam) else Overshoots()
    optimizer = Elra([p for p in problem.model.parameters() if p.requires_grad], direction, rule, lr=rate)
    problem.model.train()
    for _ in range(TASKS[task].steps):
        optimizer.zero_grad()
        problem.loss(problem.model, next(problem.batches)).backward()
        optimizer.step()
    cells = []
    for start, stop in STRETCHES:
        cells.append(rule.told.format(*map(statistics.fmean, zip(*rule.seen[start:stop], strict=True))))
    scale = float(optimizer.param_groups[0]["scale"])
    head = f"{rate:.2g} ({rate / scale:.2g} s)" if rule.relative else f"{rate:.2g}"
    return [head, *cells, f"{evaluate(problem, 'validation')[0]:.3g}"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.benchmarks cosines", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    learning = [name for name, task in TASKS.items() if task.quick and task.goal is None]
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=learning, metavar="TASK", help="of tasks.py")
    parser.add_argument("--results", type=Path, default=RESULTS / "cosines.md", help="Markdown file")
    args = parser.parse_args(argv)
    header = ["rate", *(f"steps {a} to {b or 'the end'}" for a, b in STRETCHES), "validation loss"]
    parts = [
        "# Cosines along fixed rates\n\nWritten by `python -m recipes.benchmarks cosines`: constant rates, one seed. Along "
        "AdamW's direction each cell holds the median vote of the tensors (weighed by the root of their size) and the one "
        "cosine of all, between the gradient and the step before; s is the typical size of a weight. Along that of c2min and "
        "p2min the cosine of successive gradients, and the share of steps that overshoot (⟨G_t, d_{t-1}⟩ below 0).\n"
    ]
    for task in args.tasks:
        for name, direction in DIRECTIONS.items():
            lines = []
            for step in RATES:
                rate = half_decade(nearest(OPTIMIZERS[name].usual(TASKS[task])) + step)
                lines.append(measure(task, direction, rate))
                print(task, name, *lines[-1], sep=" | ", flush=True)
            parts.append(f"## {task}, {name}\n\n{markdown(header, lines)}")
    args.results.write_text("\n".join(parts))
    print(f"written: {args.results}")
