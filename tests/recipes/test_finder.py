"""The bench's study of rates that a search finds, with real runs of a few steps."""

import csv
import dataclasses
from statistics import mean

import pytest

from recipes.benchmarks import finder, run
from recipes.benchmarks.tasks import TASKS

SWEPT = ["--tasks=digits-mlp", "--optimizers=adamw", "--steps=20", "--workers=1"]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """AdamW's sweep of a task of 20 steps."""
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], steps=20))
    path = tmp_path / "sweep.csv"
    run.main([*SWEPT, f"--results={path}"])
    monkeypatch.setattr(finder, "SWEEPS", [path])
    return read(path)


def test_the_study_searches_trains_adamw_there_and_reports(sweep, tmp_path):
    path = tmp_path / "finder.csv"
    finder.main(["--results", str(path)], ["digits-mlp"])
    rows = read(path)
    assert all(row["status"] == "ok" for row in rows)
    search, *others = rows
    assert [search[name] for name in ("optimizer", "schedule", "seed", "steps")] == ["elra_adamw", "search", "0", "20"]
    found = f"{float(search['found']):.3g}"
    assert [(row["optimizer"], row["schedule"], row["rate"], row["seed"], row["steps"]) for row in others] == [
        ("adamw", "linear", rate, seed, "20") for rate in (found, "5e-05") for seed in "123"
    ]
    line = next(line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| digits-mlp"))
    _, best, shown, _, *ratios = [cell.strip() for cell in line.strip("|").split("|")]
    assert shown == f"{float(search['found']):.2g}"
    rate, schedule = best.split(", ")
    tuned = [row for row in sweep if (row["rate"], row["schedule"]) == (rate, schedule)]
    assert min(sweep, key=lambda row: float(row["validation_loss"]) if row["seed"] == "0" else 9e9) in tuned
    base = mean(float(row["test_loss"]) for row in tuned if row["seed"] != "0")
    for rate, ratio in zip((found, "5e-05"), ratios, strict=True):
        assert ratio == f"{mean(float(row['test_loss']) for row in others if row['rate'] == rate) / base:.3f}"
    before = path.read_text()
    finder.main(["--results", str(path)], ["digits-mlp"])  # nothing is measured twice
    assert path.read_text() == before


def test_every_task_has_a_sweep_that_its_report_needs():
    swept = {key: row for path in finder.SWEEPS for key, row in run.load(path).items()}
    for task in finder.CHOSEN:
        best = run.best_of_sweep(swept, task, "adamw", TASKS[task].steps)
        assert all(best._replace(seed=seed) in swept for seed in finder.SEEDS)
