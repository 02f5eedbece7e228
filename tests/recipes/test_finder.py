"""The bench's study of rates that a search finds, with real runs of a few steps."""

import csv
import dataclasses

import pytest

from recipes.benchmarks import finder
from recipes.benchmarks.tasks import TASKS


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], steps=20))


def test_the_study_searches_trains_adamw_there_and_reports(short, tmp_path):
    path = tmp_path / "finder.csv"
    finder.main(["--results", str(path)], ["digits-mlp"])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "ok" for row in rows)
    [search] = [row for row in rows if row["schedule"] == "search"]
    assert (search["optimizer"], search["seed"], search["steps"]) == ("elra_adamw", "0", "20")
    at_found = [row for row in rows if row["optimizer"] == "adamw" and row["rate"] == f"{float(search['found']):.3g}"]
    assert sorted((row["schedule"], row["seed"]) for row in at_found) == [
        (schedule, seed) for schedule in ("constant", "linear") for seed in "123"
    ]
    said = path.with_suffix(".md").read_text()
    assert "| digits-mlp | " in said
    mean = sum(float(row["test_loss"]) for row in rows if (row["rate"], row["schedule"]) == ("5e-05", "linear")) / 3
    assert mean > 0
    line = next(line for line in said.splitlines() if line.startswith("| digits-mlp"))
    rate, schedule = line.split("|")[2].strip().split(", ")
    best = [float(r["test_loss"]) for r in rows if (r["rate"], r["schedule"]) == (rate, schedule) and r["seed"] in "123"]
    assert line.split("|")[-2].strip() == f"{mean / (sum(best) / 3):.3f}"
    before = path.read_text()
    finder.main(["--results", str(path)], ["digits-mlp"])  # nothing is measured twice
    assert path.read_text() == before
