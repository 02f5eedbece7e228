"""`python -m elra_hf.run` and its launchers, on a script that never mentions us."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/run/plain_script.py"
RUN = ["-m", "elra_hf.run"]
LAUNCHERS = {
    "script": [sys.executable, *RUN, str(SCRIPT)],
    "module": [sys.executable, *RUN, "-m", "tests.run.plain_script"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *RUN, str(SCRIPT)],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *RUN, str(SCRIPT)],
}


def launch(command, *args):
    return subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True, timeout=200)


def options(folder, optim="elra_adamw"):
    pairs = {
        "output_dir": folder, "optim": optim, "max_steps": 60, "logging_steps": 5, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "learning_rate": 1e-3, "rows": 32, "optim_args": "eps=1e-7,betas=(0.9,0.99)",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in pairs.items()]


def test_the_script_does_not_know_us():
    assert "elra" not in SCRIPT.read_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_unmodified_script_trains(launcher, tmp_path):
    done = launch(LAUNCHERS[launcher], *options(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    history = [e for e in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert len({entry["elra_alpha"] for entry in history}) > 1


def test_without_us_the_script_refuses_the_name(tmp_path):
    done = launch([sys.executable, str(SCRIPT)], *options(tmp_path))
    assert done.returncode != 0
    assert "elra_adamw" in done.stderr


def test_arguments_and_exit_status_are_the_scripts(tmp_path):
    script = tmp_path / "script.py"
    (tmp_path / "neighbour.py").write_text("VALUE = 7")
    script.write_text("import sys, neighbour\nprint(sys.argv[1:], __name__, neighbour.VALUE)\nsys.exit(3)")
    done = launch([sys.executable, "-m", "elra_hf.run", str(script)], "-x", "--y=1")
    assert done.returncode == 3
    assert done.stdout.split("\n")[0] == "['-x', '--y=1'] __main__ 7"


@pytest.mark.parametrize(
    ("args", "status", "text"), [([], 2, "usage"), (["--help"], 0, "usage"), (["nowhere.py"], 1, "no script")]
)
def test_what_it_says(args, status, text):
    done = launch([sys.executable, "-m", "elra_hf.run"], *args)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
