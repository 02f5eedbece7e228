"""Accuracy of each optimizer over several seeds: ELRA without a learning rate, AdamW at each of a list.

Every run is one row of ``model_cards/text_classification/results.csv``; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path("model_cards/text_classification/results.csv")
ELRA = ("elra_c2min", "elra_p2min", "elra_adamw")
ADAMW_RATES = ("5e-5", "2e-4", "5e-4", "1e-3", "2e-3")  # the first is the Trainer's default
RUNS = [*((optim, "") for optim in ELRA), *(("adamw_torch", rate) for rate in ADAMW_RATES)]
KEY = ("optim", "learning_rate", "seed")
METRICS = ("test_accuracy", "test_macro_f1", "test_loss", "train_loss", "train_runtime")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=[*ELRA, "adamw_torch"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for seed in args.seeds:
        for optim, rate in RUNS:
            if optim in args.optim and (optim, rate, seed) not in {tuple(row[k] for k in KEY) for row in read(args.results)}:
                append(args.results, {"optim": optim, "learning_rate": rate, "seed": seed, **measure(optim, rate, seed)})
    Console().print(table(read(args.results)))


def measure(optim: str, rate: str, seed: str) -> dict[str, str]:
    """Train once, in a process of its own, and return the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--optim", optim, "--seed", seed, "--output_dir", folder, *(["--learning_rate", rate] if rate else [])]
        subprocess.run([sys.executable, "-m", "recipes.text_classification.train", *options], check=True)
        results = json.loads((Path(folder) / "all_results.json").read_text())
    return {name: f"{results[name]:.4f}" for name in METRICS}


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, str]) -> None:
    """Write a row as soon as it is known: the sweep may be interrupted."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*KEY, *METRICS], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> Table:
    """Mean ± standard deviation over the seeds."""
    runs: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        runs[row["optim"], row["learning_rate"]].append(row)
    shown = Table("optimizer", "learning rate", "seeds", *METRICS)
    for (optim, rate), seeds in runs.items():
        cells = []
        for name in METRICS:
            values = [float(row[name]) for row in seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        shown.add_row(optim, rate or "none given", str(len(seeds)), *cells)
    return shown


if __name__ == "__main__":
    main()
