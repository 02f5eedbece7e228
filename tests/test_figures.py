"""Figures in README, pages and cards are those of the committed rows."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

from recipes.benchmarks import finder, report, untuned
from recipes.benchmarks.run import key
from recipes.sweep import read, spread

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "docs/evidence.md").read_text()
PROSE = EVIDENCE.replace("\n", " ")
RESULTS = ROOT / "recipes/benchmarks/results"


def table_rows(text: str, pattern: str) -> list[list[str]]:
    """The cells of the table lines whose first cell matches."""
    lines = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if re.fullmatch(pattern, cells[0])]


def section(title: str) -> str:
    """A part of the evidence."""
    return EVIDENCE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_text_classification():
    rows = read(ROOT / "model_cards/text_classification/results.csv")
    shown = table_rows(section("A pretrained transformer"), "elra_[a-z0-9]+|adamw_torch")
    assert len(shown) == 5
    for optim, rate, accuracy, f1 in shown:
        chosen = "" if rate == "none given" else rate.split(",")[0]
        runs = [row for row in rows if (row["optim"], row["learning_rate"]) == (optim, chosen)]
        assert len(runs) == 3
        assert (accuracy, f1) == (spread(runs, "test_accuracy"), spread(runs, "test_macro_f1"))


def test_language_modeling():
    rows = read(ROOT / "model_cards/language_modeling/results.csv")
    shown = [
        cells for cells in table_rows(EVIDENCE, "elra_adamw|adamw_torch") if len(cells) == 4 and float(cells[3].split()[0]) > 1
    ]
    assert len(shown) == 6
    means = {}
    for optim, rate, *figures in shown:
        runs = [row for row in rows if (row["optim"], row["learning_rate"]) == (optim, "" if rate == "none given" else rate)]
        assert len(runs) == 3
        assert figures == [spread(runs, "test_loss"), spread(runs, "test_perplexity")]
        means[optim, rate] = [mean(float(row[name]) for row in runs) for name in ("test_loss", "test_perplexity")]
    ours = means.pop(("elra_adamw", "none given"))
    best = min(means, key=lambda key: means[key])
    assert best == ("adamw_torch", "1e-2")
    loss, perplexity = (f"{mine / theirs:.3f}" for mine, theirs in zip(ours, means[best], strict=True))
    assert f"ends at {loss} of the best AdamW's loss, which is {perplexity} of its perplexity" in PROSE
    recipes = (ROOT / "docs/recipes.md").read_text().replace("\n", " ")
    assert f"ends at {loss} of the loss of AdamW with the best of five rates ({perplexity} of its perplexity)" in recipes


def test_how_many_steps_it_needs():
    folder = ROOT / "model_cards/language_modeling"
    rows = [*read(folder / "steps.csv"), *(row | {"max_steps": "200"} for row in read(folder / "results.csv"))]
    measured = {(row["max_steps"], row["learning_rate"]): float(row["test_loss"]) for row in rows if row["seed"] == "0"}
    page = (ROOT / "docs/choose.md").read_text().split("## How many steps it needs")[1]
    shown = table_rows(page, r"\d+")
    assert len(shown) == 4
    for steps, *losses in shown:
        expected = [measured.get((steps, rate)) for rate in ("", "5e-5", "1e-3", "1e-2")]
        assert losses == ["–" if loss is None else f"{loss:.3f}" for loss in expected]


def test_the_card_of_language_modeling_is_that_of_a_row():
    [row] = [
        row
        for row in read(ROOT / "model_cards/language_modeling/results.csv")
        if row["optim"] == "elra_adamw" and row["seed"] == "0"
    ]
    card = (ROOT / "model_cards/language_modeling/README.md").read_text()
    for name in ("loss", "perplexity"):
        assert f"| {name} (test) | {float(row[f'test_{name}']):.4f} |" in card
    assert "\n  found_rate: " in card


def test_image_classification():
    rows = read(ROOT / "model_cards/image_classification/results.csv")
    card = (ROOT / "model_cards/image_classification/README.md").read_text()
    shown = table_rows(card, "Elra[A-Za-z0-9]+")
    assert len(shown) == 6
    for optimizer, processes, *cells in shown:
        runs = [row for row in rows if (row["optimizer"], row["processes"]) == (optimizer, processes)]
        measured = [float(row["test_accuracy"]) for row in sorted(runs, key=lambda row: row["seed"])]
        assert cells[0] == " ".join(f"{accuracy:.4f}" for accuracy in measured)
        losses = [float(row["test_loss"]) for row in runs]
        assert cells[1:3] == [f"{mean(values):.4f} ± {stdev(values):.4f}" for values in (measured, losses)]


@pytest.mark.parametrize("name", ["quick", "full", "batch-sizes", "noise"])
def test_the_report_is_that_of_the_rows(name, tmp_path):
    path = Path(shutil.copy(RESULTS / f"{name}.csv", tmp_path))
    assert (RESULTS / f"{name}.md").read_text() == report.report(path)


def regret(name: str) -> dict[str, list[str]]:
    """The lines of a report's first table, by optimizer."""
    table = (RESULTS / f"{name}.md").read_text().split("![Regret]")[0]
    _, *rows = table_rows(table, "[a-z].+")
    return {cells[0]: cells for cells in rows}


