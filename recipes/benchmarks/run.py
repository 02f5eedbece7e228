"""Run what is missing of the bench, and append one row to a CSV file as soon as a run has finished.

The same command continues after a stop of any kind. A run that crashes or diverges is a row, too; to repeat it, delete the row.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.optim.lr_scheduler import LambdaLR

import elra_hf
from recipes.sweep import Row, append, read

from .functions import FUNCTIONS
from .language import LANGUAGE
from .optimizers import OPTIMIZERS, SCHEDULES, Optimizer, half_decade, nearest
from .tasks import TASKS, Batch, Loss, Problem, find

TASKS |= LANGUAGE | FUNCTIONS
TUNING_SEED = 0  # reporting seeds are 1, 2, …
START_RATES = [10.0**k for k in range(-9, 1)]
START_RATE_SEED = 1
REACH = 8  # half decades that a sweep may leave its centre by
LOST = 20  # losses in a row that are not finite, after which a run is over
CURVE = 10  # validation losses that are kept of a run
ALPHAS = 30  # values of α that are kept of a run whose start rate is studied
RESULTS = Path(__file__).parent / "results"


def own_version() -> str:
    """Version of elra_hf and a fingerprint of its source, which changes more often."""
    files = sorted(Path(elra_hf.__file__).parent.rglob("*.py"))
    return f"{elra_hf.__version__}+{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]}"


OWN_VERSION = own_version()  # of what this process has imported


class Run(NamedTuple):
    """What identifies a run. ``rate`` is text, so that it is the same after it has been through the file."""

    task: str
    optimizer: str
    schedule: str
    rate: str
    seed: int
    steps: int


def key(row: Row) -> Run:
    """The run that a row is of."""
    return Run(row["task"], row["optimizer"], row["schedule"], row["rate"], int(row["seed"]), int(row["steps"]))


def text(value: float) -> str:
    """A number with as many digits as are kept of it."""
    return f"{value:.6g}"


def curve_steps(steps: int) -> list[int]:
    """After how many steps the validation loss is kept: at equal distances, the last at the end."""
    return sorted({math.ceil(steps * k / CURVE) for k in range(1, CURVE + 1)})


def alpha_steps(steps: int) -> list[int]:
    """After how many steps α is kept: at equal distances of the logarithm, since α finds its height within few steps."""
    return sorted({round(steps ** (k / (ALPHAS - 1))) for k in range(ALPHAS)})


# ---- one run ---------------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """A step of a trajectory: loss of the mini-batch, and α and cosine where the optimizer has them."""

    step: int
    loss: float
    alpha: float | None
    cos: float | None


def measure(run: Run, trajectories: Path | None = None) -> Row:
    """Train once and return the row. Never raises: a failure is told in the row's ``status`` and ``error``."""
    began = time.perf_counter()
    row = dict.fromkeys(COLUMNS, "")
    declared = OPTIMIZERS[run.optimizer]
    row |= {**{name: str(value) for name, value in run._asdict().items()}, "configuration": declared.configuration}
    row["versions"] = versions(declared)
    try:
        row |= train(run, declared, trajectories)
    except Exception as error:
        row |= {"status": "crashed", "error": one_line(error)}
    row["total_seconds"] = text(time.perf_counter() - began)
    return row


