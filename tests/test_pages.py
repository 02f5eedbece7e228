"""README and the pages of docs/: their Python blocks and commands run as they stand, and their links lead somewhere.

A block or command that needs what a test does not have says so: its first line, or its end, is a comment "needs …".
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.recipes.conftest import rows_csv, tiny_model  # noqa: F401

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the trainers in the second line have tests of their own, tests/trainers
NEEDS = re.compile(
    r"# needs (GPUs|a GPU|the hub|several processes|DeepSpeed|"
    r"sd-scripts|sentence-transformers|timm|axolotl|torchtitan|LLaMA-Factory|ms-swift)\b"
)
# what makes a recipe take seconds; the last of two equal options counts
SMALL = {
    "recipes.text_classification.train": "--model_name_or_path {model} --train_file {rows} --freeze_layers 1 --max_steps 2 "
    "--output_dir {out} --use_cpu true --report_to none",
    "recipes.language_modeling.train": "--train_file {text} --layers 1 --width 32 --vocab_size 300 --block_size 16 "
    "--max_steps 2 --output_dir {out} --use_cpu true --report_to none",
    "recipes.image_classification.train": "--data.dataset mnist_5k --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.log_every_n_steps 1 --model.net cnn --model.width 4 --trainer.accelerator cpu --trainer.logger.save_dir {out}",
    "recipes.bare_loop.train": "--steps 2 --layers 1 --width 32",
    "elra_hf.run": "--output_dir {out} --max_steps 2 --use_cpu true --report_to none",
}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]
COMMANDS = [
    line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines() if line
]
RUNNING = sorted(
    {line.split(" # ")[0].strip() for line in COMMANDS if not line.startswith(("make", "pip")) and not NEEDS.search(line)}
)


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, block, id=f"{page.name}-{block.splitlines()[0][:40]}") for page, block in PYTHON],
)
def test_python_blocks_run(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(block, page.name, "exec")
    if not NEEDS.match(block):
        exec(code, {"__name__": "page"})


def test_most_of_them_run():
    assert len([block for _, block in PYTHON if NEEDS.match(block)]) <= 5 < 12 <= len(PYTHON)


@pytest.mark.parametrize("command", RUNNING)
def test_commands_run(command, tmp_path, tiny_model, rows_csv):  # noqa: F811
    """In a copy of the folders that they name, and as small as can be."""
    [module] = [name for name in SMALL if f"-m {name}" in command]
    for name in ("recipes", "elra_hf"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "tests/run/plain_script.py", tmp_path / "train.py")
    (tmp_path / "book.txt").write_text(Path(rows_csv).read_text() * 4)
    small = SMALL[module].format(model=tiny_model, rows=rows_csv, text=tmp_path / "book.txt", out=tmp_path / "out")
    words = [*shlex.split(command), *shlex.split(small)]
    if "--replace" in words:
        (tmp_path / "train.py").write_text(OWN_ADAMW)
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # torchrun --standalone, which takes a free port: several tests run at a time
    environment = os.environ | {"PATH": paths, "PET_STANDALONE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


OWN_ADAMW = """
import torch
optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1e-3)
assert type(optimizer).__name__ == "ElraAdamW"
"""


@pytest.mark.parametrize("command", sorted({line.split(" # ")[0].strip() for line in COMMANDS if line.startswith("make")}))
def test_make_knows_its_targets(command):
    shutil.which("make") or pytest.skip("no make")
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    if command == "make demo":
        assert "recipes.text_classification.train --optim elra_adamw" in done.stdout


@pytest.mark.parametrize("command", sorted({line.split(" # ")[0].strip() for line in COMMANDS if line.startswith("pip")}))
def test_extras_that_pip_is_told_exist(command):
    assert set(re.findall(r"\.\[(\w+)\]", command)) <= set(metadata.metadata("elra_hf").get_all("Provides-Extra"))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:recipes|tests|docs|model_cards|elra_hf)/[\w./-]+)", page.read_text()):
        assert (ROOT / path).exists(), path


def test_readme_is_one_screen_and_a_bit():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_pages_are_few_and_their_pictures_small():
    assert len(list((ROOT / "docs").glob("*.md"))) <= 15
    pictures = list((ROOT / "docs/img").iterdir())
    assert sum(picture.stat().st_size for picture in pictures) < 1_000_000
    text = "".join(page.read_text() for page in PAGES)
    assert [picture.name for picture in pictures if f"img/{picture.name}" not in text] == []
    assert all((ROOT / "docs" / name).is_file() for name in re.findall(r"\]\((img/[^)]+)\)", text))
