"""`python -m elra_hf.run` and its launchers, on a script that never mentions us."""

import json
import os
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
        "output_dir": folder, "optim": optim, "max_steps": 80, "logging_steps": 5, "use_cpu": True, "report_to": "none",
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
    ("args", "status", "text"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "usage"),
        (["nowhere.py"], 1, "no script"),
        (["elra_hf"], 1, "'elra_hf' is a folder without __main__.py: name the script in it"),
        (["-m", "nowhere"], 1, "no module"),
        (["-m", "nowhere.train"], 1, "no module"),
        (["-m", "json.nowhere"], 1, "no module"),
    ],
)
def test_what_it_says(args, status, text):
    done = launch([sys.executable, "-m", "elra_hf.run"], *args)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_module_misses_is_named_as_without_us(tmp_path):
    (tmp_path / "package.py").write_text("import absent")
    done = subprocess.run(
        [sys.executable, *RUN, "-m", "package"], cwd=tmp_path, env=at(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'absent'\n")


def at(*folders):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}


def test_a_script_finds_itself_after_it_went_elsewhere(tmp_path):
    """As Hydra does: the path in __file__ does not depend on the current folder."""
    (tmp_path / "script.py").write_text("import os\nos.chdir('/')\nprint(os.path.exists(__file__))")
    for ours in ([], RUN):
        command = [sys.executable, *ours, "script.py"]
        assert subprocess.run(command, cwd=tmp_path, env=at(), capture_output=True, text=True, timeout=60).stdout == "True\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_the_path_is_left_alone_where_python_leaves_it_alone(tmp_path):
    """Under -P the first place is no script's folder but PYTHONPATH's."""
    first, here = tmp_path / "first", tmp_path / "here"
    for folder in (first, here):
        folder.mkdir()
        (folder / f"of_{folder.name}.py").write_text("")
    code = "from importlib.util import find_spec\nprint(bool(find_spec('of_first')), bool(find_spec('of_here')))"
    (here / "script.py").write_text(code)
    for ours in ([], RUN):
        command = [sys.executable, "-P", *ours, str(here / "script.py")]
        done = subprocess.run(command, env=at(first), capture_output=True, text=True, timeout=60)
        assert done.stdout == "True False\n", done.stderr


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_a_script_may_come_from_standard_input(name, tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 7")
    code = "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n"
    code += "import neighbour\nprint(neighbour.VALUE)\n" if name == "-" else ""
    printed = []
    for ours in ([], RUN):
        command = [sys.executable, *ours, name, "--optim", "x"]
        done = subprocess.run(command, cwd=tmp_path, env=at(), input=code, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert printed[0].startswith("['--optim', 'x']")


ARGV = "import sys\nprint(sys.argv, __name__)"


@pytest.mark.parametrize("flag", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]], ids=" ".join)
def test_a_launchers_flag_goes_to_the_script(flag, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ARGV)
    done = launch([sys.executable, *RUN, *flag, str(script)], "--optim", "x")
    assert done.stdout == f"{[str(script), '='.join(flag), '--optim', 'x']} __main__\n", done.stderr


def test_torch_distributed_launch_starts_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ARGV)
    plain = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=1"]
    done, alone = (launch([*plain, *ours, str(script)], "--optim", "x") for ours in (["-m", "elra_hf.run"], []))
    assert done.stdout == alone.stdout  # the script sees what it sees without us
    assert "--local-rank=0" in done.stdout


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("options", [[], ["--replace", "AdamW=elra_p2min"]], ids=["names", "replace"])
def test_processes_that_the_script_starts_know_what_it_knows(method, options, tmp_path):
    arguments = [method, "--output_dir", str(tmp_path), "--optim", "elra_adamw", "--use_cpu", "True"]
    done = launch([sys.executable, *RUN, *options, str(ROOT / "tests/run/spawning_script.py")], *arguments)
    built = "ElraP2Min" if options else "AdamW"
    assert done.stdout.splitlines() == [f"{depth} elra_adamw {built}" for depth in range(3)], done.stderr


STARTING = """
import subprocess, sys
code = "import torch; net = torch.nn.Linear(1, 1); print(type(torch.optim.AdamW(net.parameters())).__name__)"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout, end="")
import sitecustomize
print(sitecustomize.__file__)
code = "import sitecustomize, sys; print(sitecustomize.__file__, *[each for each in sys.path if 'startup' in each])"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout, end="")
"""


