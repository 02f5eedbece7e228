"""Every command in the shell blocks of the pages runs, made small by what `SMALL` adds to it.

What is left out says why at the end of its line in the page: "needs a GPU", "needs the hub", "39 minutes". Commands of `make`
are run as what `make -n` says they do. All commands of one script run in one folder, in the order of the pages, since some go
on from what others left. They run as `python -m` would run them, in children of a process that has imported the libraries once.
"""

import functools
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.recipes.conftest import rows_csv, tiny_model  # noqa: F401

if not shutil.which("make"):
    pytest.skip("no make", allow_module_level=True)
ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/configs/multi_gpu.md")),
    *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")]),
]
NEEDS = re.compile(r"needs (a GPU|GPUs|the hub|DeepSpeed|Debian|sd-scripts|timm|LLaMA-Factory|ms-swift)\b")
LONG = re.compile(r"\b(minutes|hours)\b")
TRAINER = "--max_steps 2 --report_to none --use_cpu true"
IMAGES = (
    "--data.dataset mnist_5k --model.net cnn --model.width 4 --trainer.accelerator cpu --trainer.max_epochs 1 "
    "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.log_every_n_steps 1"
)
BERT = f"--model_name_or_path model --freeze_layers 1 {TRAINER}"
GPT = f"--train_file book.txt --layers 1 --width 32 --vocab_size 300 --block_size 16 {TRAINER}"
# what a command names → what makes it take seconds; the last of two equal options counts
SMALL = {
    "recipes.text_classification.train": f"--train_file rows.csv {BERT}",
    "recipes.text_classification.train --train_file": BERT,
    "recipes.language_modeling.train": GPT,
    "recipes.language_modeling.train --save_strategy": f"{GPT} --max_steps 200",
    "recipes.language_modeling.train --resume_from_checkpoint": f"{GPT} --max_steps 201",
    "recipes.image_classification.train": IMAGES,
    "recipes.image_classification.train fit --optimizer.help": "",
    "recipes/image_classification/train.py": IMAGES,
    "recipes.bare_loop.train": "--steps 2 --layers 1 --width 32",
    "recipes.bare_loop.train_adamw": "--steps 2 --layers 1 --width 32",
    "recipes.benchmarks run --tasks": "--optimizers elra_adamw --steps 2 --seeds 1 --workers 1",
    "recipes.benchmarks run --study batch-sizes": "",  # the rows are there
    "recipes.benchmarks run --study noise": "",
    "recipes.benchmarks finder": "",
    "recipes.benchmarks report": "",
    "recipes.benchmarks.untuned": "",
    "elra_hf.run": f"--output_dir out {TRAINER}",
}
# what runs elsewhere, and where
ELSEWHERE = {
    "make test": ".ci/run",
    "make docs": "tests/test_commands.py",
    **dict.fromkeys(
        ("pip install -e .", *(f'pip install -e ".[{x}]"' for x in ("transformers", "lightning", "recipes"))),
        "tests/test_commands.py",
    ),
    "python -m recipes.image_classification.train fit --trainer.strategy ddp --trainer.devices 2 --trainer.accelerator cpu": (
        "tests/recipes/test_image_classification.py"
    ),
    "torchrun --nproc_per_node 2 -m recipes.text_classification.train": "tests/distributed/test_recipe.py",
    "accelerate launch --config_file recipes/configs/ddp.yaml -m recipes.text_classification.train": (
        "tests/distributed/test_recipe.py"
    ),
    "accelerate launch --config_file recipes/configs/ddp.yaml -m recipes.bare_loop.train": "tests/recipes/test_bare_loop.py",
    "torchrun --nproc_per_node 2 -m elra_hf.run train.py --optim elra_adamw": "tests/run/test_run.py",
    "accelerate launch -m elra_hf.run train.py --optim elra_adamw": "tests/run/test_run.py",
}
LIBRARIES = [
    "torch", "transformers.trainer", "datasets", "peft", "sklearn.metrics", "matplotlib.pyplot", "lightning.pytorch.cli",
    "torchmetrics", "accelerate",
]  # fmt: skip
OWN_ADAMW = """
import torch
optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1e-3)
assert type(optimizer).__name__ == "ElraAdamW"
"""


def key_of(command: str) -> str | None:
    """The entry of SMALL that a command comes under, the longest."""
    return max((key for key in SMALL if f" {key} " in f" {command} "), key=len, default=None)


