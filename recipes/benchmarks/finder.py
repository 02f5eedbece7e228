"""Is the rate that ElraAdamW finds in a short search good for AdamW? Against the best of a sweep, and against 5e-5.

One search a task, as `RateFinder` does: at a constant rate, with the seed that the sweep is tuned with; the other seeds report.
Rows first, then FILE.md from the rows. The same command continues after a stop of any kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from elra_hf.adapters.found import Trace
from recipes.sweep import Row

from .cells import geometric_mean, markdown, mean, ratio
from .optimizers import OPTIMIZERS
from .paper import attempt, command, own_rate
from .report import losses
from .run import TUNING_SEED, Done, Run, best_of_sweep, compare, number, text, train, versions
from .tasks import TASKS

RIVAL, SEARCHER, SEARCH = "adamw", "elra_adamw", "search"  # the last takes the place of a schedule
CHOSEN = (
    "digits-mlp", "digits-cnn", "mnist-mlp", "mnist-cnn", "mnist-autoencoder", "python-2x64", "bert-questions", "gpt-small",
    "gpt-small-lora",
)  # fmt: skip
STEPS = 200  # of a search, or all that the task has
SEEDS = range(TUNING_SEED + 1, TUNING_SEED + 4)
DEFAULT = 5e-5  # of the Trainer
COLUMNS = [
    *Run._fields,
    "status",
    "error",
    "seconds",
    "versions",
    "found",
    "train_loss",
    "validation_loss",
    "test_loss",
    "reached",
]


def search_of(task: str) -> Run:
    """The run that looks for the rate."""
    return Run(task, SEARCHER, SEARCH, f"{own_rate(SEARCHER):.3g}", TUNING_SEED, min(STEPS, TASKS[task].steps))


def at(task: str, schedule: str, rate: float) -> list[Run]:
    """AdamW at a rate, with the seeds that report."""
    return [Run(task, RIVAL, schedule, f"{rate:.3g}", seed, TASKS[task].steps) for seed in SEEDS]


def wanted(chosen: Sequence[str], done: Done) -> list[Run]:
    """The runs that are lacking now."""
    runs: list[Run] = []
    for task in chosen:
        search = search_of(task)
        runs += [search, *compare(task, RIVAL, SEEDS, TASKS[task].steps, done)[0]]
        rates = [DEFAULT, *([float(done[search]["found"])] if search in done else [])]
        runs += [run for schedule in OPTIMIZERS[RIVAL].schedules for rate in rates for run in at(task, schedule, rate)]
    return [run for run in dict.fromkeys(runs) if run not in done]


def measure(run: Run) -> Row:
    """What the bench measures of a run; of a search the rate that it found, in place of losses."""
    if run.schedule != SEARCH:
        return train(run, OPTIMIZERS[run.optimizer], None)
    problem = TASKS[run.task].build(run.seed)
    optimizer = OPTIMIZERS[run.optimizer].make([p for p in problem.model.parameters() if p.requires_grad], float(run.rate))
    problem.model.train()
    trace = Trace()
    for _ in range(run.steps):
        optimizer.zero_grad()
        problem.loss(problem.model, next(problem.batches)).backward()
        optimizer.step()
        trace.add(optimizer)
    found = trace.found()
    assert found is not None
    return {"status": "ok", "found": text(found.rate)}


def report(chosen: Sequence[str], done: Done, _: Path) -> str:
    """Losses over those of AdamW at the best rate and schedule of its sweep."""
    schedules = OPTIMIZERS[RIVAL].schedules
    columns: dict[str, list[float]] = {
        f"{name}, {schedule}": [] for name in ("found", f"{DEFAULT:g}") for schedule in schedules
    }
    rows = []
    for task in chosen:
        best = best_of_sweep({r: row for r, row in done.items() if r.schedule != SEARCH}, task, RIVAL, TASKS[task].steps)
        assert best is not None
        base = mean(losses([done[best._replace(seed=seed)] for seed in SEEDS]))
        found = float(done[search_of(task)]["found"])
        cells = []
        for rate in (found, DEFAULT):
            for schedule in schedules:
                cells.append(mean([number(done[run]["test_loss"]) for run in at(task, schedule, rate)]) / base)
        for column, value in zip(columns.values(), cells, strict=True):
            column.append(value)
        rows.append(
            [task, f"{best.rate}, {best.schedule}", f"{found:.2g}", f"{found / float(best.rate):.2f}", *map(ratio, cells)]
        )
    rows.append(["geometric mean", "", "", "", *(ratio(geometric_mean(values)) for values in columns.values())])
    rows.append(["worst", "", "", "", *(ratio(max(values)) for values in columns.values())])
    return (
        f"Test loss of AdamW at the rate found in {STEPS} steps, or all of the task, and at {DEFAULT:g}, over its "
        f"loss at the best rate and schedule of a sweep by half decades; means over {len(SEEDS)} seeds.\n\n"
        f"{markdown(['task', 'best of sweep', 'found', 'found / best', *columns], rows)}"
    )


def row_of(run: Run, measured: Callable[[Run], Row]) -> Row:
    """The row of a run."""
    row = attempt(run, measured, COLUMNS, versions(OPTIMIZERS[run.optimizer]))
    return {name: row[name] for name in COLUMNS}


def main(argv: Sequence[str] | None = None, chosen: Sequence[str] = CHOSEN) -> None:
    """The command line."""
    parts = {"adamw": (functools.partial(wanted, chosen), measure, functools.partial(report, chosen))}
    command("finder", "The rate found, given to AdamW", parts, row_of, argv, __doc__)