def one_line(error: BaseException) -> str:
    """An error as a cell of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def train(run: Run, declared: Optimizer, trajectories: Path | None) -> Row:
    """The measured part of a row."""
    task = find(run.task)
    problem = task.build(run.seed)
    params = [p for p in problem.model.parameters() if p.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()):  # some packages print when they are made
        optimizer = declared.make(params, float(run.rate))
    scheduler = LambdaLR(optimizer, lambda step: SCHEDULES[run.schedule](step, run.steps))
    group = optimizer.param_groups[0]
    start = average(problem.loss, problem.model.eval(), problem.splits["train"])
    # a function tells the steps to its goal instead; a schedule only multiplies α
    curve_at = curve_steps(run.steps)[:-1] if task.goal is None else []
    alphas_at = alpha_steps(run.steps) if (run.schedule, run.seed) == ("constant", START_RATE_SEED) and declared.ours else []
    curve: list[str] = []
    alphas: list[str] = []
    points: list[Point] = []
    lost, reached, seconds = 0, None, 0.0
    set_mode(problem, optimizer, training=True)
    for step in range(run.steps):
        batch = next(problem.batches)
        before = time.perf_counter()
        optimizer.zero_grad()
        loss = problem.loss(problem.model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        value = loss.item()
        seconds += time.perf_counter() - before
        if reached is None and task.goal is not None and value <= task.goal * start:
            reached = step
        if trajectories is not None:
            points.append(Point(step, value, *(float(group[k]) if k in group else None for k in ("alpha", "cos"))))
        if step + 1 in curve_at:
            curve.append(text(validate(problem, optimizer)))
        if step + 1 in alphas_at:
            alphas.append(f"{float(group['alpha']):.2g}")
        lost = 0 if math.isfinite(value) else lost + 1
        if lost == LOST:
            break
    set_mode(problem, optimizer, training=False)
    row = {"start_loss": text(start), "reached": "" if reached is None else str(reached), "seconds": text(seconds)}
    for name in ("train", "validation", "test"):
        loss, metric = evaluate(problem, name)
        row[f"{name}_loss"] = text(loss)
        if metric is not None:
            row[f"{name}_metric"] = text(metric)
    if declared.averaged:
        with elra_hf.averaged(optimizer):
            row |= {f"averaged_{name}_loss": text(evaluate(problem, name)[0]) for name in ("validation", "test")}
    if task.goal is None:
        cut_off = ["nan"] * (len(curve_at) - len(curve))
        row["curve"] = ";".join([*curve, *cut_off, row["validation_loss"]])
    row["alphas"] = ";".join(alphas)
    row["status"] = "ok" if all(math.isfinite(float(row[f"{name}_loss"])) for name in ("train", "validation")) else "diverged"
    row |= {name: text(float(group[name])) for name in ("alpha", "restarts", "clamps") if name in group}
    row["state_bytes"] = str(state_bytes(optimizer))
    if trajectories is not None:
        write_trajectory(trajectories, run, points)
    return row


def set_mode(problem: Problem, optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Training or evaluation; schedule-free optimizers hold other weights in each."""
    problem.model.train(training)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def evaluate(problem: Problem, split: str) -> tuple[float, float | None]:
    """Mean loss and metric over the rows of a split."""
    model = functools.cache(problem.model.eval())  # loss and metric share the forward pass of a batch
    batches = problem.splits[split]
    return average(problem.loss, model, batches), average(problem.metric, model, batches) if problem.metric else None


@torch.no_grad()
def average(of: Loss, model: Callable[..., Any], batches: Sequence[Batch]) -> float:
    """Mean of a loss or metric over the rows of all batches."""
    total = sum(length(batch) * of(model, batch).double().mean().item() for batch in batches)
    return total / sum(map(length, batches))


def validate(problem: Problem, optimizer: torch.optim.Optimizer) -> float:
    """Validation loss in the middle of a run, which goes on as if nothing had been measured."""
    weights = [p.detach().clone() for p in problem.model.parameters()]
    set_mode(problem, optimizer, training=False)
    loss = average(problem.loss, problem.model, problem.splits["validation"])
    set_mode(problem, optimizer, training=True)
    with torch.no_grad():  # schedule-free optimizers compute the weights of the other mode, and the way back rounds
        for p, weight in zip(problem.model.parameters(), weights, strict=True):
            p.copy_(weight)
    return loss


def length(batch: Batch) -> int:
    """Rows of a batch; a function without data has one."""
    return len(batch[0]) if batch else 1


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the optimizer's tensors, each counted once."""
    tensors = {id(v): v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def versions(declared: Optimizer) -> str:
    """What the result may depend on."""
    package = declared.package.split("==")[0]
    known = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}
    if declared.ours:
        known["elra_hf"] = OWN_VERSION
    elif package not in known:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[package] = importlib.metadata.version(package)
    return " ".join(f"{name}={version}" for name, version in known.items())


