"""The bare loop: two lines from AdamW, and the same in two processes as in one."""

import difflib
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from recipes.bare_loop import job
from tests.recipes.conftest import ROOT

FOLDER = ROOT / "recipes/bare_loop"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file")


def loop(*command: str, where: str = "1 processes, NO", **env: str) -> tuple[list[tuple[float, float]], float]:
    """Run it; the (loss, rate) pairs that it printed, and the test loss."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", **env}
    small = ("--steps", "20", "--layers", "1", "--width", "32")
    done = subprocess.run([*command, *small], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(where + "\n")
    steps = [(float(a), float(b)) for a, b in re.findall(r"step \d+ loss (\S+) rate (\S+)", done.stdout)]
    return steps, float(re.search(r"test loss (\S+)", done.stdout).group(1))


@pytest.fixture(scope="module")
def alone():
    return loop(sys.executable, "-m", "recipes.bare_loop.train", "--batch_size", "16")


def test_two_lines_differ_from_adamw():
    adamw, ours = ((FOLDER / name).read_text().splitlines() for name in ("train_adamw.py", "train.py"))
    changes = [line for line in difflib.ndiff(adamw, ours) if line[0] in "+-"]
    assert [line[0] for line in changes] == ["-", "+", "-", "+"]
    shown = (FOLDER / "README.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    assert shown == [line[0] + line[2:] for line in changes]


@pytest.mark.parametrize(("option", "value", "least"), [("batch_size", "0", 1), ("seed", "-1", 0), ("steps", "-5", 0)])
def test_a_number_too_low_is_refused(option, value, least, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--{option}", value])
    with pytest.raises(SystemExit) as stopped:
        job.options()
    assert stopped.value.code == 2
    assert f"argument --{option}: {value} is too low: give {least} or more" in capsys.readouterr().err


def test_both_learn_and_show_the_rate_that_was_applied(alone):
    steps, loss = loop(sys.executable, "-m", "recipes.bare_loop.train_adamw", "--batch_size", "16")
    assert [rate for _, rate in steps] == [pytest.approx(5e-4), 0.0]  # the schedule's, for the next step
    assert loss < steps[0][0]
    steps, loss = alone
    assert len(steps) == 2
    assert loss < steps[0][0]
    assert all(rate > 0 for _, rate in steps)


def same(launched, alone) -> bool:
    (steps, loss), (truth, expected) = launched, alone
    assert steps == [pytest.approx(pair, rel=2e-3) for pair in truth]
    assert loss == pytest.approx(expected, rel=2e-3)
    return True


def test_two_processes_equal_one_with_batches_twice_as_large(alone):
    command = (*LAUNCH, "recipes/configs/ddp.yaml", "-m", "recipes.bare_loop.train", "--batch_size", "8")
    assert same(loop(*command, where="2 processes, MULTI_CPU"), alone)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed: make test-deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_in_two_processes_equals_one(stage, alone):
    command = (*LAUNCH, f"recipes/configs/zero{stage}.yaml", "-m", "recipes.bare_loop.train", "--batch_size", "8")
    assert same(loop(*command, where="2 processes, DEEPSPEED", DS_ACCELERATOR="cpu"), alone)


def test_files_that_the_pages_name_exist():
    for page in ("bare_loop/README.md", "configs/multi_gpu.md"):
        for path in re.findall(r"`(tests/\S+\.py)`", (ROOT / "recipes" / page).read_text()):
            assert (ROOT / path).is_file()
