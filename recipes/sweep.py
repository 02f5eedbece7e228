"""What the recipes' sweeps share: a CSV file with one row a run, which a second start continues."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.table import Table

Row = dict[str, str]


def complete(path: Path, runs: Iterable[Row], measure: Callable[[Row], Row]) -> list[Row]:
    """Call ``measure`` for those of ``runs`` that have no row in ``path`` yet, and return all rows."""
    for run in runs:
        if not any(run.items() <= row.items() for row in read(path)):
            append(path, {**run, **measure(run)})
    return read(path)


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
