"""What a rate rule can see: cosines along runs of AdamW's direction at fixed rates, early and late. Source of Tracking's rule.

A table a task, a line a rate: the median vote of the tensors and the one cosine of all, averaged over stretches of the run,
beside the validation loss that the rate ends at.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from elra_hf import Adam, Elra
from elra_hf.rules import Clock, Dots, cosine, weighted_median

from .cells import markdown
from .optimizers import half_decade, nearest
from .run import RESULTS, TUNING_SEED, evaluate
from .tasks import TASKS

STRETCHES = ((1, 10), (10, 30), (30, 100), (100, None))  # steps
RATES = range(-2, 3)  # half decades around AdamW's usual rate


@dataclass(frozen=True)
class Fixed:
    """Leaves the rate as it is and notes, step by step, the vote of the tensors and the one cosine of all."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    votes: ClassVar[bool] = True
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


def measure(task: str, rate: float) -> list[str]:
    """A line of the table: rate, in units of the typical weight too, stretches, last validation loss."""
    problem = TASKS[task].build(TUNING_SEED)
    rule = Fixed()
    optimizer = Elra([p for p in problem.model.parameters() if p.requires_grad], Adam(), rule, lr=rate)
    problem.model.train()
    for _ in range(TASKS[task].steps):
        optimizer.zero_grad()
        problem.loss(problem.model, next(problem.batches)).backward()
        optimizer.step()
    cells = []
    for start, stop in STRETCHES:
        votes, wholes = zip(*rule.seen[start:stop], strict=True)
        cells.append(f"{statistics.fmean(votes):+.2f}; {statistics.fmean(wholes):+.2f}")
    scale = float(optimizer.param_groups[0]["scale"])
    return [f"{rate:.2g} ({rate / scale:.2g} s)", *cells, f"{evaluate(problem, 'validation')[0]:.3g}"]


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
        "# Cosines along fixed rates\n\nWritten by `python -m recipes.benchmarks cosines`: AdamW's direction at constant "
        "rates, one seed. In each cell the median vote of the tensors (weighed by the root of their size) and the one cosine "
        "of all, between the gradient and the step before; s is the typical size of a weight.\n"
    ]
    for task in args.tasks:
        lines = []
        for step in RATES:
            lines.append(measure(task, half_decade(nearest(TASKS[task].usual) + step)))
            print(task, *lines[-1], sep=" | ", flush=True)
        parts.append(f"## {task}\n\n{markdown(header, lines)}")
    args.results.write_text("\n".join(parts))
    print(f"written: {args.results}")
