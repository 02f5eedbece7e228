"""Is the rate that ElraAdamW finds in a short search good for AdamW? Against the best of a sweep, and against 5e-5.

One search a task, as `RateFinder` does: at a constant rate, with the seed that the sweep was tuned with. Then AdamW at that
rate and at 5e-5, with the other seeds, all steps of the task and a linear schedule. The sweeps are rows of other studies.
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
from .run import RESULTS, TUNING_SEED, Done, Run, best_of_sweep, load, text, train, versions
from .tasks import TASKS

RIVAL, SEARCHER, SEARCH = "adamw", "elra_adamw", "search"  # the last takes the place of a schedule
# they hold AdamW at all rates of its sweep, and at the best of them with the seeds that report
SWEEPS = [RESULTS / "quick.csv", RESULTS / "language.csv"]
CHOSEN = (
    "digits-mlp", "digits-cnn", "mnist-mlp", "mnist-cnn", "minilm-probe", "bert-questions", "python-2x64", "gpt-lora-r8",
    "gpt-tune", "gpt-scratch",
)  # fmt: skip
STEPS = 200  # of a search, or all that the task has
SCHEDULE = "linear"
SEEDS = range(TUNING_SEED + 1, TUNING_SEED + 4)
DEFAULT = 5e-5  # of the Trainer
COLUMNS = [*Run._fields, "status", "error", "seconds", "versions", "found", "train_loss", "validation_loss", "test_loss"]


def search_of(task: str) -> Run:
    """The run that looks for the rate."""
    return Run(task, SEARCHER, SEARCH, f"{own_rate(SEARCHER):.3g}", TUNING_SEED, min(STEPS, TASKS[task].steps))


def at(task: str, rate: float) -> list[Run]:
    """AdamW at a rate, with the seeds that report."""
    return [Run(task, RIVAL, SCHEDULE, f"{rate:.3g}", seed, TASKS[task].steps) for seed in SEEDS]


def wanted(chosen: Sequence[str], done: Done) -> list[Run]:
    """The runs that are lacking now."""
    runs: list[Run] = []
    for task in chosen:
        search = search_of(task)
        rates = [float(done[search]["found"]), DEFAULT] if search in done else []
        runs += [search, *(run for rate in rates for run in at(task, rate))]
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
    swept: Done = {}
    for path in SWEEPS:
        swept |= load(path)
    columns: dict[str, list[float]] = {"at the rate found": [], f"at {DEFAULT:g}": []}
    rows = []
    for task in chosen:
        best = best_of_sweep(swept, task, RIVAL, TASKS[task].steps)
        assert best is not None
        base = mean(losses([swept[best._replace(seed=seed)] for seed in SEEDS]))
        found = float(done[search_of(task)]["found"])
        cells = [mean(losses([done[run] for run in at(task, rate)])) / base for rate in (found, DEFAULT)]
        for column, value in zip(columns.values(), cells, strict=True):
            column.append(value)
        rows.append(
            [task, f"{best.rate}, {best.schedule}", f"{found:.2g}", f"{found / float(best.rate):.2f}", *map(ratio, cells)]
        )
    rows.append(["geometric mean", "", "", "", *(ratio(geometric_mean(values)) for values in columns.values())])
    rows.append(["worst", "", "", "", *(ratio(max(values)) for values in columns.values())])
    return (
        f"Test loss of AdamW with a {SCHEDULE} schedule at the rate that `elra_adamw` found in {STEPS} steps, or in all "
        f"that the task has, and at {DEFAULT:g}, over its loss at the best rate and schedule of a sweep by half decades; "
        f"means over {len(SEEDS)} seeds.\n\n{markdown(['task', 'best of sweep', 'found', 'found / best', *columns], rows)}"
    )


def row_of(run: Run, measured: Callable[[Run], Row]) -> Row:
    """The row of a run."""
    row = attempt(run, measured, COLUMNS, versions(OPTIMIZERS[run.optimizer]))
    return {name: row[name] for name in COLUMNS}


def main(argv: Sequence[str] | None = None, chosen: Sequence[str] = CHOSEN) -> None:
    """The command line."""
    parts = {"adamw": (functools.partial(wanted, chosen), measure, functools.partial(report, chosen))}
    command("finder", "The rate found, given to AdamW", parts, row_of, argv, __doc__)
