"""Write tables and pictures from the rows of a bench: FILE.md and FILE-*.png next to FILE.csv."""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from elra_hf import ElraAdamW
from recipes.sweep import Row

from .cells import geometric_mean, markdown, mean, ratio, spread
from .optimizers import OPTIMIZERS
from .pictures import plot_alphas, plot_regret, plot_start_rates
from .run import (
    CURVE,
    RESULTS,
    START_RATE_SEED,
    TUNING_SEED,
    VARIATIONS,
    VARIED,
    Done,
    best_of_sweep,
    compare,
    curve_steps,
    default_optimizers,
    in_suite,
    load,
    number,
    varied,
)
from .start_rates import PLATEAU, alpha_curves, plateau_table, start_rate_curves
from .tasks import find

Rows = list[Row]
Entries = dict[str, Rows]  # label of an optimizer with its configuration → its runs with the reporting seeds


# ---- which rows ------------------------------------------------------------------------------------------------------------


def label(optimizer: str, schedule: str) -> str:
    """Name of a line of the tables."""
    declared = OPTIMIZERS[optimizer]
    if declared.rate is None:
        return f"{optimizer}, best of sweep"
    return f"{optimizer}, {schedule}" if len(declared.schedules) > 1 else optimizer


LABELS = {label(name, s): name for name, declared in OPTIMIZERS.items() for s in declared.schedules}
REFERENCE = label("adamw", "")
MOMENTUM = label("sgd-momentum", "")
RIVALS = [REFERENCE, MOMENTUM, *(name for name, of in LABELS.items() if OPTIMIZERS[of].rate and not OPTIMIZERS[of].ours)]


def entries(done: Done, task: str) -> Entries:
    """The runs of a task that are reported; a sweep only once it is complete."""
    found: Entries = {}
    steps = next(run.steps for run in done if run.task == task)
    for name, declared in OPTIMIZERS.items():
        if declared.rate is None:
            lacking, _ = compare(task, name, [], steps, done)
            best = None if lacking else best_of_sweep(done, task, name, steps)
            chosen = {(best.schedule, best.rate)} if best else set()
        else:
            chosen = {(schedule, f"{declared.rate:.3g}") for schedule in declared.schedules}
        for run, row in done.items():
            if (run.task, run.optimizer) == (task, name) and (run.schedule, run.rate) in chosen and run.seed != TUNING_SEED:
                found.setdefault(label(name, run.schedule), []).append(row)
    return {name: found[name] for name in LABELS if name in found}


def losses(rows: Rows, column: str = "test_loss") -> list[float]:
    """One value a seed, infinite where a run crashed or diverged."""
    return [number(row[column]) for row in sorted(rows, key=lambda row: int(row["seed"]))]


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def regret(tables: Mapping[str, Entries], reference: str) -> dict[str, dict[str, float]]:
    """Entry → task → mean test loss over the reference's, on the tasks where the reference was run."""
    found: dict[str, dict[str, float]] = {}
    for task, table in tables.items():
        if reference in table:
            base = mean(losses(table[reference]))
            for name, rows in table.items():
                found.setdefault(name, {})[task] = mean(losses(rows)) / base
    return found


def deviation(tables: Mapping[str, Entries], reference: str, name: str) -> float | None:
    """Standard deviation over the seeds of the geometric mean over tasks; None with fewer than two seeds."""
    shared = [table for table in tables.values() if reference in table and name in table]
    seeds = zip(*([loss / mean(losses(t[reference])) for loss in losses(t[name])] for t in shared), strict=False)
    means = [geometric_mean(seed) for seed in seeds]
    return statistics.stdev(means) if len(means) > 1 and math.inf not in means else None


# ---- text ------------------------------------------------------------------------------------------------------------------


