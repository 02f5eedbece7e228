"""The paper's experiments and its open questions, with real runs of a few steps."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elra_hf import SuccessiveGradients
from recipes.benchmarks import __main__, paper, studies
from recipes.benchmarks.run import Run, key
from recipes.benchmarks.tasks import TASKS
from recipes.sweep import read

quick = settings(max_examples=12, deadline=None)
angles = st.floats(10.0, 80.0)


# ---- paths -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", paper.CLAIMED)
@quick
@given(name=st.sampled_from(list(paper.PATHS)), angle=angles)
def test_the_papers_methods_follow_a_rotation(optimizer, name, angle):
    path, turned = (paper.walk(name, optimizer, 1e-5, each, 30) for each in (0.0, angle))
    assert paper.deviation(path, turned) < 1e-9


@pytest.mark.parametrize("optimizer", list(paper.PATH_RATES))
@quick
@given(name=st.sampled_from(list(paper.PATHS)), angle=angles)
def test_its_rivals_do_not(optimizer, name, angle):
    path, turned = (paper.walk(name, optimizer, paper.PATH_RATES[optimizer], each, 30) for each in (0.0, angle))
    assert paper.deviation(path, turned) > 1e-2


def test_deviation_is_relative_to_the_way_that_the_path_goes():
    path = torch.tensor([[1.0, 1.0], [1.0, 5.0], [1.0, 3.0]])
    assert paper.deviation(path, path) == 0
    assert paper.deviation(path, path + torch.tensor([0.0, 1.0])) == pytest.approx(0.25)


def test_a_part_that_runs_alone_does_not_take_the_others_out_of_the_report(tmp_path):
    runs = {name: Run(name, "adam", "constant", "0.1", 1, 1) for name in ("one", "two", "three")}
    parts = {
        name: (
            lambda done, run=run: [run] if run not in done else [],
            lambda run: {"status": "ok"},
            lambda done, picture, name=name: f"## {name}\n",
        )
        for name, run in runs.items()
    }
    path = tmp_path / "rows.csv"
    for part, told in (("two", ["## two"]), ("one", ["## one", "## two"])):
        paper.command("paper", "Parts", parts, paper.row_of, ["--parts", part, "--results", str(path)], "")
        assert [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("## ")] == told


def test_a_second_start_repeats_nothing_and_mends_what_a_kill_left(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "PATHS", {"bowl": paper.PATHS["bowl"]})
    path = tmp_path / "paper.csv"
    options = ["--parts", "paths", "--results", str(path)]
    measured = []
    monkeypatch.setattr(paper, "attempt", lambda *a, attempt=paper.attempt: measured.append(a[0]) or attempt(*a))
    paper.main(options)
    whole, figures = path.read_bytes(), [row["deviation"] for row in read(path)]
    assert len(measured) == len(read(path)) == 5
    text = path.with_suffix(".md").read_text()
    assert "| elra_c2min | 1e-05 |" in text
    assert (tmp_path / "paper-paths.png").stat().st_size > 1000
    path.write_bytes(whole[:-9])  # a kill in mid-write
    paper.main(options)
    paper.main(options)
    assert measured[-1] == measured[-2]
    assert len(measured) == len(read(path)) + 1
    assert [row["deviation"] for row in read(path)] == figures
    assert "diverged" not in [row["status"] for row in read(path)]


def test_a_crash_is_a_row_stops_no_other_run_and_is_told(tmp_path, monkeypatch):
    def breaks(run):
        if run.optimizer == "adam":
            raise RuntimeError("no\nluck")
        return {"status": "ok"}

    wanted, _, report = paper.PARTS["paths"]
    monkeypatch.setitem(paper.PARTS, "paths", (wanted, breaks, report))
    path = tmp_path / "paper.csv"
    with pytest.raises(SystemExit, match=r"4 runs crashed; .*path tilted saddle adam constant .*: RuntimeError: no luck"):
        paper.main(["--parts", "paths", "--results", str(path)])
    rows = read(path)
    assert len(rows) == 5 * len(paper.PATHS)
    assert list(rows[0]) == paper.COLUMNS
    assert {row["optimizer"] for row in rows if row["status"] == "crashed"} == {"adam"}


# ---- saddles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(paper.SADDLES))
def test_a_saddle_is_as_deep_as_stated(name):
    task, depth = paper.SADDLES[name]
    model = task.build(1).model
    with torch.no_grad():
        model.x.zero_()
    assert model().item() == pytest.approx(depth, rel=1e-3)
    with torch.no_grad():
        model.x.copy_(task.build(1).model.x)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert -1e-9 < model().item() < 0.05 * depth  # the tilted one has a second valley, a little higher


def test_ours_leave_a_saddle_and_a_tiny_rate_does_not():
    assert paper.steps_to_leave("saddle-tilted", "elra_p2min", 1e-5, 1, 200) < 60
    assert paper.steps_to_leave("saddle-tilted", "adam", 1e-6, 1, 20) == math.inf


def test_tuning_and_reporting_use_other_starts():
    tuning, reporting = paper.STARTS.values()
    assert not set(tuning) & set(reporting)
    assert len(set(reporting)) == 100


def test_report_of_saddles(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "STARTS", {0: range(1001, 1003), 1: range(1, 5)})
    monkeypatch.setattr(paper, "SADDLE_STEPS", 60)
    path = tmp_path / "paper.csv"
    paper.main(["--parts", "saddles", "--results", str(path)])
    rows = {key(row): row for row in read(path)}
    left = rows[paper.at("saddle-tilted", "elra_c2min", 1e-5, 1, 60)]["left"].split()
    assert len(left) == 4
    text = path.with_suffix(".md").read_text()
    assert f"| saddle-tilted: elra_c2min | {sorted(map(int, left))[1]} |" in text
    assert "| saddle-tilted: adam, default 0.001 | >60 | >60 – >60 | 100% |" in text
    assert "| saddle-tilted: adam, tuned" in text
    for rival in paper.DEFAULTS:
        tuning = {float(run.rate): float(row["reached"]) for run, row in rows.items() if run[:2] == ("saddle-tilted", rival)
                  and run.seed == 0}  # fmt: skip
        best = min(tuning, key=tuning.get)
        assert min(tuning) < best < max(tuning)
        assert paper.at("saddle-tilted", rival, best, 1, 60) in rows


def test_quantiles():
    assert [paper.quantile([4.0, math.inf, 1.0, 2.0, 3.0], share) for share in (0.1, 0.5, 0.9)] == [1.0, 3.0, math.inf]


# ---- MNIST -----------------------------------------------------------------------------------------------------------------


def curves(train: list[float], test: list[float]) -> dict[str, list[float]]:
    return {"train_loss": train, "test_loss": test}


def test_the_verdict_follows_from_the_rows():
    found = {
        "elra_c2min": curves([1.0, 0.5], [1.0, 0.6]),
        "elra_p2min": curves([1.0, 0.4], [1.0, 0.5]),
        "adam": curves([2.0, 1.0], [2.0, 1.0]),
        "adadelta": curves([2.0, 1.0], [0.9, 1.0]),  # once below in test loss
    }
    told = paper.verdict(found, ["adam"])
    assert "each of epochs 1–2? **Yes: at 2 of 2 epochs.**" in told
    assert "| elra_c2min against adam | 2 | 2 | 2 | 0.5 / 1 | 0.6 / 1 |" in told
    told = paper.verdict(found, ["adam", "adadelta"])
    assert "**No: at 1 of 2 epochs.**" in told
    assert "| elra_p2min against adadelta | 2 | 1 | 1 | 0.4 / 1 | 0.5 / 1 |" in told


@given(st.lists(st.tuples(*[st.floats(0.01, 10)] * 4), min_size=1, max_size=5))
def test_below_means_below_in_both(epochs):
    a, b, c, d = map(list, zip(*epochs, strict=True))
    assert paper.below(curves(a, b), curves(c, d)) == [p < r and q < s for p, q, r, s in epochs]
    assert not any(paper.below(curves(a, b), curves(a, d)))


def test_means_are_over_seeds_and_a_diverged_seed_counts():
    row = dict.fromkeys(paper.CURVES, "1 2")
    found = paper.means({"a": [row, row | {"train_loss": "3 nan"}]})
    assert found["a"]["train_loss"] == [2.0, math.inf]
    assert found["a"]["test_loss"] == [1.0, 2.0]


def test_mnist_from_rows_to_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "EPOCHS", 2)
    monkeypatch.setattr(paper, "SEEDS", (1, 2))
    path = tmp_path / "paper.csv"
    paper.main(["--parts", "mnist", "--results", str(path)])
    rows = read(path)
    assert {row["status"] for row in rows} == {"ok"}
    assert all(len(row[curve].split()) == 2 for row in rows for curve in paper.CURVES)
    text = path.with_suffix(".md").read_text()

    def mean(optimizer: str, rate: str, curve: str, epoch: int) -> float:
        of = [row for row in rows if (row["optimizer"], row["rate"]) == (optimizer, rate) and row["seed"] != "0"]
        return sum(float(row[curve].split()[epoch]) for row in of) / len(of)

    holds = [
        all(mean(m, "1e-05", c, epoch) < mean(r, f"{rate:.3g}", c, epoch) for m in paper.CLAIMED
            for r, rate in paper.DEFAULTS.items() for c in ("train_loss", "test_loss"))
        for epoch in range(2)
    ]  # fmt: skip
    told = next(line for line in text.splitlines() if line.startswith("Against adam, default 0.001 and adadelta, default 1: "))
    assert told.endswith(f"epochs 1–2? **{'Yes' if all(holds) else 'No'}: at {sum(holds)} of 2 epochs.**")
    assert (tmp_path / "paper-mnist.png").stat().st_size > 1000


def test_an_epoch_is_all_full_batches():
    built = TASKS[paper.MNIST].build(1)
    seen = {tuple(row) for _ in range(paper.EPOCH) for row in next(built.batches)[0].tolist()}
    assert len(seen) == 64 * paper.EPOCH > 0.7 * 5000 - 64


# ---- growth and betas ------------------------------------------------------------------------------------------------------


def dots(gg: float, gp: float, pp: float) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([x])
        for name, x in {"gg": gg, "gp": gp, "pp": pp, "reached": 1.0, "weight": 1.0, "fading": 1.0}.items()
    }


MEMORY = {"clock": torch.tensor([0.0])}


def test_growth_functions_by_hand():
    alpha = torch.tensor([2.0])
    for rule, factor in (
        (studies.Exponential(0.5), math.exp(0.25)),
        (studies.Norms(0.5), 1 + 0.5 * 0.5 * 1 / 2),
    ):
        adapted, cos, _ = rule(alpha, dots(1.0, 1.0, 4.0), {})
        assert cos.item() == 0.5
        assert adapted.item() == pytest.approx(2 * factor)
    assert studies.Norms(0.5)(alpha, dots(4.0, -1.0, 1.0), {})[0].item() == pytest.approx(1.5)  # never by more than c2min


@given(st.floats(-1, 1))
def test_growth_functions_agree_where_they_should(cos):
    alpha, products = torch.tensor([1.0]), dots(1.0, cos, 1.0)
    assert torch.allclose(studies.Norms(0.5)(alpha, products, {}).alpha, studies.PAPER(alpha, products, MEMORY).alpha)
    there, back = (studies.Exponential(0.5)(alpha, dots(1.0, c, 1.0), {}).alpha for c in (cos, -cos))
    assert (there * back).item() == pytest.approx(1.0)  # no drift


@pytest.mark.parametrize("rule", [studies.Exponential(), studies.Norms()])
def test_growth_functions_are_left_alone_without_information(rule):
    assert rule(torch.tensor([0.1]), dots(1.0, 0.0, 0.0), {}).alpha.item() == pytest.approx(0.1)


@pytest.mark.parametrize("make", [lambda: studies.Exponential(0.0), lambda: studies.Norms(1.0)])
def test_a_gain_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="gain"):
        make()


@pytest.mark.parametrize(("adapt", "moved"), [(("β1",), [True, False]), (("β1", "β2"), [True, True])])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_betas_grow_with_the_cosine(adapt, moved, sign):
    x = torch.ones(3, requires_grad=True)
    optimizer = studies.AdaptedBetas([x], adapt=adapt, lr=1e-3)
    for step in range(60):
        x.grad = torch.ones(3) * sign**step
        optimizer.step()
    for now, start, moves in zip(optimizer.param_groups[0]["betas"], SuccessiveGradients().betas, moved, strict=True):
        assert now == start if not moves else (now - start) * sign > 0.05
        assert 0 <= now <= studies.MOST


@pytest.mark.parametrize("name", list(studies.GROWTH | studies.BETAS))
def test_every_variant_learns(name):
    row = studies.row_of(paper.at("digits-mlp", name, studies.RATE, 1, 60), studies.measure_variant)
    assert row["status"] == "ok", row["error"]
    assert float(row["train_loss"]) < 2.2
    assert list(row) == studies.COLUMNS


# ---- success rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solved", "problems", "interval"),
    [(5, 10, (0.2366, 0.7634)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (95, 100, (0.8882, 0.9785))],
)
def test_wilson_against_known_values(solved, problems, interval):
    assert studies.wilson(solved, problems) == pytest.approx(interval, abs=1e-4)


@given(st.integers(1, 1000), st.data())
def test_wilson_holds_the_share_and_shrinks(problems, data):
    solved = data.draw(st.integers(0, problems))
    low, high = studies.wilson(solved, problems)
    assert 0 <= low <= solved / problems + 1e-12
    assert solved / problems - 1e-12 <= high <= 1
    assert studies.wilson(problems - solved, problems) == pytest.approx((1 - high, 1 - low))
    more = studies.wilson(4 * solved, 4 * problems)
    assert more[1] - more[0] < high - low


@pytest.mark.parametrize("family", list(studies.FAMILIES))
def test_the_lowest_loss_is_the_lowest_and_the_seed_fixes_the_problem(family):
    build, _ = studies.FAMILIES[family]
    for seed in range(3):
        made, again, other = (build(studies.Draw(s)) for s in (seed, seed, seed + 1000))
        assert all(map(torch.equal, made.x, again.x))
        assert made.loss(made.x) == again.loss(made.x)
        assert [x.shape for x in made.x] != [x.shape for x in other.x] or not torch.equal(made.x[0], other.x[0])
        x = [each.clone().requires_grad_() for each in made.x]
        optimizer = torch.optim.LBFGS(x, max_iter=300, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, made=made, x=x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = made.loss(x)
            loss.backward()
            return loss

        first = closure().item()
        optimizer.step(closure)
        last = made.loss(x).item()
        assert last > made.lowest - 1e-9 * abs(first)
        if family.startswith("convex") or "wells" in family:
            assert last - made.lowest < 1e-6 * (first - made.lowest)


def test_questions_from_rows_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "LEARNING", ("digits-mlp",))
    monkeypatch.setattr(studies, "SEEDS", (1, 2))
    monkeypatch.setitem(TASKS, "digits-mlp", dataclasses.replace(TASKS["digits-mlp"], steps=20))
    monkeypatch.setattr(studies, "FAMILIES", {name: (build, 6) for name, (build, _) in studies.FAMILIES.items()})
    monkeypatch.setattr(studies, "BLOCK", 3)
    monkeypatch.setattr(studies, "STEPS", 60)
    path = tmp_path / "questions.csv"
    studies.main(["--results", str(path)])
    before = path.read_bytes()
    studies.main(["--results", str(path)])
    assert path.read_bytes() == before
    rows = read(path)
    assert {row["status"] for row in rows} == {"ok"}
    assert len({key(row) for row in rows}) == len(rows)
    text = path.with_suffix(".md").read_text()
    growth, betas, success = text.split("\n## ")[1:]
    assert all(f"\n| {name} |" in growth for name in studies.GROWTH)
    assert all(f"\n| {name} |" in betas for name in studies.BETAS)
    blocks = [row for row in rows if row["task"].startswith("convex") and row["optimizer"] == "elra_p2min"]
    solved = sum(int(row["solved"]) for row in blocks)
    low, high = studies.wilson(solved, 12)
    assert f"| elra_p2min | {solved / 12:.1%} ({low:.1%} – {high:.1%}) |" in success
    assert "12 convex and 18 non-convex" in success
    assert success.count("| adam, tuned |") == 2


# ---- the commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "questions"])
def test_commands_explain_themselves(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 0
    assert f"usage: python -m recipes.benchmarks {name}" in capsys.readouterr().out


def test_an_unknown_command_lists_the_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "papers"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert all(f"  {name} " in told for name in __main__.COMMANDS)


def test_committed_reports_are_those_of_the_committed_rows():
    for name in ("paper", "questions"):
        path = Path(paper.__file__).parent / "results" / f"{name}.csv"
        if path.exists():
            assert f"{len(read(path))} rows" in path.with_suffix(".md").read_text()