def test_nothing_set_against_a_sweep():
    lines = README.splitlines()
    mean_row, worst_row = untuned.means()
    for row in (mean_row, worst_row):
        assert f"| {' | '.join(row)} |" in lines
    prose = README.replace("\n", " ")
    assert f"over {len(untuned.quotients())} tasks at {mean_row[1]} of its test loss with a linear decay" in prose
    assert f"at worst at {worst_row[1]}. The worst is a tiny BERT from scratch on movie sentences" in prose
    of = untuned.quotients()
    assert max(of, key=lambda task: of[task]["linear"]) == "bert-movies"


def test_any_rate_trains_alike():
    rows = {
        name: [row for row in read(RESULTS / f"{name}.csv") if row["optimizer"] == "elra_adamw"]
        for name in ("language", "any-rate")
    }
    default = {(row["task"], row["schedule"], row["seed"]): row["test_loss"] for row in rows["language"]}
    assert {(row["task"], row["rate"]) for row in rows["any-rate"]} == {
        (task, rate) for task in ("minilm-probe", "gpt-lora-r8", "gpt-tune") for rate in ("1e-09", "1")
    }
    for row in rows["any-rate"]:
        assert row["test_loss"] == default[row["task"], row["schedule"], row["seed"]]


def test_a_gpt_of_a_million_parameters():
    table = (RESULTS / "scale-small-amd-epyc.md").read_text()
    constant, linear = (
        re.findall(rf"^\| elra_adamw, {schedule} \| 2 \| [^|]+ \| ([\d.]+) \|", table, re.MULTILINE)
        for schedule in ("constant", "linear")
    )
    assert "ends at {}, {} and {} of its loss at a constant rate,".format(*constant) in PROSE
    assert "with a linear decay at {}, {} and {} (2 seeds)".format(*linear) in PROSE


def test_a_gpt_of_105_million_parameters():
    rows = read(RESULTS / "scale-nvidia-h200.csv")
    report = (RESULTS / "scale-nvidia-h200.md").read_text()
    text = section("A GPT of 105 million parameters")
    assert "\n| | AdamW, best of 5 rates | elra_adamw, constant | linear | rate found, constant |\n" in text
    shown = table_rows(text, "(from|all|LoRA).+")
    first = []
    for name, (_, *cells) in zip(("scratch", "tune", "lora"), shown, strict=True):
        task = [row for row in rows if row["task"] == f"large-{name}"]
        best = min((row for row in task if row["optimizer"] == "adamw"), key=lambda row: float(row["validation_loss"]))
        ours = {row["schedule"]: row for row in task if row["optimizer"] == "elra_adamw"}
        over = {s: f"{float(row['test_loss']) / float(best['test_loss']):.3f}" for s, row in ours.items()}
        first.append(over["constant"])
        assert cells[0].split() == [f"{float(best['test_loss']):.3f}", f"({float(best['rate']):g})"]
        assert cells[1:3] == [f"{float(ours[s]['test_loss']):.3f} ({over[s]})" for s in ("constant", "linear")]
        assert float(cells[3]) == float(f"{float(ours['constant']['alpha']):.2g}")
        assert f"| {over['constant']} |" in report
    assert "ended at {} (from scratch), {} (all weights tuned) and {} (LoRA)".format(*first) in README.replace("\n", " ")


def test_others_with_nothing_set():
    lines = EVIDENCE.splitlines()
    for row in untuned.others():
        assert f"| {' | '.join(row)} |" in lines


@pytest.mark.parametrize("optimizer", untuned.COMPARED)
def test_nothing_set_against_what_it_builds_on(optimizer):
    lines = EVIDENCE.splitlines()
    for row in untuned.table(optimizer):
        assert f"| {' | '.join(row)} |" in lines


def test_which_optimizer():
    """The means and the worsts of c2min and p2min, the better of both schedules."""
    (c_mean, c_worst), (p_mean, p_worst) = (
        [float(row[-1]) for row in untuned.means(optimizer)] for optimizer in ("elra_c2min", "elra_p2min")
    )
    page = (ROOT / "docs/choose.md").read_text().replace("\n", " ")
    assert f"they end at {c_mean:.2f} and {p_mean:.2f} of the test loss of SGD with momentum" in page
    assert f"at worst at {c_worst:.2f} and {p_worst:.2f} " in page
    assert "On eight small tasks" in page
    assert len(untuned.EUCLIDEAN) == 8