def regret_table(tables: Mapping[str, Entries], reference: str) -> str:
    """Geometric mean, worst task and every task, best entry first; entries that lack tasks come last."""
    found = regret(tables, reference)
    tasks = list(found.get(reference, ()))
    if not tasks:
        return "No task has the reference yet.\n"
    order = sorted(found, key=lambda name: (len(tasks) - len(found[name]), geometric_mean(found[name].values())))
    rows = []
    for name in order:
        of = found[name]
        worst = max(of, key=lambda task: of[task])
        error = deviation(tables, reference, name)
        middle = ratio(geometric_mean(of.values())) + (f" ± {error:.3f}" if error is not None else "")
        lacking = len(tasks) - len(of)
        rows.append(
            [name + (f" ({lacking} tasks missing)" if lacking else ""), middle, f"{ratio(of[worst])} ({worst})"]
            + [ratio(of[task]) if task in of else "" for task in tasks]
        )
    return markdown(["optimizer", "geometric mean", "worst", *tasks], rows)


def variation_table(tables: Mapping[str, Entries]) -> str:
    """Geometric mean over the tasks for each variation, from the entries that have all of its tasks."""
    found = regret(tables, REFERENCE)
    groups: dict[str, list[str]] = {}
    for task in found.get(REFERENCE, {}):
        groups.setdefault(task.partition("@")[2] or "as it is", []).append(task)
    rows = []
    for name, of in found.items():
        complete = [all(task in of for task in tasks) for tasks in groups.values()]
        means = [
            ratio(geometric_mean(of[task] for task in tasks)) if ok else ""
            for tasks, ok in zip(groups.values(), complete, strict=True)
        ]
        rows.append([name, *means])
    return markdown(["optimizer", *groups], rows)


def steps_to(runs: Rows, target: float) -> int | None:
    """After how many steps the validation loss, mean over the seeds, is first at or below ``target``."""
    if any(row["status"] != "ok" for row in runs):
        return None
    curves = [[number(value) for value in row["curve"].split(";")] for row in runs]
    taken = curve_steps(int(runs[0]["steps"]))
    return next((steps for steps, values in zip(taken, zip(*curves, strict=True), strict=True) if mean(values) <= target), None)


def steps_table(tables: Mapping[str, Entries], done: Done) -> str | None:
    """Steps to the last validation loss of the best AdamW; None where no row tells."""
    lines: dict[str, dict[str, str]] = {}
    for task, table in tables.items():
        if REFERENCE not in table:
            continue
        target = mean(losses(table[REFERENCE], "validation_loss"))
        if target == math.inf:
            continue
        for name, runs in table.items():
            if any(row["status"] == "ok" and not row["curve"] for row in runs):
                continue  # of before curves were kept
            steps = steps_to(runs, target)
            cell = "–" if steps is None else str(steps)
            if OPTIMIZERS[LABELS[name]].rate is None and steps is not None:
                tried = sum((run.task, run.optimizer, run.seed) == (task, LABELS[name], TUNING_SEED) for run in done)
                cell += f" ({tried * int(runs[0]['steps'])})"
            lines.setdefault(name, {})[task] = cell
    shown = [task for task in tables if any(task in line for line in lines.values())]
    rows = [[name, *(lines[name].get(task, "") for task in shown)] for name in LABELS if name in lines]
    return markdown(["optimizer", *shown], rows) if rows else None


def task_table(table: Entries) -> str:
    """All that was measured on a task."""
    rows = []
    for name, runs in table.items():
        first = runs[0]
        metric = losses(runs, "test_metric")
        rows.append(
            [
                f"{name}: {first['schedule']} {first['rate']}" if OPTIMIZERS[LABELS[name]].rate is None else name,
                str(len(runs)),
                *(spread(losses(runs, column)) for column in ("train_loss", "test_loss")),
                "" if math.inf in metric else spread(metric),
                spread(losses(runs, "alpha"), 2) if first["alpha"] else "",
                f"{mean(losses(runs, 'restarts')):.1f}" if first["restarts"] else "",
                f"{mean(losses(runs, 'seconds')):.3g}",
            ]
        )
    header = ["optimizer", "seeds", "train loss", "test loss", "test metric", "last α", "restarts", "seconds"]
    return markdown(header, rows)


