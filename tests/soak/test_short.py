"""A short form of ``make soak``."""

import subprocess
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

from .machine import Life

Life.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
test_anything_in_any_order = Life.TestCase


def test_killed_runs_end_as_those_left_alone():
    """With one rank and with two; in a process of its own, for the runs are forked from it."""
    command = [sys.executable, "-m", "tests.soak", "5", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["1 rank(s): 4 kills", "2 rank(s): 1 kills"]
