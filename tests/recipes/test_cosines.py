"""The study of cosines, with a short real run."""

import dataclasses

from elra_hf import Adam, Momentum
from recipes.benchmarks import cosines
from recipes.benchmarks.tasks import TASKS


def test_a_rate_that_is_too_small_shows_in_the_vote_and_one_too_large_does_not_hide(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], steps=120))
    small, large = (cosines.measure("digits-mlp", Adam(), rate) for rate in (1e-4, 1e-1))
    first = [float(line[1].split(";")[0]) for line in (small, large)]
    assert first[0] > 0.2 > 0.1 > first[1]
    assert float(small[-1]) > float(large[-1]) > 0
    short, long = (cosines.measure("digits-mlp", Momentum(), rate) for rate in (1e-3, 1.0))
    overshoots = [int(line[2].split("; ")[1].rstrip("%")) for line in (short, long)]
    assert overshoots[0] == 0
    assert overshoots[1] > 50
    cosines.main(["--tasks", "digits-mlp", "--results", str(tmp_path / "cosines.md")])
    lines = (tmp_path / "cosines.md").read_text().splitlines()
    assert sum(line.startswith(("| 0", "| 1")) for line in lines) == 2 * len(cosines.RATES)