def write_trajectory(folder: Path, run: Run, points: Sequence[Point]) -> None:
    """A CSV file of its own for the steps of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ("_".join(map(str, run[:-1])) + ".csv")).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss", "alpha", "cos"])
        for p in points:
            writer.writerow([p.step, text(p.loss), *("" if v is None else text(v) for v in (p.alpha, p.cos))])


COLUMNS = [
    *Run._fields, "configuration", "status", "error", "start_loss", "train_loss", "validation_loss", "test_loss",
    "train_metric", "validation_metric", "test_metric", "averaged_validation_loss", "averaged_test_loss", "reached", "alpha",
    "restarts", "clamps", "seconds", "total_seconds", "state_bytes", "versions", "curve", "alphas",
]  # fmt: skip


# ---- which runs ------------------------------------------------------------------------------------------------------------

Done = dict[Run, Row]


def load(path: Path) -> Done:
    """The rows of a file; columns that it is too old to have are empty."""
    rows = (dict.fromkeys(COLUMNS, "") | row for row in read(path))
    return {key(row): row for row in rows}


def score(row: Row) -> tuple[float, float]:
    """What picks a configuration, lower is better: steps to the goal if the task has one, then validation loss."""
    return number(row["reached"]), number(row["validation_loss"])


def number(cell: str) -> float:
    """The value, infinite where there is none or it is not finite."""
    value = float(cell or "inf")
    return value if math.isfinite(value) else math.inf


def sweep(at: Callable[[float], Run], centre: float, done: Done) -> list[Run]:
    """The runs that a sweep lacks next: a decade around ``centre``, then beyond the better edge until the best is inside."""
    middle = nearest(centre)
    low, high = middle - 1, middle + 1
    while True:
        runs = [at(half_decade(index)) for index in range(low, high + 1)]
        lacking = [run for run in runs if run not in done]
        if lacking:
            return lacking
        if all(done[run]["status"] == "crashed" for run in runs):
            return []
        best = min(runs, key=lambda run: score(done[run]))  # the lowest rate if none is finite
        if best == runs[0] and low > middle - REACH:
            low -= 1
        elif best == runs[-1] and high < middle + REACH:
            high += 1
        else:
            return []


def best_of_sweep(done: Done, task: str, optimizer: str, steps: int) -> Run | None:
    """The run with the tuning seed that validation picks, or None where no run was finite."""
    wanted = (task, optimizer, TUNING_SEED, steps)
    runs = [run for run in done if (run.task, run.optimizer, run.seed, run.steps) == wanted]
    best = min(runs, key=lambda run: score(done[run]), default=None)
    return best if best is not None and math.isfinite(score(done[best])[1]) else None


def compare(task: str, optimizer: str, seeds: Sequence[int], steps: int, done: Done) -> tuple[list[Run], int]:
    """The runs that the comparison lacks next, and how many will follow at least."""
    declared = OPTIMIZERS[optimizer]
    if declared.rate is not None:
        runs = [Run(task, optimizer, s, f"{declared.rate:.3g}", seed, steps) for s in declared.schedules for seed in seeds]
        return [run for run in runs if run not in done], 0
    lacking: list[Run] = []
    for schedule in declared.schedules:

        def at(rate: float, schedule: str = schedule) -> Run:
            return Run(task, optimizer, schedule, f"{rate:.3g}", TUNING_SEED, steps)

        lacking += sweep(at, declared.usual(find(task)), done)
    if lacking:
        return lacking, len(seeds)
    best = best_of_sweep(done, task, optimizer, steps)
    runs = [best._replace(seed=seed) for seed in seeds] if best else []
    return [run for run in runs if run not in done], 0


def start_rates(task: str, optimizer: str, seeds: Sequence[int], steps: int, done: Done) -> tuple[list[Run], int]:
    """Every start rate from 1e-9 to 1, one seed."""
    schedules = OPTIMIZERS[optimizer].schedules
    runs = [Run(task, optimizer, s, f"{rate:.3g}", START_RATE_SEED, steps) for s in schedules for rate in START_RATES]
    return [run for run in runs if run not in done], 0


def at_rates(
    rates: Sequence[float], task: str, optimizer: str, seeds: Sequence[int], steps: int, done: Done
) -> tuple[list[Run], int]:
    """The given rates only, with the reporting seeds."""
    schedules = OPTIMIZERS[optimizer].schedules
    runs = [Run(task, optimizer, s, f"{rate:.3g}", seed, steps) for s in schedules for rate in rates for seed in seeds]
    return [run for run in runs if run not in done], 0


STUDIES = {"compare": compare, "start-rates": start_rates, "batch-sizes": compare, "noise": compare}
VARIATIONS = {
    "batch-sizes": ["batch=4", "batch=16", "batch=64", "batch=256"],
    "noise": ["labels=0.2", "labels=0.4", "gradient=1", "gradient=3"],
}  # of a study's tasks
VARIED = ["digits-mlp", "mnist-mlp", "mnist-cnn"]  # those tasks, when none are named


def varied(study: str, tasks: Sequence[str]) -> list[str]:
    """The names of the tasks in all variations of the study."""
    return [f"{task}@{variation}" for task in tasks for variation in VARIATIONS[study]]


# ---- many runs -------------------------------------------------------------------------------------------------------------


def mend(path: Path) -> None:
    """Drop a last line that a kill left unfinished."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
        if not path.stat().st_size:
            path.unlink()