def in_blocks(page: Path) -> list[tuple[str, str]]:
    """(command, comment) of each line of the shell blocks."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [(" ".join(command.split()), comment) for command, _, comment in (line.partition(" #") for line in lines) if command]


def in_text(page: Path) -> list[str]:
    """The commands between the words, whole ones."""
    return [" ".join(found.split()) for found in re.findall(r"`((?:python|torchrun) [^`…]+)`", page.read_text())]


@functools.cache
def made(command: str) -> list[str]:
    """What a command of make does, where all is installed."""
    installed = [f"--old-file={sys.prefix}/{name}" for name in (".installed", ".installed-bench")]
    words = ["make", "-n", "--no-print-directory", *installed, f"VENV={sys.prefix}", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return [" ".join(line.replace(f"{sys.prefix}/bin/", "").split()) for line in done.stdout.splitlines()]


def lines_of(command: str) -> list[str]:
    """The commands to run: of one that cannot be made small, none."""
    lines = made(command) if command.startswith("make ") else [command]
    return lines if all(map(key_of, lines)) else []


BLOCKS = [found for page in PAGES for found in in_blocks(page)]
TEXT = [command for page in PAGES for command in in_text(page)]


def groups() -> dict[str, list[str]]:
    """Script → its commands, each once, as they stand in the pages."""
    grouped: dict[str, dict[str, None]] = {}
    wanted = [command for command, comment in BLOCKS if not NEEDS.search(comment)]
    for command in [*wanted, *TEXT]:
        for line in [] if command in ELSEWHERE else lines_of(command):
            grouped.setdefault(key_of(line).split()[0], {})[line] = None
    return {script: list(lines) for script, lines in grouped.items()}


GROUPS = groups()


@functools.cache
def server() -> multiprocessing.context.BaseContext:
    """Makes processes that have imported what is large."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def as_python(words: list[str], folder: Path) -> None:
    """Do in this process what the words do that follow `python`; what they print goes to a file."""
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    module = words[0] == "-m"
    sys.argv = words[module:]
    sys.path.insert(0, str(folder if module else Path(words[0]).parent.resolve()))
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run(command: str, folder: Path) -> tuple[int | None, str]:
    """Exit status and what was said."""
    words = [*shlex.split(command), *shlex.split(SMALL[key_of(command)])]
    if words[0] == "python":
        process = server().Process(target=as_python, args=(words[1:], folder))
        process.start()
        process.join(200)
        process.kill()
        return process.exitcode, (folder / "said.txt").read_text()
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # torchrun --standalone, which takes a free port: several tests run at a time
    environment = os.environ | {"PATH": paths, "PET_STANDALONE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", GROUPS)
def test_commands_run(script, tmp_path, tiny_model, rows_csv):  # noqa: F811
    for name in ("recipes", "elra_hf", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(tiny_model, tmp_path / "model")
    rows = Path(rows_csv).read_text()
    (tmp_path / "rows.csv").write_text(rows)
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).write_text(rows.replace("label", "kind", 1))
    (tmp_path / "book.txt").write_text(rows * 4)
    (tmp_path / "my.yaml").write_text("weight_decay: 0.1\n")
    for command in GROUPS[script]:
        (tmp_path / "train.py").write_text(
            OWN_ADAMW if "--replace" in command else (ROOT / "tests/run/plain_script.py").read_text()
        )
        began = time.perf_counter()
        status, said = run(command, tmp_path)
        print(f"{time.perf_counter() - began:.1f} s: {command}")
        assert status == 0, f"{command}\n{said[-4000:]}"


def test_make_docs_serves_the_pages(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    [command] = made("make docs")
    address = f"127.0.0.1:{port}"
    words = [sys.executable, "-m", *shlex.split(command), "--dev-addr", address, "--no-livereload"]
    with (tmp_path / "said.txt").open("w") as said, subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said) as serving:
        try:
            for _ in range(600):
                if serving.poll() is not None or "Serving on" in (tmp_path / "said.txt").read_text():
                    break
                time.sleep(0.2)
            page = urllib.request.urlopen(f"http://{address}/", timeout=20).read().decode()
        finally:
            serving.terminate()
    assert "Three minutes to the first run" in page, (tmp_path / "said.txt").read_text()


@pytest.mark.parametrize("command", [command for command in ELSEWHERE if command.startswith("pip ")])
def test_what_pip_is_told_can_be_installed(command):
    """A dry run, without an index: everything that it asks for is there. That -e works the Makefile shows."""
    options = ["--dry-run", "--no-index", "--no-build-isolation"]
    words = [sys.executable, "-m", *(word for word in shlex.split(command) if word != "-e"), *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "Would install elra_hf" in done.stdout, done.stderr
    assert "provide the extra" not in done.stderr  # pip warns of one that is not there, and goes on


def test_what_is_left_out_says_why():
    marked = {command for command, comment in BLOCKS if NEEDS.search(comment) or LONG.search(comment)}
    for command, _ in BLOCKS:
        assert command in marked or command in ELSEWHERE or lines_of(command), command


def test_commands_in_the_text_name_what_there_is():
    for command in TEXT:
        for module in re.findall(r"-m ([\w.]+)", command):
            assert importlib.util.find_spec(module), command


def test_nothing_here_is_idle():
    assert {key_of(line) for lines in GROUPS.values() for line in lines} == set(SMALL)
    commands = {command for command, _ in BLOCKS}
    assert set(ELSEWHERE) <= commands
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())
