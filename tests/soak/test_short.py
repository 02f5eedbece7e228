"""A short form of ``make soak``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .machine import Life

ROOT = Path(__file__).parents[2]
Life.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
test_anything_in_any_order = Life.TestCase


@pytest.mark.parametrize(("ranks", "kills"), [(1, 4)])  # two ranks only in the long form: torch may wait long for a lost one
def test_killed_runs_end_as_those_left_alone(ranks, kills, tmp_path):
    """In a process of its own, since it forks."""
    code = f"from pathlib import Path; from tests.soak.kills import soak; soak(Path({str(tmp_path)!r}), {kills}, {ranks})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-4000:]