def add_columns(path: Path) -> None:
    """Bring a file that is older than some columns to `COLUMNS`, with empty cells there.

    Raises:
        SystemExit: the file has other columns.
    """
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header == COLUMNS:
        return
    if not set(header) <= set(COLUMNS):
        sys.exit(
            f"--results {path} has columns that no bench writes, such as {min(set(header) - set(COLUMNS))}: name another file"
        )
    new = path.with_name(f"{path.name}.new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(load(path).values())
    new.replace(path)


def be_a_worker() -> None:
    """One thread; quiet; gone when the parent is, or an orphan would wait for work for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Worker:
    """A process that does one run at a time, and is replaced when it dies."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Make the process."""
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=be_a_worker)

    def submit(self, run: Run, trajectories: Path | None) -> Future[Row]:
        """Begin a run."""
        return self.pool.submit(measure, run, trajectories)

    def result(self, run: Run, future: Future[Row]) -> Row:
        """The row of a run that ended in some way."""
        try:
            return future.result()
        except Exception as error:  # the process died: out of memory, a signal
            self.pool.shutdown(wait=False)
            self.start()
            names = {name: str(value) for name, value in run._asdict().items()}
            return dict.fromkeys(COLUMNS, "") | names | {"status": "crashed", "error": one_line(error)}


def estimate(runs: Iterable[tuple[str, str]], done: Done, workers: int) -> str:
    """Time left for runs given as (task, optimizer), from runs of the same task; "at least" where a task has none yet."""
    seen: dict[tuple[str, ...], list[float]] = {}
    for run, row in done.items():
        for name in ((run.task, run.optimizer), (run.task,)):
            seen.setdefault(name, []).append(float(row["total_seconds"] or 0.0))
    seconds, unknown = 0.0, False
    for task, optimizer in runs:
        like = seen.get((task, optimizer)) or seen.get((task,))
        unknown |= like is None
        seconds += statistics.fmean(like) if like else 0.0
    minutes = math.ceil(seconds / workers / 60)
    return f"{'at least ' if unknown else 'about '}{minutes} min left"


def execute(
    path: Path, wanted: Callable[[Done], tuple[list[Run], list[tuple[str, str]]]], workers: int, trajectories: Path | None
) -> Done:
    """Run until nothing is wanted any more.

    Args:
        path: the CSV file.
        wanted: rows so far → (runs lacking now, (task, optimizer) of runs that will follow).
        workers: processes.
        trajectories: folder for the steps of each run; None: not kept.

    Returns:
        All rows of the file.
    """
    mend(path)
    add_columns(path)
    done = load(path)
    idle = [Worker() for _ in range(workers)]
    busy: dict[Future[Row], tuple[Worker, Run]] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None)
        finished = 0
        while True:
            now, later = wanted(done)
            queue = [run for run in now if run not in {run for _, run in busy.values()}]
            while idle and queue:
                worker, run = idle.pop(), queue.pop(0)
                busy[worker.submit(run, trajectories)] = worker, run
            left = [(run.task, run.optimizer) for run in now] + later
            names = ", ".join(f"{run.task} {run.optimizer}" for _, run in busy.values())
            time_left = estimate(left, done, workers)
            progress.update(bar, description=f"{names}: {time_left}", completed=finished, total=finished + len(left))
            if not busy:
                for worker in idle:  # now, since at the end of a process that another has begun they may not be told any more
                    worker.pool.shutdown()
                return done
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, run = busy.pop(future)
                row = worker.result(run, future)
                idle.append(worker)
                append(path, row)
                done[run] = row
                finished += 1
                if row["status"] != "ok" or not console.is_terminal:
                    told = row["error"] or f"validation loss {row['validation_loss']}, {time_left}"
                    progress.print(f"{row['status']}: {' '.join(map(str, run))}: {told}", soft_wrap=True, highlight=False)


