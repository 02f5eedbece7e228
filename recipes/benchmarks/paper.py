"""The paper's own experiments (arXiv 2309.06274), its baselines at their defaults and tuned: paths, saddles, MNIST.

Rows first, one a run, appended to a CSV file as soon as the run has finished; then FILE.md and FILE-*.png from the rows alone.
The same command continues after a stop of any kind. A run that crashes or diverges is a row, too; to repeat it, delete the row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from recipes.sweep import Row, append, read

from .cells import markdown, mean, spread
from .functions import FUNCTIONS, SADDLE_LOWEST, Function, himmelblau, monkey_saddle, problem, tilted_saddle
from .optimizers import OPTIMIZERS
from .run import RESULTS, TUNING_SEED, Done, Run, best_of_sweep, evaluate, key, mend, number, one_line, sweep, text, versions
from .tasks import TASKS, Task

OURS = ("elra_c2min", "elra_p2min", "elra_adamw")
CLAIMED = ("elra_c2min", "elra_p2min")  # those of the paper
DEFAULTS = {"adam": 1e-3, "adadelta": 1.0}  # the rivals, with their default rates

COLUMNS = [
    *Run._fields, "status", "error", "seconds", "versions", "reached", "validation_loss", "alpha", "restarts", "deviation_30",
    "deviation", "left", "train_loss", "test_loss", "train_accuracy", "test_accuracy", "path", "turned",
]  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------------


def at(task: str, optimizer: str, rate: float, seed: int, steps: int) -> Run:
    """A run at a constant rate."""
    return Run(task, optimizer, "constant", f"{rate:.3g}", seed, steps)


def own_rate(optimizer: str) -> float:
    """The one rate of an optimizer that has one for all tasks: α_0 for ours."""
    return OPTIMIZERS[optimizer].rate or DEFAULTS[optimizer]


def attempt(run: Run, measure: Callable[[Run], Row], columns: Sequence[str], needed: str) -> Row:
    """The row of a run, whatever becomes of it. ``needed``: versions of the packages that took part."""
    began = time.perf_counter()
    row = dict.fromkeys(columns, "") | {name: str(value) for name, value in run._asdict().items()}
    try:
        row |= measure(run)
    except Exception as error:
        row |= {"status": "crashed", "error": one_line(error)}
    return row | {"seconds": text(time.perf_counter() - began), "versions": needed}


def fill(path: Path, wanted: Callable[[Done], list[Run]], row_of: Callable[[Run], Row]) -> Done:
    """Run what ``wanted`` finds lacking in the rows so far, until that is nothing, and return all rows of the file."""
    mend(path)
    done = {key(row): row for row in read(path)}
    while lacking := wanted(done):
        for place, run in enumerate(lacking, start=1):
            row = row_of(run)
            append(path, row)
            done[run] = row
            told = f"{row['status']} {row['error']}".strip()
            print(f"{place} of {len(lacking)} | {' '.join(map(str, run))}: {told}, {float(row['seconds']):.1f} s", flush=True)
    return done


# ---- paths -----------------------------------------------------------------------------------------------------------------


def bowl(z: Tensor) -> Tensor:
    """(x² + 20 y²)/2, an elongated bowl. Lowest at the origin."""
    x, y = z
    return 0.5 * (x**2 + 20.0 * y**2)


PATHS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {  # function and start
    "tilted saddle": (tilted_saddle, (1.0, 0.02)),
    "monkey saddle": (monkey_saddle, (0.3, 0.5)),
    "bowl": (bowl, (2.0, 0.5)),
    "Himmelblau": (himmelblau, (0.0, -0.5)),
}
PATH_RATES = {"adam": 0.1, "adadelta": 10.0}  # at their defaults they would hardly have moved
PATH_STEPS = 100
ANGLE = 30.0  # degrees


def turn(degrees: float) -> Tensor:
    """Q, a rotation of the plane."""
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)


def walk(name: str, optimizer: str, rate: float, degrees: float, steps: int) -> Tensor:
    """The points Q·x_0 … Q·x_steps of training f(Q·x) from Qᵀ·start, shape (steps + 1, 2).

    In these coordinates a method that follows the rotation walks the same path for every angle.
    """
    function, start = PATHS[name]
    model = Function(function, 0.0, turn(degrees), torch.tensor(start, dtype=torch.float64))
    made = OPTIMIZERS[optimizer].make(model.parameters(), rate)
    points = [model.x.detach().clone()]
    for _ in range(steps):
        made.zero_grad()
        model().backward()
        made.step()
        points.append(model.x.detach().clone())
    return torch.stack(points) @ model.rotation.T


def deviation(path: Tensor, turned: Tensor) -> float:
    """Largest distance between two paths at the same step, over the largest distance of the first from its start."""
    return float((path - turned).norm(dim=1).max() / (path - path[0]).norm(dim=1).max())


def pack(path: Tensor) -> str:
    """Points as a cell: x:y x:y …."""
    return " ".join(f"{x:.3g}:{y:.3g}" for x, y in path.tolist())


def unpack(cell: str) -> list[list[float]]:
    """All x and all y of a cell."""
    return [list(values) for values in zip(*(map(float, point.split(":")) for point in cell.split()), strict=True)]


def measure_path(run: Run) -> Row:
    """Both paths and how far they come apart, within 30 steps and within all."""
    path, turned = (walk(run.task.removeprefix("path "), run.optimizer, float(run.rate), a, run.steps) for a in (0.0, ANGLE))
    return {
        "status": "ok" if bool(path.isfinite().all()) else "diverged",
        "deviation_30": text(deviation(path[:31], turned[:31])),
        "deviation": text(deviation(path, turned)),
        "path": pack(path),
        "turned": pack(turned),
    }


def wanted_paths(done: Done) -> list[Run]:
    """Every function with every optimizer."""
    rates = {name: own_rate(name) for name in OURS} | PATH_RATES
    runs = [at(f"path {name}", optimizer, rate, 1, PATH_STEPS) for name in PATHS for optimizer, rate in rates.items()]
    return [run for run in runs if run not in done]


# ---- saddles ---------------------------------------------------------------------------------------------------------------


def flat_saddle(z: Tensor) -> Tensor:
    """Σ_{i>1} z_i²/2 - z_1²/20 + z_1⁴/40: of many directions one leads down, and slowly. Lowest at z_1 = ±1, with -1/40."""
    return 0.5 * (z[1:] ** 2).sum() - z[0] ** 2 / 20.0 + z[0] ** 4 / 40.0


SADDLES: dict[str, tuple[Task, float]] = {  # each with its depth: value at the saddle minus the lowest
    "saddle-tilted": (FUNCTIONS["saddle-tilted"], -SADDLE_LOWEST),
    "saddle-monkey": (FUNCTIONS["saddle-monkey"], 6.75),
    "saddle-flat-20": (Task(problem(flat_saddle, torch.zeros(20), 0.01, -0.025), 1000, 1e-2), 0.025),
}
SADDLE_STEPS = 1000
STARTS = {TUNING_SEED: range(1001, 1021), TUNING_SEED + 1: range(1, 101)}  # seeds of starts and rotations, of each row's seed


def steps_to_leave(name: str, optimizer: str, rate: float, seed: int, steps: int) -> float:
    """Steps until the loss is half way from the saddle to the lowest value; infinite if that takes more than ``steps``."""
    task, depth = SADDLES[name]
    model = task.build(seed).model
    made = OPTIMIZERS[optimizer].make(model.parameters(), rate)
    for step in range(steps + 1):
        made.zero_grad()
        loss = model()
        if loss.item() <= 0.5 * depth:
            return step
        loss.backward()
        made.step()
    return math.inf


def measure_saddle(run: Run) -> Row:
    """Steps from every start; ``reached`` is their mean, with the budget for those that never left, and picks a rate."""
    left = [steps_to_leave(run.task, run.optimizer, float(run.rate), seed, run.steps) for seed in STARTS[run.seed]]
    mean_steps = statistics.fmean(min(value, run.steps) for value in left)
    return {"status": "ok", "reached": text(mean_steps), "validation_loss": "0", "left": " ".join(f"{v:.0f}" for v in left)}


def wanted_saddles(done: Done) -> list[Run]:
    """Ours as they are; the rivals at their defaults, swept, and at their best."""
    runs: list[Run] = []
    for name, (task, _) in SADDLES.items():
        runs += [at(name, o, own_rate(o), TUNING_SEED + 1, SADDLE_STEPS) for o in (*OURS, *DEFAULTS)]
        for rival in DEFAULTS:
            runs += tuned(name, rival, OPTIMIZERS[rival].usual(task), [TUNING_SEED + 1], SADDLE_STEPS, done)
    return [run for run in dict.fromkeys(runs) if run not in done]


def tuned(task: str, rival: str, centre: float, seeds: Iterable[int], steps: int, done: Done) -> list[Run]:
    """What the sweep lacks; once it is complete, the best rate with the reporting seeds."""
    lacking = sweep(lambda rate: at(task, rival, rate, TUNING_SEED, steps), centre, done)
    best = None if lacking else best_of_sweep(done, task, rival, steps)
    return lacking or ([best._replace(seed=seed) for seed in seeds] if best else [])


# ---- MNIST -----------------------------------------------------------------------------------------------------------------

MNIST = "mnist-paper"  # 784-10-10, batches of 64, 3,500 images to train on
EPOCH = 54  # steps
EPOCHS = 20
SEEDS = range(TUNING_SEED + 1, TUNING_SEED + 6)
CURVES = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def measure_mnist(run: Run) -> Row:
    """Loss and accuracy after each epoch, as cells of one value an epoch."""
    built = TASKS[MNIST].build(run.seed)
    made = OPTIMIZERS[run.optimizer].make(built.model.parameters(), float(run.rate))
    curves: dict[str, list[str]] = {name: [] for name in CURVES}
    for step in range(1, run.steps + 1):
        built.model.train()
        made.zero_grad()
        built.loss(built.model, next(built.batches)).backward()
        made.step()
        if step % EPOCH == 0:
            for split in ("train", "test"):
                for name, value in zip(("loss", "accuracy"), evaluate(built, split), strict=True):
                    curves[f"{split}_{name}"].append(text(value))
    validation = evaluate(built, "validation")[0]
    group = made.param_groups[0]
    return {
        "status": "ok" if math.isfinite(validation) else "diverged",
        "validation_loss": text(validation),
        **{name: " ".join(values) for name, values in curves.items()},
        **{name: text(float(group[name])) for name in ("alpha", "restarts") if name in group},
    }


def wanted_mnist(done: Done) -> list[Run]:
    """Ours as they are; the rivals at their defaults, swept on the tuning seed, and at their best."""
    steps = EPOCHS * EPOCH
    runs = [at(MNIST, o, own_rate(o), seed, steps) for o in (*OURS, *DEFAULTS) for seed in SEEDS]
    for rival in DEFAULTS:
        runs += tuned(MNIST, rival, OPTIMIZERS[rival].usual(TASKS[MNIST]), SEEDS, steps, done)
    return [run for run in dict.fromkeys(runs) if run not in done]


# ---- report ----------------------------------------------------------------------------------------------------------------


def numbers(cell: str) -> list[float]:
    """The values of a cell; infinite where one is not finite."""
    return [number(value) for value in cell.split()]


def rows_of(done: Done, task: str, optimizer: str, rate: str) -> list[Row]:
    """The reported rows: those with other seeds than the one that tunes."""
    wanted = (task, optimizer, rate)
    return [row for run, row in done.items() if (run.task, run.optimizer, run.rate) == wanted and run.seed != TUNING_SEED]


def entries(done: Done, task: str, steps: int) -> dict[str, list[Row]]:
    """Label → reported rows: ours, the rivals at their defaults, and at the rates of their sweeps."""
    found = {name: rows_of(done, task, name, f"{own_rate(name):.3g}") for name in OURS}
    found |= {f"{name}, default {rate:.3g}": rows_of(done, task, name, f"{rate:.3g}") for name, rate in DEFAULTS.items()}
    for name in DEFAULTS:
        best = best_of_sweep(done, task, name, steps)
        if best:
            found[f"{name}, tuned {best.rate}"] = rows_of(done, task, name, best.rate)
    return {name: rows for name, rows in found.items() if rows}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def report_paths(done: Done, picture: Path) -> str:
    """The section on paths."""
    rows = {(run.task.removeprefix("path "), run.optimizer): row for run, row in done.items() if run.task.startswith("path ")}
    functions, optimizers = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    plot_paths(rows, functions, optimizers, picture)
    table = []
    for name in optimizers:
        of = [rows[function, name] for function in functions]
        table.append([name, of[0]["rate"], *(f"{float(r['deviation_30']):.0e}; {float(r['deviation']):.0e}" for r in of)])
    header = ["optimizer", "rate", *functions]
    return (
        f"## Paths\n\nEach function is minimised as it is and rotated by {ANGLE:g}°, the start rotated along; the second path "
        "is then rotated back. The figure is the largest distance between the two at the same step over the largest distance "
        f"of the first from its start, within 30 and within {PATH_STEPS} steps: 0 for a method that does not see the rotation. "
        "Rounding is all that separates the paths of c2min and p2min, and it can grow from step to step. Adam and Adadelta got "
        "a rate at which they move visibly.\n\n"
        f"{markdown(header, table)}\n![Paths]({picture.name})\n\nSolid: as it is. Dashed: rotated, and rotated back.\n"
    )


def plot_paths(rows: Mapping[tuple[str, str], Row], functions: Sequence[str], optimizers: Sequence[str], path: Path) -> None:
    """A panel for each function and optimizer."""
    figure = Figure(figsize=(2.2 * len(optimizers), 1.9 * len(functions)), layout="constrained")
    panels = figure.subplots(len(functions), len(optimizers), squeeze=False)
    for line, name in zip(panels, functions, strict=True):
        paths = [unpack(rows[name, optimizer][c]) for optimizer in optimizers for c in ("path", "turned")]
        (low_x, high_x), (low_y, high_y) = (
            (min(min(p[axis]) for p in paths), max(max(p[axis]) for p in paths)) for axis in (0, 1)
        )
        margin = 0.15 * max(high_x - low_x, high_y - low_y)
        x, y = torch.meshgrid(
            torch.linspace(low_x - margin, high_x + margin, 60),
            torch.linspace(low_y - margin, high_y + margin, 60),
            indexing="xy",
        )
        levels = torch.stack([PATHS[name][0](point) for point in torch.stack([x, y], -1).view(-1, 2)]).view(60, 60)
        levels = (levels - levels.min()).sqrt()  # closer lines near the lowest
        for axes, optimizer in zip(line, optimizers, strict=True):
            axes.contour(x, y, levels, 8, colors="0.85", linewidths=0.6, antialiased=False)  # four times smaller
            row = rows[name, optimizer]
            axes.plot(*unpack(row["path"]), "-", color="C0", linewidth=1.2)
            axes.plot(*unpack(row["turned"]), "--", color="C1", linewidth=1.2)
            axes.plot(*([v[0]] for v in unpack(row["path"])), "k.", markersize=4)
            axes.set_title(f"{optimizer}, {name}", fontsize=7)
            axes.tick_params(labelsize=5)
    figure.savefig(path, dpi=90)


def report_saddles(done: Done, picture: Path) -> str:
    """The section on saddles."""
    rows, curves = [], {}
    for name in SADDLES:
        curves[name] = {}
        for label, (row,) in entries(done, name, SADDLE_STEPS).items():
            left = numbers(row["left"])
            curves[name][label] = left
            low, middle, high = (quantile(left, share) for share in (0.1, 0.5, 0.9))
            shown = [f"{value:.0f}" if value < math.inf else f">{SADDLE_STEPS}" for value in (low, middle, high)]
            rows.append([f"{name}: {label}", shown[1], f"{shown[0]} – {shown[2]}", f"{left.count(math.inf) / len(left):.0%}"])
    plot_saddles(curves, picture)
    return (
        f"## Steps to leave a saddle\n\n{len(STARTS[TUNING_SEED + 1])} starts, normally distributed around the saddle with "
        "standard deviation 0.01 in every coordinate, each with a random rotation of the space. A start has left when its loss "
        f"is half way from the saddle's value to the lowest; the budget is {SADDLE_STEPS} steps. saddle-flat-20 has 20 "
        "dimensions, and one direction leads down, with a tenth of the others' curvature. Tuned: the half-decade with the "
        f"fewest steps in the mean over {len(STARTS[TUNING_SEED])} other starts. Ours begin at "
        f"{own_rate('elra_c2min'):.0e}, and their rates have to grow first. In the two small saddles the valley is about as "
        "far away as Adam's first step at rate 1 is long.\n\n"
        f"{markdown(['saddle and optimizer', 'median', '10 – 90 %', 'never left'], rows)}\n![Saddles]({picture.name})\n"
    )


def plot_saddles(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel a saddle: share of the starts that have left, against steps."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(label.rsplit(" ", 1)[0] if "," in label else label for of in curves.values() for label in of))
    for axes, (name, of) in zip(panels, curves.items(), strict=True):
        for label, left in of.items():
            short = label.rsplit(" ", 1)[0] if "," in label else label
            steps = [1.0, *sorted(v for v in left if v < math.inf), SADDLE_STEPS]
            shares = [i / len(left) for i in range(len(steps) - 1)]
            style = "-" if label in OURS else ":" if "default" in label else "--"
            axes.step(steps, [*shares, shares[-1]], style, where="post", color=f"C{labels.index(short)}", label=short)
        axes.set_xscale("log")
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("step")
    panels[0].set_ylabel("share that has left")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=90)


Means = Mapping[str, Mapping[str, Sequence[float]]]  # label → curve → a mean an epoch


def means(found: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[float]]]:
    """Over the seeds, an epoch at a time; infinite where one of them is."""
    return {
        label: {
            curve: [mean(values) for values in zip(*(numbers(row[curve]) for row in rows), strict=True)] for curve in CURVES
        }
        for label, rows in found.items()
    }


def below(mine: Mapping[str, Sequence[float]], rival: Mapping[str, Sequence[float]]) -> list[bool]:
    """At each epoch, whether training and test loss are both below the rival's."""
    pairs = [zip(mine[curve], rival[curve], strict=True) for curve in ("train_loss", "test_loss")]
    return [all(a < b for a, b in epoch) for epoch in zip(*pairs, strict=True)]


