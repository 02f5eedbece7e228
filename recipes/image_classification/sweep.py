"""Test accuracy of each ELRA optimizer without a learning rate, over several seeds, and once in two processes.

Every run is one row of ``model_cards/image_classification/results.csv``; rows that are there are not run again.
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

RESULTS = Path("model_cards/image_classification/results.csv")
OPTIMIZERS = ("ElraC2Min", "ElraP2Min", "ElraAdamW")
METRICS = ("test_accuracy", "test_loss", "train_loss", "train_runtime")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--processes", nargs="+", default=["1"], help="also 2, for DDP on one machine")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [
        {"optimizer": optimizer, "seed": seed, "processes": processes}
        for processes in args.processes
        for seed in args.seeds
        for optimizer in args.optimizer
    ]
    show(table(complete(args.results, runs, measure), ["optimizer", "processes"], METRICS))


def measure(run: Row) -> Row:
    """Train once, in a process of its own, and return the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--optimizer", run["optimizer"], "--seed_everything", run["seed"], "--trainer.logger.save_dir", folder]
        if run["processes"] != "1":
            options += ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--trainer.devices", run["processes"]]
        subprocess.run([sys.executable, "-m", "recipes.image_classification.train", "fit", *options], check=True)
        (path,) = Path(folder).rglob("metrics.json")
        results = json.loads(path.read_text())
    return {name: f"{results[name]:.4f}" for name in METRICS}


if __name__ == "__main__":
    main()