def solved_table(tables: Mapping[str, Entries]) -> str:
    """Functions: median number of steps to the goal; where most seeds miss it, the last loss over the first."""
    names = [name for name in LABELS if any(name in table for table in tables.values())]
    rows = []
    for name in names:
        cells = []
        for table in tables.values():
            runs = table.get(name, [])
            steps = statistics.median(losses(runs, "reached")) if runs else math.nan
            if math.isfinite(steps):
                cells.append(f"{steps:.0f}")
            else:
                cells.append(
                    f"({statistics.median(number(r['test_loss']) / number(r['start_loss']) for r in runs):.1e})" if runs else ""
                )
        rows.append([name, *cells])
    return markdown(["optimizer", *tables], rows)


def verdict(name: str, tables: Mapping[str, Entries]) -> str:
    """Where one of ours stands, and where it loses."""
    standing = []
    for rival in RIVALS:
        of = regret(tables, rival).get(name, {})
        if of:
            lost = sorted((task for task, value in of.items() if value > 1.0), key=lambda task: -of[task])
            told = ", ".join(f"{task} {ratio(of[task])}" for task in lost)
            middle = ratio(geometric_mean(of.values()))
            standing.append([rival, middle, f"{len(lost)} of {len(of)}", told or "nowhere"])
    lines = []
    runs = [row for table in tables.values() for row in table.get(name, [])]
    low, high = inspect.signature(ElraAdamW).parameters["bounds"].default
    troubles = {
        "crashed or diverged": [r for r in runs if r["status"] != "ok"],
        "ended with a training loss above its start": [r for r in runs if number(r["train_loss"]) > number(r["start_loss"])],
        "ended with α at a bound": [r for r in runs if r["alpha"] and not low * 1.001 < float(r["alpha"]) < high * 0.999],
    }
    for trouble, rows in troubles.items():
        where = ", ".join(f"{row['task']} seed {row['seed']}" for row in rows)
        lines.append(f"{trouble}: {len(rows)} of {len(runs)} runs" + (f" ({where})" if where else ""))
    table = markdown(["against", "geometric mean", "loses on", "where"], standing)
    return f"### {name}\n\n{table}\n" + "".join(f"- {line}\n" for line in lines)


def missing(done: Done, tasks: Sequence[str]) -> list[str]:
    """What the suite, or the studies, that the file holds tasks of lack."""
    variations = {task.partition("@")[2] for task in tasks}
    studies = [study for study, of in VARIATIONS.items() if variations & set(of)]
    suite = "quick" if any(find(task).quick for task in tasks) else "full"
    wanted = [task for study in studies for task in varied(study, VARIED)] or in_suite(suite)
    lines = []
    for task in tasks:
        steps = next(run.steps for run in done if run.task == task)
        optimizers = default_optimizers(studies[0] if studies else "compare", suite, task)
        lacking = []
        for name in OPTIMIZERS:
            known = any((run.task, run.optimizer) == (task, name) for run in done)
            runs, more = compare(task, name, [1, 2, 3], steps, done)
            if (name in optimizers or known) and (runs or more):
                lacking.append(f"{name} ({len(runs) + more} runs)")
        if lacking:
            lines.append(f"{task}: {', '.join(lacking)}")
    absent = [task for task in wanted if task not in tasks]
    return [*lines, *([f"all of: {', '.join(absent)}"] if absent else [])]


# ---- the report ------------------------------------------------------------------------------------------------------------


