"""README and the pages: their Python blocks run as they stand, and their links lead somewhere. For commands: test_commands.py.

A block that needs what a test does not have says so: its first line is a comment "needs …".
"""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min
from elra_hf.rules.c2min import FIRST as FIRST_OF_C2MIN
from elra_hf.rules.p2min import FIRST as FIRST_OF_P2MIN
from tests.recipes.conftest import rows_csv, tiny_model  # noqa: F401

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# mkdocs checks the links of docs/
PAGES_OF_THE_REPOSITORY = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
# the trainers in the second line have tests of their own, tests/trainers
NEEDS = re.compile(
    r"# needs (GPUs|a GPU|the hub|several processes|DeepSpeed|"
    r"sd-scripts|sentence-transformers|timm|axolotl|torchtitan|LLaMA-Factory|ms-swift)\b"
)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


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


def test_extras_that_pip_is_told_exist():
    told = {extra for page in PAGES for extra in re.findall(r"\.\[(\w+)\]", page.read_text())}
    assert {"transformers", "lightning", "recipes"} <= told <= set(metadata.metadata("elra_hf").get_all("Provides-Extra"))


@pytest.mark.parametrize("page", PAGES_OF_THE_REPOSITORY, ids=lambda page: str(page.relative_to(ROOT)))
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


def test_the_formulas_hold_the_constants_of_the_rules():
    page, x = (ROOT / "docs/how.md").read_text(), [torch.nn.Parameter(torch.ones(2))]
    tracking, c2min, p2min = (cls(x).rule for cls in (ElraAdamW, ElraC2Min, ElraP2Min))
    over, first = tracking.early_gain * tracking.horizon, FIRST_OF_C2MIN
    for formula in (
        rf"\max\left({tracking.gain},\ \dfrac{{{over:g}}}{{{tracking.horizon:g} + t}}\right)",
        rf"\left(1 + {c2min.gain}\, s_t\right)",
        rf"\dfrac{{{c2min.horizon:g}}}{{{c2min.horizon:g} + t}}\, w_t\, c_t",
        rf"w_t\, {p2min.horizon:g}/({p2min.horizon:g}+t)",
        f"`lr` does not matter: {tracking.first} times the typical size of a weight for `elra_adamw`",
        f"the first step is {first} of the weights long, and half of that for `elra_p2min`",
    ):
        assert formula in page.replace("\n", " ")
    assert first / 2 == FIRST_OF_P2MIN