def test_a_python_that_the_script_starts_knows_what_it_knows_and_keeps_its_own_start(tmp_path):
    script, own = tmp_path / "script.py", tmp_path / "own" / "sitecustomize.py"
    script.write_text(STARTING)
    own.parent.mkdir()
    own.write_text("")
    environment = os.environ | {"PYTHONPATH": f"{own.parent}{os.pathsep}{ROOT}"}
    command = [sys.executable, *RUN, "--replace", "AdamW=elra_adamw", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.splitlines() == ["ElraAdamW", str(own), str(own)], done.stderr


@pytest.mark.parametrize("options", [["-S"], []], ids=["no packages", "a lesson that cannot be read"])
def test_a_python_that_cannot_learn_still_starts(options, tmp_path):
    script = tmp_path / "script.py"
    spoilt = "" if options else "os.environ['ELRA_HF_RUN'] = '?'"
    script.write_text(f"import os, subprocess, sys\n{spoilt}\nsubprocess.run([sys.executable, *{options}, '-c', 'print(1)'])")
    done = launch([sys.executable, *RUN, str(script)])
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_python_that_the_script_starts_has_nothing_to_say_of_its_start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'])")
    done = launch([sys.executable, *RUN, str(script)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("place", ["{}:", ":{}"])
def test_an_empty_entry_of_the_path_is_the_current_folder_in_each_of_them(place, tmp_path):
    """As `export PYTHONPATH=$PYTHONPATH:/somewhere` leaves it."""
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "script.py"
    script.write_text(
        "import subprocess, sys, neighbour\n"
        "if len(sys.argv) < 3:\n"
        "    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:], 'more']).returncode)"
    )
    environment = os.environ | {"PYTHONPATH": place.format(ROOT).replace(":", os.pathsep)}
    command = [sys.executable, *RUN, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


REPLACING = """
import copy, pickle
import torch
from torch.optim import AdamW

class Mine(AdamW):
    pass

net = torch.nn.Linear(4, 2)
groups = [{"params": [net.weight], "weight_decay": 0.1, "amsgrad": True}, {"params": [net.bias], "lr": 0.02}]
optimizer = AdamW(groups, 0.01, (0.8, 0.9), fused=True)
assert isinstance(optimizer, AdamW) and isinstance(optimizer, torch.optim.AdamW) and isinstance(copy.deepcopy(optimizer), AdamW)
assert not isinstance(torch.optim.SGD(net.parameters()), AdamW)
assert issubclass(AdamW, torch.optim.Optimizer) and AdamW.__name__ == "AdamW"
assert type(pickle.loads(pickle.dumps(optimizer))) is type(optimizer)
assert [each.__name__ for each in Mine.__mro__][:3] == ['Mine', 'AdamW', 'Adam'] and type(Mine(net.parameters())) is Mine
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
before = net.weight.detach().clone()
for _ in range(3):
    optimizer.zero_grad()
    net(torch.ones(8, 4)).square().mean().backward()
    optimizer.step()
    schedule.step()
assert (net.weight != before).all()
seen = [(g["lr"], g["initial_lr"], g["weight_decay"], g["betas"], g.get("amsgrad")) for g in optimizer.param_groups]
print(type(optimizer).__name__, *seen)
"""


@pytest.mark.parametrize(
    ("name", "cls", "betas", "ignored"),
    [
        ("elra_adamw", "ElraAdamW", (0.8, 0.9), "amsgrad=True, fused=True"),
        ("elra_c2min", "ElraC2Min", (0.8, 0.7), "amsgrad=True, betas=(0.8, 0.9), fused=True"),
    ],
)
def test_ours_takes_the_place_of_a_scripts_own_adamw(name, cls, betas, ignored, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REPLACING)
    done = launch([sys.executable, *RUN, "--replace", f"AdamW={name}", str(script)])
    first = (0.00125, 0.01, 0.1, betas, None)
    assert done.stdout == f"{cls} {first} {(0.0025, 0.02, 0.01, betas, None)}\n", done.stderr
    said = f"elra_hf.run: torch.optim.AdamW is replaced by {cls}; ignored, since it has no such option: {ignored}"
    assert [line for line in done.stderr.splitlines() if "elra_hf" in line] == [said]


def test_replacing_nothing_is_said(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch")
    done = launch([sys.executable, *RUN, "--replace=AdamW=elra_adamw", str(script)])
    assert "this process built no torch.optim.AdamW" in done.stderr


@pytest.mark.parametrize("given", [{"optim": "adafactor", "optim_args": "scale_parameter=True"}, {"optim": "elra_c2min"}])
def test_a_script_that_never_heard_of_us_finds_a_rate(given, tmp_path):
    own = [each for each in options(tmp_path) if not each.startswith(("--optim", "--max_steps"))]
    added = [f"--{key}={value}" for key, value in given.items()]
    command = [sys.executable, *RUN, "--find-rate", "40", str(SCRIPT)]
    done = launch(command, *own, *added, "--max_steps=1000", "--save_strategy=steps", "--save_steps=10")
    assert done.returncode == 0, done.stderr
    name = "ElraC2Min" if given["optim"] == "elra_c2min" else "ElraAdamW"
    assert done.stdout.count(f"{name} found the rate ") == 1
    assert "RateFinder: 40 steps" in done.stdout
    assert not list(tmp_path.iterdir())  # neither a checkpoint nor what the script saves after the training


def test_two_processes_find_one_rate(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launch([*torchrun, *RUN, "--find-rate=10", str(SCRIPT)], *options(tmp_path, "adamw_torch")[:1], "--use_cpu=True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("found the rate") == done.stdout.count("RateFinder: 10 steps") == 1


def test_a_script_that_brings_its_own_optimizer_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OWN_OPTIMIZER)
    alone, replaced = (
        launch([sys.executable, *RUN, "--find-rate=20", *more, str(script)], str(tmp_path / "out"))
        for more in ([], ["--replace=AdamW=elra_adamw"])
    )
    assert alone.returncode == 1
    assert alone.stderr.splitlines()[-1].endswith("its own AdamW: put --replace AdamW=elra_adamw before SCRIPT, too")
    assert replaced.returncode == 0, replaced.stderr
    assert "ElraAdamW found the rate" in replaced.stdout


OWN_OPTIMIZER = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from tests.run.plain_script import Counting
from transformers import GPT2Config, GPT2LMHeadModel

config = GPT2Config(vocab_size=20, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
args = TrainingArguments(sys.argv[1], use_cpu=True, report_to="none", disable_tqdm=True)
Trainer(model, args, train_dataset=Counting(256), optimizers=(optimizer, None)).train()
raise AssertionError("the script goes on")
"""


def test_a_script_without_a_trainer_finds_nothing_and_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch")
    done = launch([sys.executable, *RUN, "--find-rate=20", str(script)])
    assert "--find-rate: this process itself trained with no Trainer of transformers" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--find-rate", "many", str(SCRIPT)], "--find-rate many: give the number of steps, e.g. --find-rate 200"),
        (["--find-rate=0", str(SCRIPT)], "--find-rate 0: give the number of steps"),
        (
            ["--optim", "elra_adamw", "train.py"],
            "unknown option --optim before SCRIPT; the script's own options stand after it",
        ),
        (["--replace", "SGD=elra_adamw", "train.py"], None),
        (["--replace", "AdamW=elra_adam", str(SCRIPT)], "give AdamW=NAME with NAME one of elra_c2min, elra_p2min, elra_adamw"),
        (["--replace", "SGD=elra_adamw", str(SCRIPT)], "--replace SGD=elra_adamw: give AdamW=NAME"),
        (["--replace"], "--replace has no value: give --replace=VALUE"),
    ],
)
def test_a_wrong_option_is_one_line(args, message):
    done = launch([sys.executable, *RUN], *args)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert (message or "no script 'train.py'") in done.stderr


def test_help_names_the_optimizers_on_an_ascii_terminal():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, *RUN, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("elra_c2min", "elra_p2min", "elra_adamw", "--replace AdamW="))


@pytest.mark.parametrize("options", [["late.py"], ["-m", "late"]])
def test_what_runs_after_the_script_finds_its_classes(options, tmp_path):
    (tmp_path / "late.py").write_text(
        "import atexit, pickle, sys, threading, time\n"
        "class Net: pass\n"
        "def thread():\n"
        "    time.sleep(0.3)\n"
        "    print(type(pickle.loads(pickle.dumps(Net()))).__name__)\n"
        "atexit.register(lambda: print(len(pickle.dumps(Net())) > 0))\n"
        "threading.Thread(target=thread).start()\n"
        "sys.exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "elra_hf.run", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["Net", "True"], done.stderr


def test_annotations_mean_what_they_mean_without_us(tmp_path):
    source = "def f(x: int): pass\nprint(f.__annotations__)"
    (tmp_path / "script.py").write_text(source)
    for name in (str(tmp_path / "script.py"), "-"):
        done = subprocess.run([sys.executable, *RUN, name], input=source, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "{'x': <class 'int'>}", done.stderr
