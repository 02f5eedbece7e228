"""The wheel: what is in it, and that it works in an environment of its own."""

import email
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from readme_renderer import markdown

import elra_hf

ROOT = Path(__file__).parents[1]
DEPENDENCIES = Path(torch.__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # with the build backend of this environment, so that no network is needed
    command = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=100)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The Python of an environment in which nothing but the wheel is installed; dependencies are found behind it."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=100)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{DEPENDENCIES}\n")
    return python


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"elra_hf", f"elra_hf-{elra_hf.__version__}.dist-info"}
    inside = {name for name in names if name.startswith("elra_hf/")}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "elra_hf").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert inside == ours
    assert "elra_hf/py.typed" in inside


USED = """
from importlib.metadata import entry_points
import torch, elra_hf
assert all(hasattr(elra_hf, name) for name in elra_hf.__all__)
found = {entry.name: entry.load().__name__ for entry in entry_points(group="llmfoundry_optimizers")}
assert found == {"elra_adamw": "ElraAdamW", "elra_c2min": "ElraC2Min", "elra_p2min": "ElraP2Min"}
w = torch.nn.Parameter(torch.ones(3))
optimizer = elra_hf.ElraAdamW([w])
for _ in range(20):
    optimizer.zero_grad()
    w.square().sum().backward()
    optimizer.step()
assert w.abs().max() < 1
print(elra_hf.__file__)
"""


@pytest.mark.parametrize(
    ("command", "said"), [(["-m", "elra_hf.run", "--help"], "usage: python -m elra_hf.run"), (["-c", USED], "site-packages")]
)
def test_it_works_where_nothing_else_is_installed(command, said, clean, tmp_path):
    done = subprocess.run([clean, "-I", *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    if said == "site-packages":
        assert done.stdout.startswith(str(clean.parents[1]))


def test_recipes_and_tests_stay_outside(clean, tmp_path):
    code = "import importlib.util as u; print([name for name in ('recipes', 'tests', 'docs') if u.find_spec(name)])"
    done = subprocess.run([clean, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "[]\n", done.stderr


def test_the_long_description_renders_and_leads_nowhere_that_is_not_there(wheel):
    text = metadata(wheel).get_payload()
    html = markdown.render(text)
    assert html
    assert "<table>" in html
    assert "<pre" in html
    for target in re.findall(r'(?:href|src)="([^"]*)"', html):
        assert target.startswith(("https://", "#")), target
    title = (ROOT / "README.md").read_text().splitlines()[0].removeprefix("# ")
    assert re.search(f"<h1[^>]*>{title}<", html)


def test_the_metadata_says_what_it_is(wheel):
    found = metadata(wheel)
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Author"]
    assert found["Keywords"]
    assert all(": https://" in url or ", https://" in url for url in found.get_all("Project-URL"))
    assert {"transformers", "lightning", "recipes"} <= set(found.get_all("Provides-Extra"))


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == elra_hf.__version__
    assert cited["license"] == "Apache-2.0"
    assert cited["references"][0]["url"] == "https://arxiv.org/abs/2309.06274"
