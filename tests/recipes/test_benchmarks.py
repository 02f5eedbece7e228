"""The benchmark: real runs on the smallest task, and tasks that learn."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from recipes.benchmarks.run import OPTIMIZERS, main
from recipes.benchmarks.tasks import TASKS


def bench(monkeypatch: pytest.MonkeyPatch, results: Path, *options: str) -> list[dict[str, str]]:
    monkeypatch.setattr(sys, "argv", ["run.py", "--results", str(results), "--seeds", "1", *options])
    main()
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_optimizer_learns(monkeypatch, tmp_path):
    names = [name for name in OPTIMIZERS if name != "sgd"]  # whose own rate of 1e-3 takes longer
    rows = bench(monkeypatch, tmp_path / "rows.csv", "--tasks", "digits-mlp", "--optimizers", *names, "--steps", "150")
    assert [row["optimizer"] for row in rows] == names
    assert all(float(row["test_loss"]) < 2.2 for row in rows)


def test_finished_runs_are_not_run_again_and_diverged_ones_are_rows(monkeypatch, tmp_path):
    results = tmp_path / "rows.csv"
    options = ("--tasks", "digits-mlp", "--optimizers", "sgd", "--steps", "30", "--rates", "1e-2")
    first = bench(monkeypatch, results, *options)
    rows = bench(monkeypatch, results, *options, "1e9")
    assert rows[0] == first[0]  # seconds and all
    assert rows[1]["test_loss"] == "nan"


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn", "python-2x64"])
def test_a_seed_fixes_a_task_and_its_splits_are_disjoint(name):
    one, two, other = (TASKS[name].build(seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, next(one.batches), next(two.batches)))
    assert not all(map(torch.equal, next(one.batches), next(other.batches)))
    rows = {split: {tuple(row) for batch in one.splits[split] for row in batch[0].flatten(1).tolist()} for split in one.splits}
    assert not rows["validation"] & rows["test"]
