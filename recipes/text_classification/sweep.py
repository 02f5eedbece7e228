"""Accuracy of each optimizer over several seeds: ELRA without a learning rate, AdamW at each of a list.

Every run is one row of ``model_cards/text_classification/results.csv``; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from recipes.cli import show
from recipes.sweep import Row, complete, table

RESULTS = Path("model_cards/text_classification/results.csv")
ELRA = ("elra_c2min", "elra_p2min", "elra_adamw")
ADAMW_RATES = ("5e-5", "2e-4", "5e-4", "1e-3", "2e-3")  # the first is the Trainer's default
RUNS = [*((optim, "") for optim in ELRA), *(("adamw_torch", rate) for rate in ADAMW_RATES)]
METRICS = ("test_accuracy", "test_macro_f1", "test_loss", "train_loss", "train_runtime")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=[*ELRA, "adamw_torch"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [
        {"optim": optim, "learning_rate": rate, "seed": seed}
        for seed in args.seeds
        for optim, rate in RUNS
        if optim in args.optim
    ]
    show(table(complete(args.results, runs, measure), ["optim", "learning_rate"], METRICS))


def measure(run: Row) -> Row:
    """Train once, in a process of its own, and return the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--optim", run["optim"], "--seed", run["seed"], "--output_dir", folder]
        options += ["--learning_rate", run["learning_rate"]] if run["learning_rate"] else []
        subprocess.run([sys.executable, "-m", "recipes.text_classification.train", *options], check=True)
        results = json.loads((Path(folder) / "all_results.json").read_text())
    return {name: f"{results[name]:.4f}" for name in METRICS}


if __name__ == "__main__":
    main()
