"""A GPT of 105 M parameters: from scratch, all weights tuned on other text, LoRA alone; ours against AdamW with a swept rate.

One process, a row as soon as a run has finished, the most important runs first; it stops in time, and the same command goes on.
Seed 0 sweeps AdamW's rate, seeds 1 and 2 report. On CUDA with bf16 autocast and fp32 weights. Text and kept nets lie in
$XDG_CACHE_HOME/elra_hf, under the version of Python: carry that folder to a machine without internet, and rename its files.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import elra_hf
from recipes.sweep import Row, append, read

from .cells import markdown, mean, ratio, spread
from .language import Size, fixed, kept, lora, next_token, parts, stream, tokens
from .optimizers import OPTIMIZERS, SCHEDULES, Optimizer, half_decade, nearest
from .run import RESULTS, TUNING_SEED, Done, Run, key, mend, number, one_line, score, sweep, text, versions
from .speed import card, slug
from .tasks import Batch

ADAMW = "adamw"
CONTESTANTS: dict[str, Optimizer] = {
    ADAMW: Optimizer("torch.optim:AdamW", options={"fused": True}, schedules=("warmup-linear",)),
    "elra_adamw": OPTIMIZERS["elra_adamw"],
    **{name: OPTIMIZERS[name] for name in ("nadamw", "schedule-free-warmup", "elra_p2min", "elra_c2min")},
}
REST = list(CONTESTANTS)[2:]  # run last
SEEDS = (1, 2)  # that report
WIDTH = 2  # half decades to each side of the centre that every sweep has
COLUMNS = [*Run._fields, "configuration", "status", "error", "reached", "validation_loss", "test_loss", "averaged_test_loss",
           "alpha", "seconds", "peak_bytes", "parameters", "card", "versions"]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One of the three trainings.

    Attributes:
        text: "python" or "shakespeare".
        steps: of the optimizer.
        rows: sequences of a batch.
        usual: the centre of AdamW's sweep.
        tuned: starts from the net that was trained on Python.
        rank: of LoRA adapters, which alone are trained then; None: all weights.
    """

    text: str
    steps: int
    rows: int
    usual: float
    tuned: bool = True
    rank: int | None = None


@dataclass(frozen=True)
class Scale:
    """A net and its trainings."""

    size: Size
    stages: dict[str, Stage] = field(default_factory=dict)


SCALES = {
    "large": Scale(
        Size(vocabulary=16_384, layers=13, width=768, rows=32, length=512, kept_steps=400),
        {
            "scratch": Stage("python", 400, 32, 3e-4, tuned=False),
            "tune": Stage("shakespeare", 200, 8, 3e-4),
            "lora": Stage("shakespeare", 200, 8, 3e-3, rank=8),
        },
    ),
    "small": Scale(
        Size(vocabulary=2048, layers=4, width=128, rows=8, length=64, kept_steps=400),
        {
            "scratch": Stage("python", 200, 8, 1e-3, tuned=False),
            "tune": Stage("shakespeare", 100, 8, 1e-3),
            "lora": Stage("shakespeare", 100, 8, 1e-2, rank=8),
        },
    ),
}


# ---- one run ---------------------------------------------------------------------------------------------------------------


def fit(
    net: nn.Module, optimizer: torch.optim.Optimizer, schedule: str, batches: Iterator[Batch], steps: int, device: torch.device
) -> None:
    """Train; on CUDA in bf16 autocast, without waiting for the GPU."""
    scheduler = LambdaLR(optimizer, lambda step: SCHEDULES[schedule](step, steps))
    mode(net, optimizer, training=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, next(batches), device).backward()
        optimizer.step()
        scheduler.step()