def in_suite(suite: str) -> list[str]:
    """The tasks of the quick suite, or of the full one: those that it lacks."""
    return [name for name, task in TASKS.items() if task.quick == (suite == "quick")]


def default_optimizers(study: str, suite: str, task: str) -> list[str]:
    """Those that run on a task when none are named."""
    if study in VARIATIONS:
        return [name for name, declared in OPTIMIZERS.items() if declared.ours or name == "adamw"]
    sweeps = find(task).sweeps
    known = {name: declared for name, declared in OPTIMIZERS.items() if suite == "full" or declared.quick}
    return [name for name, declared in known.items() if sweeps or declared.rate is not None or name == "adamw"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.benchmarks run", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--suite",
        choices=("quick", "full"),
        default="quick",
        help="tasks and optimizers of compare and start-rates; full: the tasks that quick lacks, with all optimizers",
    )
    parser.add_argument("--study", choices=tuple(STUDIES), default="compare", help="what to find out")
    parser.add_argument("--tasks", nargs="+", help="instead of the suite's or the study's")
    parser.add_argument("--optimizers", nargs="+", help="instead of the suite's or the study's")
    parser.add_argument("--seeds", type=int, default=3, help="number of reporting seeds: 1, 2, …")
    parser.add_argument("--rates", nargs="+", type=float, help="these learning rates instead of a study")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--results", type=Path, help="CSV file; default: in results/, SUITE.csv, or STUDY.csv for batch-sizes and noise"
    )
    parser.add_argument("--trajectories", type=Path, help="folder for loss, α and cosine at every step; default: not kept")
    args = parser.parse_args(argv)
    for option, value in {"--seeds": args.seeds, "--steps": args.steps or 1, "--workers": args.workers}.items():
        if value < 1:
            parser.error(f"{option} {value} is invalid: give a number >= 1")
    tasks = args.tasks or (VARIED if args.study in VARIATIONS else in_suite(args.suite))
    if args.study in VARIATIONS:
        tasks = varied(args.study, tasks)
    for name in tasks:
        try:
            find(name)
        except ValueError as error:
            sys.exit(f"--tasks {name}: {error}")
    optimizers = {task: args.optimizers or default_optimizers(args.study, args.suite, task) for task in tasks}
    skipped = set()
    for name in dict.fromkeys(name for names in optimizers.values() for name in names):
        if name not in OPTIMIZERS:
            sys.exit(f"--optimizers {name}: no such name. Known: {', '.join(OPTIMIZERS)}")
        if told := OPTIMIZERS[name].missing():
            print(f"{name} is skipped: {told}", file=sys.stderr)
            skipped.add(name)
    path = args.results or RESULTS / f"{args.study if args.study in VARIATIONS else args.suite}.csv"
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + args.seeds)
    study = functools.partial(at_rates, args.rates) if args.rates else STUDIES[args.study]

    def wanted(done: Done) -> tuple[list[Run], list[tuple[str, str]]]:
        now, later = [], []
        for task in tasks:
            for optimizer in [name for name in optimizers[task] if name not in skipped]:
                lacking, more = study(task, optimizer, seeds, args.steps or find(task).steps, done)
                now += lacking
                later += [(task, optimizer)] * more
        return now, later

    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = execute(path, wanted, args.workers, args.trajectories)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command continues. Rows so far: {path}")
    failed = sum(row["status"] != "ok" for row in done.values())
    print(f"{len(done)} rows in {path}, {failed} of them crashed or diverged. Next: python -m recipes.benchmarks report {path}")
