"""What a rate rule can see: cosines along runs at fixed rates, early and late. Why ours follow the average of the iterates.

A table a task, a direction and a metric; a line a rate; averages over stretches of the run beside the validation loss that the
rate ends at. Each cell holds the cosine of the gradient with the way back along the last step, and that with the way back to
the average of the iterates. A rule raises the rate where its cosine is positive, so that it comes to rest where that is 0.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from elra_hf import Adam, Elra, Momentum
from elra_hf.directions import Direction
from elra_hf.rules import Decision, Dots, Memory, cosine

from .cells import markdown
from .optimizers import OPTIMIZERS, half_decade, nearest
from .run import RESULTS, TUNING_SEED, evaluate
from .tasks import TASKS

STRETCHES = ((1, 10), (10, 30), (30, 100), (100, None))  # steps
RATES = range(-2, 3)  # half decades around the usual rate
DIRECTIONS: dict[str, Direction] = {"adamw": Adam(), "sgd-momentum": Momentum()}  # by whose usual rates are taken


@dataclass(frozen=True)
class Fixed:
    """Leaves the rate as it is, and shows the cosine that ours follow."""

    needs: ClassVar[frozenset[str]] = frozenset({"gg", "gs", "ss"})
    memory: ClassVar[Mapping[str, float]] = {}

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        """Return ``alpha`` and the cosine."""
        return Decision(alpha, cosine(dots["gs"], dots["gg"], dots["ss"]), {})


def angle(gradients: Sequence[Tensor], ways: Sequence[Tensor], metrics: Sequence[Tensor]) -> float:
    """The cosine of a gradient with a way in the metric diag(``metrics``); all three cut into tensors alike."""
    products = [(g @ s, (g / m) @ g, (m * s) @ s) for g, s, m in zip(gradients, ways, metrics, strict=True)]
    return cosine(*torch.tensor(products, dtype=torch.float64).sum(0)).item()


def measure(task: str, direction: Direction, rate: float) -> dict[str, list[str]]:
    """By metric a line of its table: rate, in units of the typical weight too with Adam, stretches, last validation loss."""
    problem = TASKS[task].build(TUNING_SEED)
    params = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = Elra(params, direction, Fixed(), lr=rate)
    seen: dict[str, list[tuple[float, float]]] = {"Adam's metric": [], "Euclidean": []}
    if isinstance(direction, Momentum):
        del seen["Adam's metric"]
    last: list[Tensor] = []  # x_{t-1}
    problem.model.train()
    for _ in range(TASKS[task].steps):
        optimizer.zero_grad()
        problem.loss(problem.model, next(problem.batches)).backward()
        now = [p.detach().flatten().clone() for p in params]
        ways = [optimizer.state[p]["way"].flatten().clone() for p in params] if last else []
        optimizer.step()
        if last:
            gradients = [p.grad.flatten() for p in params]  # type: ignore[union-attr]
            steps = [then - here for then, here in zip(last, now, strict=True)]
            metrics = {"Euclidean": [torch.ones_like(x) for x in now]}
            if isinstance(direction, Adam):
                metrics["Adam's metric"] = [optimizer.state[p]["variance"].flatten().sqrt() + direction.eps for p in params]
            for name, cosines in seen.items():
                cosines.append((angle(gradients, steps, metrics[name]), angle(gradients, ways, metrics[name])))
        last = now
    validation = f"{evaluate(problem, 'validation')[0]:.3g}"
    scale = float(optimizer.param_groups[0]["elra_scale"])
    head = f"{rate:.2g} ({rate / scale:.2g} s)" if direction.relative else f"{rate:.2g}"
    return {name: [head, *stretches(cosines), validation] for name, cosines in seen.items()}


def stretches(cosines: Sequence[tuple[float, float]]) -> list[str]:
    """A cell a stretch: the averages of both cosines. The first is of step 2, since step 1 has no way behind it."""
    parts = [cosines[start - 1 : stop and stop - 1] for start, stop in STRETCHES]
    return ["{:+.2f}; {:+.2f}".format(*map(statistics.fmean, zip(*part, strict=True))) for part in parts]


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
        "# Cosines along fixed rates\n\nWritten by `python -m recipes.benchmarks cosines`: constant rates, one seed. Each cell "
        "holds the cosine of the gradient with the way back along the last step, and that with the way back to the average of "
        "the iterates; positive: the way was too short. A rule comes to rest where its cosine is 0. s is the typical size of "
        "a weight. Steps count those that have one behind them.\n"
    ]
    for task in args.tasks:
        for name, direction in DIRECTIONS.items():
            lines: dict[str, list[list[str]]] = {}
            for step in RATES:
                rate = half_decade(nearest(OPTIMIZERS[name].usual(TASKS[task])) + step)
                for metric, line in measure(task, direction, rate).items():
                    lines.setdefault(metric, []).append(line)
                    print(task, name, metric, *line, sep=" | ", flush=True)
            parts += [f"## {task}, {name}, {metric}\n\n{markdown(header, table)}" for metric, table in lines.items()]
    args.results.write_text("\n".join(parts))
    print(f"written: {args.results}")