def loss(net: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Mean cross-entropy of the next token."""
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    with half:
        return next_token(net, (batch[0].to(device, non_blocking=True),))


def mode(net: nn.Module, optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Training or evaluation, of the schedule-free optimizer, too."""
    net.train(training)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def start(scale: Scale, stage: Stage, seed: int, device: torch.device) -> nn.Module:
    """The net before the first step. What is tuned has been trained once, on this kind of device, by AdamW."""
    size = scale.size
    if not stage.tuned:
        return size.net(seed).to(device)

    def make() -> dict[str, Tensor]:
        net = size.net(1_000_000).to(device)
        batches = stream(parts(tokens("python", size.vocabulary))["train"], size.rows, size.length, 1_000_000)
        optimizer = CONTESTANTS[ADAMW].make(net.parameters(), 5e-4)
        fit(net, optimizer, "warmup-linear", batches, size.kept_steps, device)
        return {name: tensor.cpu() for name, tensor in net.state_dict().items()}

    net = size.net(0)
    net.load_state_dict(kept(f"scale-{size.layers}x{size.width}-{size.vocabulary}-{size.kept_steps}-{device.type}", make))
    torch.manual_seed(seed)
    return (lora(net, stage.rank) if stage.rank else net).to(device)


def measure(scale: Scale, run: Run, device: torch.device) -> Row:
    """Train once; a failure is a row, too."""
    declared = CONTESTANTS[run.optimizer]
    row = dict.fromkeys(COLUMNS, "") | {name: str(value) for name, value in run._asdict().items()}
    row |= {"configuration": declared.configuration, "card": card(device), "versions": versions(declared)}
    try:
        row |= train(scale, run, declared, device)
    except Exception as error:
        row |= {"status": "crashed", "error": one_line(error)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def train(scale: Scale, run: Run, declared: Optimizer, device: torch.device) -> Row:
    """The measured part of a row."""
    stage, size = scale.stages[run.task.rpartition("-")[2]], scale.size
    cut = parts(tokens(stage.text, size.vocabulary))
    net = start(scale, stage, run.seed, device)
    optimizer = declared.make([p for p in net.parameters() if p.requires_grad], float(run.rate))
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    fit(net, optimizer, run.schedule, stream(cut["train"], stage.rows, size.length, run.seed), run.steps, device)
    if gpu:
        torch.cuda.synchronize(device)
    row = {"seconds": text(time.perf_counter() - began)}
    if gpu:
        row["peak_bytes"] = str(torch.cuda.max_memory_allocated(device))
    mode(net, optimizer, training=False)

    def evaluated(name: str) -> str:
        with torch.no_grad():
            return text(mean([loss(net, batch, device).item() for batch in fixed(cut[name], stage.rows, size.length)]))

    row |= {f"{name}_loss": evaluated(name) for name in ("validation", "test")}
    if declared.averaged:
        with elra_hf.averaged(optimizer):
            row["averaged_test_loss"] = evaluated("test")
    group = optimizer.param_groups[0]
    row |= {"alpha": text(float(group["alpha"]))} if "alpha" in group else {}
    row["parameters"] = str(sum(p.numel() for p in net.parameters() if p.requires_grad))
    row["status"] = "ok" if number(row["validation_loss"]) < float("inf") else "diverged"
    return row


# ---- which runs ------------------------------------------------------------------------------------------------------------


def adamw_runs(task: str, stage: Stage, done: Done) -> list[Run]:
    """What AdamW's sweep lacks next: five rates, then beyond the better edge until the best is inside."""

    def at(rate: float) -> Run:
        return Run(task, ADAMW, CONTESTANTS[ADAMW].schedules[0], f"{rate:.3g}", TUNING_SEED, stage.steps)

    middle = nearest(stage.usual)
    first = [at(half_decade(middle + away)) for away in sorted(range(-WIDTH, WIDTH + 1), key=abs)]
    best = min((run for run in first if run in done), key=lambda run: score(done[run]), default=None)
    lacking = [run for run in first if run not in done]
    return lacking or (sweep(at, float(best.rate), done) if best else [])


def best_adamw(task: str, done: Done) -> Run | None:
    """The run with the tuning seed that validation picks, if one was finite."""
    runs = [run for run in done if (run.task, run.optimizer, run.seed) == (task, ADAMW, TUNING_SEED)]
    best = min(runs, key=lambda run: score(done[run]), default=None)
    return best if best is not None and number(done[best]["validation_loss"]) < float("inf") else None


def untuned(task: str, name: str, stage: Stage, seed: int) -> list[Run]:
    """Of an optimizer with nothing set."""
    declared = CONTESTANTS[name]
    if declared.missing():
        return []
    return [Run(task, name, schedule, f"{declared.rate:.3g}", seed, stage.steps) for schedule in declared.schedules]


def wanted(scale: Scale, label: str, done: Done) -> Run | None:
    """The most important run that is lacking: sweeps and ours, then the best AdamW, seed after seed, then the others."""
    named = {f"{label}-{name}": stage for name, stage in scale.stages.items()}
    for task, stage in named.items():
        for run in (*adamw_runs(task, stage, done), *untuned(task, "elra_adamw", stage, SEEDS[0])):
            if run not in done:
                return run
    for seed in SEEDS:
        for task, stage in named.items():
            best = best_adamw(task, done)
            for run in (*([best._replace(seed=seed)] if best else []), *untuned(task, "elra_adamw", stage, seed)):
                if run not in done:
                    return run
    rest = (run for name in REST for task, stage in named.items() for run in untuned(task, name, stage, SEEDS[0]))
    return next((run for run in rest if run not in done), None)


def execute(scale: Scale, label: str, path: Path, device: torch.device, seconds: float, told: Callable[[str], None]) -> bool:
    """Run what is lacking; whether nothing is left. No run begins that would, by the longest like it, end after ``seconds``."""
    began = time.perf_counter()
    mend(path)
    done = {key(row): row for row in read(path)}
    longest: dict[str, float] = {}
    while (run := wanted(scale, label, done)) is not None:
        before = time.perf_counter()
        if before - began + longest.get(run.task, 0.0) > seconds:
            return False
        row = measure(scale, run, device)
        append(path, row)
        done[run] = row
        longest[run.task] = max(longest.get(run.task, 0.0), time.perf_counter() - before)
        loss_or_error = row["error"] or f"validation {row['validation_loss']}, test {row['test_loss']}"
        told(f"{' '.join(map(str, run))}: {loss_or_error}, {time.perf_counter() - began:.0f} s since the start")
    return True


# ---- report ----------------------------------------------------------------------------------------------------------------


def report(scale: Scale, label: str, done: Done) -> str:
    """The sweeps, and everyone over the best AdamW of the same seeds."""
    first = next(iter(done.values()))
    sections = [
        f"# A GPT on {first['card']}: {label}\n",
        f"{scale.size.layers} layers × {scale.size.width}, vocabulary {scale.size.vocabulary:,}, sequences of "
        f"{scale.size.length}. Written by `python -m recipes.benchmarks scale --size {label}`. AdamW (fused, 5 % warm-up, then "
        "linear): the rate that validation picks with seed 0. The others: nothing set. Loss: mean of 8 fixed batches of the "
        "test; over AdamW: mean of the quotients of equal seeds, or over the best of the sweep where AdamW has no such seed; "
        "its average: the same of the average of the iterates. Versions: "
        + "; ".join(dict.fromkeys(row["versions"] for row in done.values()))
        + ".\n",
    ]
    for name, stage in scale.stages.items():
        task = f"{label}-{name}"
        runs = {run: row for run, row in done.items() if run.task == task}
        if not runs:
            continue
        trained = next((row["parameters"] for row in runs.values() if row["parameters"]), "0")
        sections.append(
            f"## {name}\n\n{stage.steps} steps of {stage.rows} × {scale.size.length} tokens of {stage.text}, "
            f"{int(trained) / 1e6:.3g} M trained parameters.\n"
        )
        swept = sorted((run for run in runs if (run.optimizer, run.seed) == (ADAMW, TUNING_SEED)), key=lambda r: float(r.rate))
        inside = "" if adamw_runs(task, stage, done) else ", the best is inside"
        sections.append(
            f"AdamW's sweep{inside}:\n\n"
            + markdown(
                ["rate", *(run.rate for run in swept)],
                [["validation loss", *(ratio(number(runs[run]["validation_loss"])) for run in swept)]],
            )
        )
        sections.append(versus(runs, best_adamw(task, done)))
    return "\n".join(sections)


def versus(runs: Done, best: Run | None) -> str:
    """A line an optimizer and schedule, from the reporting seeds."""
    reported: dict[tuple[str, str, str], dict[int, Row]] = {}
    for run, row in runs.items():
        if run.seed != TUNING_SEED and (run.optimizer != ADAMW or (best and run.rate == best.rate)):
            reported.setdefault((run.optimizer, run.schedule, run.rate), {})[run.seed] = row
    base = next((rows for (name, *_), rows in reported.items() if name == ADAMW), {})
    sweep = number(runs[best]["test_loss"]) if best else math.nan

    def over(rows: dict[int, Row], column: str) -> str:
        known = {seed: number(row[column]) for seed, row in rows.items() if row[column]}
        quotients = [loss / number(base[seed]["test_loss"]) for seed, loss in known.items() if seed in base]
        quotients = quotients or [loss / sweep for loss in known.values()]
        return ratio(mean(quotients)) if quotients else ""

    lines = []
    for (name, schedule, rate), rows in reported.items():
        losses = [number(row["test_loss"]) for row in rows.values()]
        alphas = [row["alpha"] for row in rows.values() if row["alpha"]]
        lines.append(
            [f"{name}, {schedule}", str(len(rows)), spread(losses), over(rows, "test_loss"), over(rows, "averaged_test_loss"),
             rate if name == ADAMW else ", ".join(f"{float(alpha):.2g}" for alpha in alphas),
             f"{mean([number(row['seconds']) for row in rows.values()]):.3g}"]
        )  # fmt: skip
    header = ["optimizer", "seeds", "test loss", "over AdamW", "its average", "rate (found)", "seconds of training"]
    return markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.benchmarks scale", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SCALES), default="large", help="small: the same code on a CPU in 15 minutes")
    parser.add_argument("--minutes", type=float, help="after which no run begins; default: 9, small 14")
    parser.add_argument("--steps", type=int, help="of each training, instead of its own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--results", type=Path, help="CSV file; default: results/scale-CARD.csv, or scale-small-CARD.csv")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} is invalid: give a number >= 1")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.size == "large" and device.type == "cpu":
        sys.exit("a GPT of 105 M parameters needs a GPU; --size small runs the same code on a CPU")
    scale = SCALES[args.size]
    if args.steps:
        scale = replace(scale, stages={name: replace(stage, steps=args.steps) for name, stage in scale.stages.items()})
    kind = "scale" if args.size == "large" else f"scale-{args.size}"
    path = args.results or RESULTS / f"{kind}-{slug(card(device))}.csv"
    minutes = args.minutes if args.minutes is not None else 9.0 if args.size == "large" else 14.0
    complete = execute(scale, args.size, path, device, 60.0 * minutes, lambda line: print(line, flush=True))
    done = {key(row): row for row in read(path)}
    if done:
        path.with_suffix(".md").write_text(report(scale, args.size, done))
    left = "complete" if complete else f"stopped after {minutes:g} minutes, the same command goes on"
    print(f"{len(done)} rows in {path}, the report in {path.with_suffix('.md')}: {left}")
