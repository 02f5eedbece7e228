"""The picture of a run, from its log."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from elra_hf.plots import _draw, plot_rates, restarts, series

LOG = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-5, "elra_cos": 0.0, "elra_restarts": 0},
    {"step": 2, "loss": 1.0, "learning_rate": 2e-5, "elra_cos": 0.5, "elra_restarts": 1},
    {"step": 2, "eval_loss": 1.5},
    {"step": 4, "loss": 0.5, "learning_rate": 0.0, "elra_cos": -0.5, "elra_restarts": 1},
]


def test_series_are_read_with_their_steps():
    assert series(LOG, "eval_loss") == [(2, 1.5)]
    assert series(LOG, "learning_rate") == [(1, 1e-5), (2, 2e-5), (4, 0.0)]


def test_restarts_are_the_steps_at_which_the_count_rose():
    assert restarts(LOG) == [2]
    assert restarts([{"step": 7, "elra_restarts": 1}]) == [7]
    assert restarts([{"step": 1, "loss": 2.0}]) == []


def test_runs_with_and_without_cosine_share_a_picture(tmp_path):
    plain = [{key: value for key, value in entry.items() if not key.startswith("elra")} for entry in LOG]
    heights = []
    for runs in ({"elra": LOG}, {"adamw": plain}, {"elra": LOG, "adamw": plain}):
        from matplotlib.image import imread

        heights.append(imread(plot_rates(runs, tmp_path / "rate.png")).shape[0])
    assert heights[0] == heights[2] > heights[1]


def test_a_log_without_losses_says_what_to_do():
    with pytest.raises(ValueError, match="logging_steps=1"):
        plot_rates({"run": [{"step": 1, "eval_loss": 1.0}]}, "never.png")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_loss_does_not_end_the_mean_line(broken):
    panel = Figure().subplots()
    _draw(panel, [(1, 2.0), (2, broken), (3, 2.0)], "C0")
    assert np.allclose(panel.lines[1].get_ydata()[-1], 2.0)
