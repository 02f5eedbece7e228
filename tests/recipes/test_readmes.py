"""Every command of the recipes' READMEs is one that the recipe takes; what needs GPUs, DeepSpeed or the hub says so."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from recipes.bare_loop import job
from recipes.benchmarks import __main__ as bench
from recipes.benchmarks import run as bench_run
from recipes.cli import run

from .conftest import ROOT

PAGES = sorted([*(ROOT / "recipes").glob("*/README.md"), ROOT / "recipes/configs/multi_gpu.md"])
MARK = re.compile(r"needs (a GPU|GPUs|DeepSpeed|the hub)\b")


def commands(page: Path) -> list[str]:
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    return [line for line in blocks.replace("\\\n", " ").splitlines() if line]


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]
RECIPES = sorted({line for _, line in COMMANDS if re.search(r"\brecipes[./]\w+", line)})


class Taken(Exception):  # noqa: N818
    """The command line has been read without complaint."""


def stop(*_, **__):
    raise Taken


@pytest.mark.parametrize("line", RECIPES)
def test_the_recipe_takes_the_command(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)
    for config in re.findall(r"--config_file (\S+)", line):
        assert (ROOT / config).is_file()
    at = next(i for i, word in enumerate(words) if word.startswith("recipes") and not words[i - 1].startswith("--"))
    module, arguments = words[at].removesuffix(".py").replace("/", "."), words[at + 1 :]
    _, recipe, *_ = module.split(".")
    monkeypatch.setattr(sys, "argv", [words[at], *arguments])
    if recipe == "benchmarks":
        if arguments[:1] == ["run"]:
            monkeypatch.setattr(bench_run, "execute", stop)
            with pytest.raises(Taken):
                bench_run.main(arguments[1:])
        elif arguments:
            assert arguments[0] in bench.COMMANDS
            assert all((ROOT / path).is_file() for path in arguments[1:] if path.endswith(".csv"))
        else:
            assert importlib.import_module(module).table()
        return
    if recipe == "bare_loop":
        assert job.options()
        return
    recipe = importlib.import_module(module)
    if hasattr(recipe, "parse_runs"):
        parse = recipe.parse_runs
        monkeypatch.setattr(recipe, "parse_runs", lambda *given: parse(*given) and stop())
        (tmp_path / "outputs/language_modeling/base/checkpoint-200").mkdir(parents=True)
        (tmp_path / "outputs/language_modeling/base/checkpoint-200/trainer_state.json").touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Taken):
            recipe.main(arguments)
    else:
        if not {"--print_config", "--optimizer.help"} & set(arguments):
            sys.argv.append("--print_config")
        with pytest.raises(SystemExit) as ended:
            run(recipe.main, arguments)
        assert ended.value.code == 0


def test_other_commands_are_of_make_and_apt():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in {line for _, line in COMMANDS} - set(RECIPES):
        words = shlex.split(line, comments=True)
        assert words[0] == "apt-get" or (words[0] == "make" and words[1] in targets), line


def test_what_a_test_cannot_run_is_marked():
    """A name with an owner is one on the hub; FSDP and ZeRO-3 over eight are for GPUs."""
    for _, line in COMMANDS:
        hub = re.search(r"(model_name_or_path|dataset_name) (?!outputs)\S+/\S+|distilbert", line)
        if hub or re.search(r"fsdp2|zero\d|\bscale\b(?! --size small)", line):
            assert MARK.search(line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