def test_the_average_of_a_constant_schedule():
    of = untuned.quotients()
    language = [task for task in of if task.startswith(("gpt-", "python-", "shakespeare-"))]
    texts = [task for task in of if task.startswith(("bert-", "minilm"))]
    behind = [max(100 * of[task][column][0] - 100 for task in texts) for column in ("constant", "constant, average")]
    page = (ROOT / "docs/choose.md").read_text().replace("\n", " ")
    assert "up to {:.0f} % behind tuned AdamW, where the average is at most {:.0f} % behind".format(*behind) in page
    ahead = [100 - 100 * of[task]["constant"][0] / of[task]["linear"][0] for task in language if task.startswith("gpt-")]
    assert f"in short runs: {min(ahead):.0f} to {max(ahead):.0f} % better there" in page
    lags = [100 * of[task]["constant, average"][0] / of[task]["constant"][0] - 100 for task in language]
    page = (ROOT / "docs/find-a-rate.md").read_text().replace("\n", " ")
    assert f"it lags behind by {min(lags):.0f} to {max(lags):.0f} %" in page
    others = max(of[task]["constant, average"][0] for task in of if task not in language)
    assert "within 10 % or ahead" in page
    assert 1.05 < others < 1.1


def test_regret():
    measured = regret("quick")
    shown = [cells for cells in table_rows(EVIDENCE, "[a-z].+") if len(cells) == 3 and cells[0] in measured]
    assert len(shown) == 11
    for cells in shown:
        assert cells == measured[cells[0]][:3]


def test_the_rate_found():
    done = {key(row): row for row in read(RESULTS / "finder.csv")}
    said = finder.report(finder.CHOSEN, done, Path())
    assert (RESULTS / "finder.md").read_text().endswith(said)
    *tasks, average, worst = table_rows(said, "[a-z].+")[1:]
    shown = table_rows(section("The rate found, given to AdamW"), "[a-z*].+")[1:]
    assert shown[:-1] == [[*cells[:3], *cells[4:]] for cells in tasks]
    assert shown[-1][3:] == average[4:]
    assert len(tasks) == 10
    [name] = [cells[0] for cells in tasks if cells[4] == worst[4]]
    page = (ROOT / "docs/find-a-rate.md").read_text().replace("\n", " ")
    assert f"ends at {average[4]} of its loss" in page
    assert f"the worst is {worst[4]}, {name})" in page
    assert f"5e-5, it ends at {average[5]}." in page


def costs(path: str) -> dict[tuple[str, str, str], str]:
    """What a step costs over fused AdamW's, by weights, dtype and optimizer."""
    rows = map(json.loads, (RESULTS / path).read_text().splitlines())
    return {(row["net"], row["dtype"], row["optimizer"]): f"{float(format(row['ratio'][1], '.2g')):g}" for row in rows}


def test_what_a_step_costs():
    measured, plain = costs("speed-amd-epyc.jsonl"), costs("plain/speed-amd-epyc.jsonl")
    page = (ROOT / "docs/cost.md").read_text()
    shown = [cells for cells in table_rows(page, "AdamW, .+|Elra.+") if len(cells) == 6]
    names = {"AdamW, `foreach": "AdamW foreach", "ElraP2Min(betas=(0, 0))": "ElraP2Min, betas 0"}
    assert len(shown) == 5
    for name, *cells in shown:
        nets = [("MiniLM", "fp32"), ("20 M", "fp32"), ("tiny", "fp32"), ("MiniLM", "bf16"), ("20 M", "bf16")]
        assert cells == [measured[(*net, names.get(name, name))] for net in nets]
    on_gpu = costs("speed-nvidia-h200.jsonl")
    shown = [cells for cells in table_rows(page, "AdamW, .+|Elra.+") if len(cells) == 7]
    assert len(shown) == 5
    for name, *cells in shown:
        nets = [(net, "fp32") for net in ("GPT-2 small", "20 M", "1.1 G", "tiny")]
        nets += [("GPT-2 small", "bf16"), ("1.1 G", "bf16")]
        assert cells == [on_gpu[(*net, names.get(name, name))] for net in nets]
    first = {dtype: measured["MiniLM", dtype, "ElraAdamW"] for dtype in ("fp32", "bf16")}
    each = measured["MiniLM", "fp32", "AdamW foreach"]
    slow = {dtype: plain["20 M", dtype, "ElraAdamW"] for dtype in ("fp32", "bf16")}
    readme, page = README.replace("\n", " "), page.replace("\n", " ")
    kinds = (("fp32", "ElraAdamW"), ("bf16", "ElraAdamW"), ("fp32", "AdamW foreach"))
    gpu = [on_gpu[("GPT-2 small", *kind)] for kind in kinds]
    assert "it took {} times, in bfloat16 {} (GPT-2 small; `foreach` AdamW {},".format(*gpu) in readme
    assert f"takes {first['fp32']} times that of fused AdamW, in bfloat16 {first['bf16']} times (MiniLM's shapes;" in readme
    assert f"`foreach` AdamW {each}, [table]" in readme
    assert f"without a C compiler {slow['fp32']} and {slow['bf16']} times" in readme
    assert f"`ElraAdamW` takes {slow['fp32']} times fused AdamW's step" in page
    assert f"in bfloat16 {slow['bf16']} times" in page
