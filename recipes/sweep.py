"""What the recipes' sweeps share: a CSV file with one row a run, which a second start continues."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.table import Table

from recipes.cli import show

Row = dict[str, str]


def complete(path: Path, runs: Iterable[Row], measure: Callable[[Row], Row]) -> list[Row]:
    """Call ``measure`` for those of ``runs`` that have no row in ``path`` yet, and return all rows."""
    for run in runs:
        if not any(run.items() <= row.items() for row in read(path)):
            append(path, {**run, **measure(run)})
    return read(path)


def trainer_sweep(
    about: str | None,
    recipe: str,
    results: Path,
    elra: Sequence[str],
    rates: Sequence[str],
    metrics: Sequence[str],
    options: Sequence[str] = (),
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """The command line of a sweep: run what is missing, each in a process of its own, then print the table.

    Args:
        about: what ``--help`` says.
        recipe: module that trains with the Trainer and writes ``all_results.json``.
        results: the CSV file.
        elra: optimizers that run without a learning rate.
        rates: AdamW's learning rates.
        metrics: what is kept of ``all_results.json``.
        options: the same in every run.
        prepare: called before the first run.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=[*elra, "adamw_torch"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--results", type=Path, default=results)
    args = parser.parse_args()
    prepare()

    def measure(run: Row) -> Row:
        return trained(recipe, run, options, metrics)

    pairs = [*((optim, "") for optim in elra), *(("adamw_torch", rate) for rate in rates)]
    runs = [
        {"optim": optim, "learning_rate": rate, "seed": seed}
        for seed in args.seeds
        for optim, rate in pairs
        if optim in args.optim
    ]
    show(table(complete(args.results, runs, measure), ["optim", "learning_rate"], metrics))


def trained(recipe: str, run: Row, options: Sequence[str], metrics: Sequence[str]) -> Row:
    """Train with ``options`` and those that ``run`` names, in a process of its own, and return the metrics."""
    given = [word for name, value in run.items() if value for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", recipe, *options, *given, "--output_dir", folder], check=True)
        measured = json.loads((Path(folder) / "all_results.json").read_text())
    return {name: f"{measured[name]:.4f}" for name in metrics}


def read(path: Path) -> list[Row]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    """Write a row, after a header if it is the first."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: Iterable[Row], key: Sequence[str], metrics: Sequence[str]) -> Table:
    """Mean ± standard deviation of the metrics over the runs that agree in ``key``."""
    runs: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        runs[tuple(row[name] for name in key)].append(row)
    shown = Table(*key, "seeds", *metrics)
    for values, seeds in runs.items():
        shown.add_row(*(value or "none given" for value in values), str(len(seeds)), *(spread(seeds, name) for name in metrics))
    return shown


def spread(rows: Sequence[Row], name: str) -> str:
    """Mean ± standard deviation of a metric."""
    values = [float(row[name]) for row in rows]
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
