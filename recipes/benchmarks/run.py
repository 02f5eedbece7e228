"""Train optimizers on the learning tasks; one CSV row a run, which a second start continues.

    python -m recipes.benchmarks.run --tasks digits-mlp mnist-cnn --optimizers elra_adamw --seeds 1 2 3
    python -m recipes.benchmarks.run --tasks digits-mlp --optimizers adamw --rates 1e-3 3e-3 1e-2 3e-2

Validation loss is for choosing configurations, test loss for reporting; use other seeds for the one than for the other.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min
from recipes.benchmarks.tasks import TASKS, Batch, Problem
from recipes.sweep import Row, complete, table

# name: (parameters, keyword arguments: lr where one is given) -> optimizer
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "elra_c2min": ElraC2Min,
    "elra_p2min": ElraP2Min,
    "elra_adamw": ElraAdamW,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda params, **lr: torch.optim.SGD(params, momentum=0.9, **lr),
    "adadelta": torch.optim.Adadelta,
}
SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda done: 1.0, "linear": lambda done: 1.0 - done}
RESULTS = Path("outputs/benchmarks/results.csv")
METRICS = ("validation_loss", "test_loss", "test_metric", "train_loss", "seconds")


def main() -> None:
    """Run what is missing, then print the table of the runs asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = [name for name, task in TASKS.items() if task.quick]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=quick, help="default: the quick ones", metavar="TASK")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS][:3])
    parser.add_argument("--rates", nargs="+", default=[""], help="learning rates; default: each optimizer's own")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["linear"])
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--steps", type=int, help="default: each task's own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        {
            "task": task,
            "optimizer": optimizer,
            "learning_rate": rate,
            "schedule": schedule,
            "seed": seed,
            "steps": str(args.steps or TASKS[task].steps),
        }
        for seed in args.seeds
        for task in args.tasks
        for optimizer in args.optimizers
        for rate in args.rates
        for schedule in args.schedules
    ]
    rows = complete(args.results, runs, measure)
    asked = [row for row in rows if any(run.items() <= row.items() for run in runs)]
    Console().print(table(asked, ["task", "optimizer", "learning_rate", "schedule"], METRICS))


def measure(run: Row) -> Row:
    """Train once. A run that diverges has NaN for its losses."""
    problem = TASKS[run["task"]].build(int(run["seed"]))
    steps, shape = int(run["steps"]), SCHEDULES[run["schedule"]]
    given = {"lr": float(run["learning_rate"])} if run["learning_rate"] else {}
    optimizer = OPTIMIZERS[run["optimizer"]]([p for p in problem.model.parameters() if p.requires_grad], **given)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))
    started = time.perf_counter()
    problem.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(problem.model, next(problem.batches))
        loss.backward()
        if not math.isfinite(loss.item()):
            break
        optimizer.step()
        scheduler.step()
    seconds = time.perf_counter() - started
    problem.model.eval()
    losses = {f"{split}_loss": mean(problem, split, problem.loss) for split in ("validation", "test", "train")}
    metric = mean(problem, "test", problem.metric) if problem.metric else math.nan
    values = {**losses, "test_metric": metric, "seconds": seconds}
    return {name: f"{values[name]:.4f}" for name in METRICS}


@torch.no_grad()
def mean(problem: Problem, split: str, score: Callable[[nn.Module, Batch], Tensor]) -> float:
    """Mean of ``score`` over the batches of a split."""
    batches = problem.splits[split]
    value = sum(score(problem.model, batch).float().mean().item() for batch in batches) / len(batches)
    return value if math.isfinite(value) else math.nan


if __name__ == "__main__":
    main()
