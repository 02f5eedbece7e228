"""``python -m tests.soak``: 50 kills of real runs, then 100,000 steps of anything. Prints its figures."""

import sys
import tempfile
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from . import kills, machine


def main(kill: int = 50, steps: int = 100_000) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    for ranks, number in ((1, round(0.7 * kill)), (2, kill - round(0.7 * kill))):
        with tempfile.TemporaryDirectory() as folder:
            done = kills.soak(Path(folder), number, ranks, seed=int(begun))
        print(f"{ranks} rank(s): {number} kills, {done} runs ended as left alone, {time.monotonic() - begun:.0f} s", flush=True)
    options = {"max_examples": 200, "stateful_step_count": 50, "deadline": None, "database": None, "print_blob": True}
    while machine.STEPS["taken"] < steps:
        run_state_machine_as_test(machine.Life, settings=settings(suppress_health_check=list(HealthCheck), **options))
        print(f"{machine.STEPS['taken']} steps, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
