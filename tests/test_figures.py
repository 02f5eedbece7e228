"""Figures in README and cards are those of the committed rows."""

import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

from recipes.benchmarks import report
from recipes.sweep import read, spread

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "recipes/benchmarks/results"


def table_rows(text: str, pattern: str) -> list[list[str]]:
    """The cells of the table lines whose first cell matches."""
    lines = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if re.fullmatch(pattern, cells[0])]


def test_text_classification():
    rows = read(ROOT / "model_cards/text_classification/results.csv")
    shown = [cells for cells in table_rows(README, "elra_[a-z0-9]+|adamw_torch") if "±" in cells[2]]
    assert len(shown) == 5
    for optim, rate, accuracy, f1 in shown:
        chosen = "" if rate == "none given" else rate.split(",")[0]
        runs = [row for row in rows if (row["optim"], row["learning_rate"]) == (optim, chosen)]
        assert len(runs) == 3
        assert (accuracy, f1) == (spread(runs, "test_accuracy"), spread(runs, "test_macro_f1"))


def test_image_classification():
    rows = read(ROOT / "model_cards/image_classification/results.csv")
    card = (ROOT / "model_cards/image_classification/README.md").read_text()
    shown = table_rows(card, "Elra[A-Za-z0-9]+")
    assert len(shown) == 6
    for optimizer, processes, *cells in shown:
        runs = [row for row in rows if (row["optimizer"], row["processes"]) == (optimizer, processes)]
        measured = [float(row["test_accuracy"]) for row in sorted(runs, key=lambda row: row["seed"])]
        assert cells[:3] == [f"{accuracy:.4f}" for accuracy in measured]
        assert cells[3] == f"{mean(measured):.4f} ± {stdev(measured):.4f}"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = Path(shutil.copy(RESULTS / "quick.csv", tmp_path_factory.mktemp("bench")))
    return report.report(path)


def test_the_report_is_that_of_the_rows(quick):
    assert (RESULTS / "quick.md").read_text() == quick


def test_regret(quick):
    measured = {cells[0]: cells for cells in table_rows(quick.split("![Regret]")[0], "[a-z].+")}
    shown = [cells for cells in table_rows(README, "[a-z].+") if len(cells) == 3 and cells[0] in measured]
    assert len(shown) > 6
    for cells in shown:
        assert cells == measured[cells[0]][:3]


def test_tasks_that_the_rule_was_not_made_on():
    (line,) = table_rows((RESULTS / "full.md").read_text().split("![Regret]")[0], r"elra_adamw, linear( \(.*\))?")
    assert f"{line[1].split(' ')[0]} (worst {line[2].split(' ')[0]}" in README