def verdict(found: Means, rivals: Sequence[str]) -> str:
    """The paper's claim against ``rivals``, as a sentence and a table."""
    table, always = [], [True] * len(next(iter(found.values()))["train_loss"])
    for name in CLAIMED:
        for rival in rivals:
            mine, theirs = found[name], found[rival]
            both = below(mine, theirs)
            always = [a and b for a, b in zip(always, both, strict=True)]
            each = [sum(a < b for a, b in zip(mine[c], theirs[c], strict=True)) for c in ("train_loss", "test_loss")]
            ends = [f"{curve[c][-1]:.3g}" for c in ("train_loss", "test_loss") for curve in (mine, theirs)]
            table.append(
                [f"{name} against {rival}", *map(str, each), str(sum(both)), f"{ends[0]} / {ends[1]}", f"{ends[2]} / {ends[3]}"]
            )
    epochs = len(always)
    header = ["", "epochs below in training loss", "in test loss", "in both", "last training losses", "last test losses"]
    return (
        f"Against {' and '.join(rivals)}: are c2min and p2min below both in training and test loss at each of epochs "
        f"1–{epochs}? **{'Yes' if all(always) else 'No'}: at {sum(always)} of {epochs} epochs.**\n\n{markdown(header, table)}"
    )


def report_mnist(done: Done, picture: Path) -> str:
    """The section on MNIST, with the answer to the paper's claim."""
    found = entries(done, MNIST, EPOCHS * EPOCH)
    of_mean = means(found)
    plot_mnist(found, picture)
    rows, shown = [], sorted({1, max(1, EPOCHS // 4), EPOCHS})
    for label, runs in found.items():
        curves = of_mean[label]
        at_epochs = [f"{curves[c][epoch - 1]:.3g}" for c in ("train_loss", "test_loss") for epoch in shown]
        last = [numbers(row["test_accuracy"])[-1] for row in runs]
        lowest = min(range(EPOCHS), key=lambda epoch, c=curves: c["test_loss"][epoch])
        rows.append([label, *at_epochs, f"{curves['test_loss'][lowest]:.3g} ({lowest + 1})", spread(last)])
    swept = [
        [f"{run.optimizer} {run.rate}", f"{numbers(row['train_loss'])[-1]:.3g}", f"{number(row['validation_loss']):.3g}"]
        for run, row in sorted(done.items(), key=lambda item: (item[0].optimizer, float(item[0].rate)))
        if (run.task, run.seed) == (MNIST, TUNING_SEED)
    ]
    header = [
        "optimizer", *(f"{split} loss, epoch {epoch}" for split in ("train", "test") for epoch in shown),
        "lowest test loss (epoch)", f"test accuracy, epoch {EPOCHS}",
    ]  # fmt: skip
    default, best = ([label for label in found if kind in label] for kind in (", default", ", tuned"))
    return (
        f"## MNIST\n\n784-10-10, 3,500 training images (of MNIST's 60,000) in batches of 64, {EPOCHS} epochs, constant rates, "
        f"means over {len(SEEDS)} seeds. Training loss is that of 2,000 fixed training images, test loss that of 1,000 others. "
        "Tuned: the half-decade with the lowest validation loss after the last epoch, with a seed that is not reported.\n\n"
        f"{markdown(header, rows)}\n### The paper's claim\n\nOf the means over the seeds.\n\n{verdict(of_mean, default)}\n"
        f"{verdict(of_mean, best)}\n![MNIST]({picture.name})\n\nMean and a band of one standard deviation.\n\n"
        "### The sweeps\n\nWith the tuning seed, after the last epoch.\n\n"
        f"{markdown(['rate', 'train loss', 'validation loss'], swept)}"
    )


def plot_mnist(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Losses and accuracy against epochs, the rivals at their defaults above and tuned below."""
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    for line, kind in zip(figure.subplots(2, 3, sharex=True), (", default", ", tuned"), strict=True):
        for axes, curve in zip(line, ("train_loss", "test_loss", "test_accuracy"), strict=True):
            shown = [label for label in found if label in OURS or kind in label]
            for index, label in enumerate(shown):
                seeds = [numbers(row[curve]) for row in found[label]]
                middle = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
                spreads = [statistics.stdev(v) if math.inf not in v else 0.0 for v in zip(*seeds, strict=True)]
                low, high = ([m + sign * s for m, s in zip(middle, spreads, strict=True)] for sign in (-1, 1))
                epochs = range(1, len(middle) + 1)
                axes.plot(epochs, middle, color=f"C{index}", linewidth=1.2, label=label)
                axes.fill_between(epochs, low, high, color=f"C{index}", alpha=0.15, linewidth=0, antialiased=False)
            axes.set_title(curve.replace("_", " "), fontsize="medium")
        line[0].set_yscale("log")
        for axes, limits in zip(line, ((0.04, 2.5), (0.3, 1.3), (0.8, 0.92)), strict=True):
            axes.set_ylim(*limits)
        line[-1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in line:
        axes.set_xlabel("epoch")
    figure.savefig(path, dpi=80)


# ---- the command -----------------------------------------------------------------------------------------------------------

PARTS = {
    "paths": (wanted_paths, measure_path, report_paths),
    "saddles": (wanted_saddles, measure_saddle, report_saddles),
    "mnist": (wanted_mnist, measure_mnist, report_mnist),
}


def row_of(run: Run, measure: Callable[[Run], Row]) -> Row:
    """The row of a run."""
    return attempt(run, measure, COLUMNS, versions(OPTIMIZERS[run.optimizer]))


def command(
    name: str,
    title: str,
    parts: Mapping[str, tuple[Callable[[Done], list[Run]], Callable[[Run], Row], Callable[[Done, Path], str]]],
    row_of: Callable[[Run, Callable[[Run], Row]], Row],
    argv: Sequence[str] | None,
    description: str | None,
) -> None:
    """A command line that runs what is lacking and reports, also on the parts that lack nothing.

    Args:
        name: of the subcommand, and of its file of rows.
        title: of the report.
        parts: name → (rows so far → runs lacking, run → what it measures, (rows, path of the picture) → section of the report).
        row_of: (run, what measures it) → row.
        argv: the command line.
        description: for ``--help``.

    Raises:
        SystemExit: a run has crashed, or was stopped by hand.
    """
    parser = argparse.ArgumentParser(f"python -m recipes.benchmarks {name}", description=description)
    parser.add_argument("--parts", nargs="+", choices=tuple(parts), default=tuple(parts), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.csv", help="CSV file (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path: Path = args.results
    try:
        for part in args.parts:
            wanted, measure, _ = parts[part]
            done = fill(path, wanted, lambda run, measure=measure: row_of(run, measure))
            crashed = [f"{' '.join(map(str, run))}: {row['error']}" for run, row in done.items() if row["status"] == "crashed"]
            if crashed:
                sys.exit(
                    f"no report, since {len(crashed)} runs crashed; delete their rows in {path} to repeat them. {crashed[0]}"
                )
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command continues. Rows so far: {path}")
    sections = [
        report(done, path.with_name(f"{path.stem}-{part}.png"))
        for part, (wanted, _, report) in parts.items()
        if not wanted(done)
    ]
    failed = sum(row["status"] != "ok" for row in done.values())
    minutes = sum(float(row["seconds"]) for row in done.values()) / 60
    known = ", ".join(sorted({each for row in done.values() for each in row["versions"].split()}))
    head = (
        f"# {title}\n\nWritten by `python -m recipes.benchmarks {name}`. {len(done)} rows, {failed} of them crashed or "
        f"diverged, {minutes:.1f} minutes of one (shared) core. Versions: {known}.\n"
    )
    path.with_suffix(".md").write_text("\n".join([head, *sections]))
    print(f"written: {path.with_suffix('.md')}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command("paper", "The paper's own experiments", PARTS, row_of, argv, __doc__)
