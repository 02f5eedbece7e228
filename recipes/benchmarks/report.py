"""Write tables and pictures from the rows of a bench: FILE.md, FILE-regret.png and FILE-start-rates.png next to FILE.csv."""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from elra_hf import ElraAdamW
from recipes.sweep import Row, read

from .optimizers import OPTIMIZERS
from .run import RESULTS, START_RATE_SEED, START_RATES, TUNING_SEED, Done, best_of_sweep, compare, key, number
from .tasks import TASKS

Rows = list[Row]
Entries = dict[str, Rows]  # label of an optimizer with its configuration → its runs with the reporting seeds
PLATEAU = 1.05  # a loss up to this many times the best one counts as equally good
CAP = 10.0  # where pictures end


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


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, infinite if a value is."""
    return math.inf if math.inf in values else statistics.fmean(values)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean, infinite if a value is."""
    values = list(values)
    return math.inf if math.inf in values else statistics.geometric_mean(values)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation, as text."""
    if math.inf in values:
        return f"{values.count(math.inf)} of {len(values)} failed"
    deviation = f" ± {statistics.stdev(values):.{digits}g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}g}{deviation}"


def ratio(value: float) -> str:
    """A quotient of losses, as text."""
    return "failed" if value == math.inf else f"{value:.3f}" if value < 100 else f"{value:.2g}"


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


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
    """What the quick suite's optimizers lack on each task."""
    lines = []
    for task in tasks:
        steps = next(run.steps for run in done if run.task == task)
        lacking = []
        for name, declared in OPTIMIZERS.items():
            known = any((run.task, run.optimizer) == (task, name) for run in done)
            runs, more = compare(task, name, [1, 2, 3], steps, done)
            if (declared.quick or known) and (runs or more):
                lacking.append(f"{name} ({len(runs) + more} runs)")
        if lacking:
            lines.append(f"{task}: {', '.join(lacking)}")
    absent = [name for name, task in TASKS.items() if task.quick and name not in tasks]
    return [*lines, *([f"all of: {', '.join(absent)}"] if absent else [])]


# ---- start rates -----------------------------------------------------------------------------------------------------------


def start_rate_curves(done: Done) -> dict[str, dict[str, list[float]]]:
    """Task → optimizer with schedule → test loss from each of `START_RATES`, where all were run."""
    rates = [f"{rate:.3g}" for rate in START_RATES]
    curves: dict[str, dict[str, list[float]]] = {}
    for task in dict.fromkeys(run.task for run in done):
        for name, declared in OPTIMIZERS.items():
            for schedule in declared.schedules:
                runs = {
                    run.rate: row
                    for run, row in done.items()
                    if (run.task, run.optimizer, run.schedule, run.seed) == (task, name, schedule, START_RATE_SEED)
                }
                if all(rate in runs for rate in rates):
                    curve = [number(runs[rate]["test_loss"]) for rate in rates]
                    curves.setdefault(task, {})[f"{name}, {schedule}"] = curve
    return curves


def plateau(curve: Sequence[float]) -> tuple[float, float]:
    """The first and the last start rate of the stretch around the best whose losses are within `PLATEAU` of it."""
    best = min(range(len(curve)), key=lambda i: curve[i])
    low = high = best
    while low > 0 and curve[low - 1] <= PLATEAU * curve[best]:
        low -= 1
    while high < len(curve) - 1 and curve[high + 1] <= PLATEAU * curve[best]:
        high += 1
    return START_RATES[low], START_RATES[high]


def plateau_table(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Decades of start rates that end equally well."""
    names = dict.fromkeys(name for of_task in curves.values() for name in of_task)
    rows = []
    for name in names:
        cells = []
        for of_task in curves.values():
            if name not in of_task:
                cells.append("")
                continue
            low, high = plateau(of_task[name])
            cells.append(f"{round(math.log10(high / low))} ({low:.0e} … {high:.0e})")
        rows.append([name, *cells])
    return markdown(["optimizer", *curves], rows)


# ---- pictures --------------------------------------------------------------------------------------------------------------


def plot_regret(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """One line an optimizer: a dot a task, a bar at the geometric mean; what is beyond the axis sits at its end."""
    names = sorted(found, key=lambda name: -geometric_mean(found[name].values()))
    tasks = list(dict.fromkeys(task for name in names for task in found[name]))
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for color, task in enumerate(tasks):
        points = [(min(found[name][task], CAP), line) for line, name in enumerate(names) if task in found[name]]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=f"C{color}", alpha=0.7, label=task)
    middles = [min(geometric_mean(found[name].values()), CAP) for name in names]
    axes.plot(middles, range(len(names)), "k|", markersize=14, markeredgewidth=2, label="geometric mean")
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"test loss over that of AdamW tuned for the task (beyond {CAP:g}: at the edge)")
    axes.set_yticks(range(len(names)), names)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100)


def plot_start_rates(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel a task, test loss against the start rate; a run that failed leaves a gap."""
    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    colors = {
        name: f"C{index}" for index, name in enumerate(dict.fromkeys(n.split(",")[0] for c in curves.values() for n in c))
    }
    for axes, (task, of_task) in zip(panels, curves.items(), strict=True):
        for name, curve in of_task.items():
            optimizer, schedule = name.split(", ")
            values = [loss if math.isfinite(loss) else math.nan for loss in curve]
            style = "-o" if schedule == "linear" else ":o"
            axes.plot(START_RATES, values, style, color=colors[optimizer], markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(task, fontsize="medium")
        axes.set_ylabel("test loss")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("start rate")
    figure.savefig(path, dpi=100)


# ---- the report ------------------------------------------------------------------------------------------------------------


def report(path: Path) -> str:
    """Draw the pictures of a file of rows next to it, and return the text.

    Raises:
        ValueError: there are no rows, or rows of a task or optimizer that is not declared, or of two lengths of a task.
    """
    done = {key(row): row for row in read(path)}
    if not done:
        raise ValueError(f"{path} has no rows: python -m recipes.benchmarks run --results {path}")
    for run in done:
        if run.task not in TASKS or run.optimizer not in OPTIMIZERS:
            raise ValueError(f"{path} has a run of {run.task} with {run.optimizer}, which is not declared: delete its rows")
    tasks = list(dict.fromkeys(run.task for run in done))
    for task in tasks:
        lengths = sorted({run.steps for run in done if run.task == task})
        if len(lengths) > 1:
            raise ValueError(f"{path} has runs of {task} with {lengths} steps: keep each number in a file of its own")
    tables = {task: entries(done, task) for task in tasks}
    learning = {task: table for task, table in tables.items() if TASKS[task].goal is None}
    functions = {task: table for task, table in tables.items() if TASKS[task].goal is not None}
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
            plot_regret(found, path.with_name(f"{path.stem}-regret.png"))
            parts.append(f"![Regret]({path.stem}-regret.png)\n")
        parts += [
            "## Test loss over the best SGD with momentum of a sweep\n",
            regret_table(learning, MOMENTUM),
        ]
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
            f"Start rates from 1e-9 to 1, seed {START_RATE_SEED}.\n",
            plateau_table(curves),
            f"![Start rates]({path.stem}-start-rates.png)\n",
        ]
    for task, table in learning.items():
        if table:
            parts += [f"## {task}\n", task_table(table)]
    lacking = missing(done, tasks)
    if lacking:
        parts += ["## Missing\n", "".join(f"- {line}\n" for line in lacking)]
    return "\n".join(parts)


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
