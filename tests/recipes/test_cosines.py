"""The study of cosines, with short real runs."""

import dataclasses

import pytest
import torch

from elra_hf import Adam, Elra, Momentum
from recipes.benchmarks import cosines
from recipes.benchmarks.tasks import TASKS


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], steps=120))


def cells(line: list[str]) -> list[list[float]]:
    """Of each stretch the cosine with the last step, and that with the way back to the average."""
    return [[float(value) for value in cell.split("; ")] for cell in line[1:-1]]


@pytest.mark.parametrize(
    ("direction", "metric", "rates"),
    [(Adam(), "Adam's metric", (1e-4, 1e-1)), (Adam(), "Euclidean", (1e-4, 1e-1)), (Momentum(), "Euclidean", (1e-3, 3.0))],
)
def test_a_rate_that_is_too_small_or_too_large_shows(direction, metric, rates):
    small, large = (cosines.measure("digits-mlp", direction, rate)[metric] for rate in rates)
    for low, high in zip(*(cells(line)[0] for line in (small, large)), strict=True):
        assert low > 0.2 > 0.1 > high
    assert float(small[-1]) > 0
    assert float(large[-1]) > 0


@pytest.mark.parametrize(("direction", "metric"), [(Adam(), "Adam's metric"), (Momentum(), "Euclidean")])
def test_the_cosine_with_the_way_to_the_average_is_the_one_that_rules_see(direction, metric, monkeypatch):
    shown = []
    original = Elra.step

    def step(self):
        original(self)
        shown.append(float(self.param_groups[0]["cos"]))

    monkeypatch.setattr(Elra, "step", step)
    monkeypatch.setattr(cosines, "stretches", lambda seen: [str(pair[1]) for pair in seen])
    line = cosines.measure("digits-mlp", direction, 3e-3)[metric]
    late = int(direction.passing)  # a rule sees the cosine of the step before
    cells = [float(cell) for cell in line[1:-1]]
    assert cells[: len(cells) - late] == pytest.approx(shown[1 + late :], abs=1e-4)
    assert shown[: 1 + late] == [0] * (1 + late)


def test_a_cosine_by_hand():
    g, s, m = ([torch.tensor(values)] for values in ([2.0, 0.0], [1.0, 1.0], [4.0, 1.0]))
    assert cosines.angle(g, s, m) == pytest.approx(2 / 5**0.5)


def test_a_table_a_direction_and_metric_a_line_a_rate(monkeypatch, tmp_path):
    monkeypatch.setattr(cosines, "RATES", range(2))
    cosines.main(["--tasks", "digits-mlp", "--results", str(tmp_path / "cosines.md")])
    lines = (tmp_path / "cosines.md").read_text().splitlines()
    assert sum(line.startswith("## digits-mlp, ") for line in lines) == 3
    assert sum(line.startswith(("| 0", "| 1")) for line in lines) == 3 * len(cosines.RATES)