def report(path: Path) -> str:
    """Draw the pictures of a file of rows next to it, and return the text.

    Raises:
        ValueError: there are no rows, or rows of a task or optimizer that is not declared, or of two lengths of a task.
    """
    done = load(path)
    if not done:
        raise ValueError(f"{path} has no rows: python -m recipes.benchmarks run --results {path}")
    for run in done:
        if not declared(run.task) or run.optimizer not in OPTIMIZERS:
            raise ValueError(f"{path} has a run of {run.task} with {run.optimizer}, which is not declared: delete its rows")
    tasks = list(dict.fromkeys(run.task for run in done))
    for task in tasks:
        lengths = sorted({run.steps for run in done if run.task == task})
        if len(lengths) > 1:
            raise ValueError(f"{path} has runs of {task} with {lengths} steps: keep each number in a file of its own")
    tables = {task: entries(done, task) for task in tasks}
    learning = {task: table for task, table in tables.items() if find(task).goal is None}
    functions = {task: table for task, table in tables.items() if find(task).goal is not None}
    failed = sum(row["status"] != "ok" for row in done.values())
    minutes = sum(float(row["total_seconds"] or 0.0) for row in done.values()) / 60
    parts = [
        f"# Bench: {path.stem}\n",
        f"{len(done)} runs, {failed} of them crashed or diverged, {minutes:.0f} minutes of one (shared) core. Written by "
        f"`python -m recipes.benchmarks report`; how it was measured: README.md. Versions: {versions(done)}.\n",
    ]
    if learning:
        found = regret(learning, REFERENCE)
        parts += [
            "## Test loss over the best AdamW of a sweep\n",
            "Mean over the reporting seeds, divided by that of AdamW with the rate and schedule that validation picked for the "
            "task. Below 1 is better than tuned AdamW. ±: standard deviation over the seeds.\n",
            regret_table(learning, REFERENCE),
        ]
        if found:
            middles = {name: geometric_mean(of.values()) for name, of in found.items()}
            plot_regret(found, middles, path.with_name(f"{path.stem}-regret.png"))
            parts.append(f"![Regret]({path.stem}-regret.png)\n")
        if any("@" in task for task in learning):
            parts += ["## The same by variation: geometric mean over the tasks\n", variation_table(learning)]
        steps = steps_table(learning, done)
        if steps:
            parts += [
                "## Steps to the last validation loss of the best AdamW\n",
                f"After how many steps the validation loss, mean over the seeds and taken {CURVE} times a run, is first at or "
                "below what the best AdamW ends with, which AdamW itself may reach earlier. In brackets: the steps of all runs "
                "of the sweep that found the configuration. –: never.\n",
                steps,
            ]
        if any(MOMENTUM in table for table in learning.values()):
            parts += ["## Test loss over the best SGD with momentum of a sweep\n", regret_table(learning, MOMENTUM)]
        mine = [name for name in LABELS if OPTIMIZERS[LABELS[name]].ours and any(name in table for table in learning.values())]
        if mine:
            parts += [
                "## Where ours stand, and where they lose\n",
                "Quotients of test losses, as above.\n",
                *(verdict(name, learning) for name in mine),
            ]
    if functions:
        parts += [
            "## Functions: steps until the loss is a millionth of the first\n",
            "Median over the seeds; in brackets, where most seeds do not get there: last loss over first.\n",
            solved_table(functions),
        ]
    curves = start_rate_curves(done)
    if curves:
        plot_start_rates(curves, path.with_name(f"{path.stem}-start-rates.png"))
        parts += [
            f"## Decades of start rates that end within {PLATEAU - 1:.0%} of the best\n",
            f"Start rates from 1e-9 to 1, seed {START_RATE_SEED}. Last: the largest test loss over the smallest.\n",
            plateau_table(curves),
            f"![Start rates]({path.stem}-start-rates.png)\n",
        ]
    alphas = alpha_curves(done)
    if alphas:
        plot_alphas(alphas, path.with_name(f"{path.stem}-alpha.png"))
        parts += [
            "## α from every start rate\n",
            f"Constant schedule, seed {START_RATE_SEED}; one line a start rate.\n",
            f"![α from every start rate]({path.stem}-alpha.png)\n",
        ]
    for task, table in learning.items():
        if table:
            parts += [f"## {task}\n", task_table(table)]
    lacking = missing(done, tasks)
    if lacking:
        parts += ["## Missing\n", "".join(f"- {line}\n" for line in lacking)]
    return "\n".join(parts)


def declared(task: str) -> bool:
    """Whether the bench knows the task."""
    try:
        find(task)
    except ValueError:
        return False
    return True


def versions(done: Done) -> str:
    """All that the rows name."""
    return ", ".join(sorted({each for row in done.values() for each in row["versions"].split()}))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m recipes.benchmarks report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "quick.csv", help="CSV file (default: %(default)s)")
    path = parser.parse_args(argv).results
    try:
        text = report(path)
    except ValueError as error:
        sys.exit(str(error))
    path.with_suffix(".md").write_text(text)
    print(f"written: {path.with_suffix('.md')}")
