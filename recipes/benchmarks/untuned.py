"""Ours with nothing set over what they build on at the best rate and schedule of its sweep, task by task, and a picture.

``python -m recipes.benchmarks.untuned`` prints the tables, of ElraAdamW over AdamW and of ElraC2Min and ElraP2Min over SGD with
momentum, and draws results/untuned.png, from language.csv, quick.csv and full.csv there.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean, mean, stdev

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "gpt-scratch": "GPT from scratch, 3.7 M parameters",
    "gpt-tune": "the same net, all weights, on another text",
    "gpt-lora-r8": "the same net, LoRA alone",
    "minilm-probe": "MiniLM, a new head on frozen layers",
    "mnist-mlp": "MLP on MNIST",
    "mnist-cnn": "CNN on MNIST",
    "digits-mlp": "MLP on digits",
    "digits-cnn": "CNN on digits",
}
# where SGD with momentum was swept
EUCLIDEAN = {
    **{task: name for task, name in TASKS.items() if task.startswith(("mnist", "digits"))},
    "mnist-autoencoder": "autoencoder of MNIST",
    "bert-questions": "tiny BERT on questions, from scratch",
    "python-2x64": "GPT of 2 layers, characters",
}
# ours, what it builds on, and the tasks
COMPARED = {
    "elra_adamw": ("adamw", TASKS),
    "elra_c2min": ("sgd-momentum", EUCLIDEAN),
    "elra_p2min": ("sgd-momentum", EUCLIDEAN),
}
# others that are used with nothing set, by (optimizer, schedule)
OTHERS = {
    ("elra_adamw", "linear"): "`elra_adamw`, linear",
    ("elra_adamw", "constant"): "`elra_adamw`, constant",
    ("schedule-free-warmup", "warmup-constant"): "schedule-free AdamW at 2.5e-3, 5 % warm-up",
    ("prodigy-safeguard", "linear"): "Prodigy with `safeguard_warmup`, linear",
    ("nadamw", "warmup-cosine"): "NadamW at AlgoPerf's point",
    ("prodigy-safeguard", "constant"): "Prodigy with `safeguard_warmup`, constant",
}
SCHEDULES = ("linear", "constant")
SEEDS = ("1", "2", "3")


def losses(optimizers: Iterable[str]) -> dict[tuple[str, ...], list[float]]:
    """Test losses of the reporting seeds, by task, optimizer, schedule and rate; ours are those of version 0.2."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for name in ("quick", "full", "language"):
        with (RESULTS / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                old = name != "language" and row["optimizer"].startswith("elra_")
                if row["optimizer"] in optimizers and row["seed"] in SEEDS and row["status"] == "ok" and not old:
                    key = (row["task"], row["optimizer"], row["schedule"], row["rate"])
                    found[key][row["seed"]] = float(row["test_loss"])
    return {key: list(seeds.values()) for key, seeds in found.items()}


def tuned(rows: dict[tuple[str, ...], list[float]], task: str, rival: str) -> float:
    """Mean loss of the rival at the best rate and schedule of its sweep, which alone has all reporting seeds."""
    return min(mean(v) for key, v in rows.items() if key[:2] == (task, rival) and len(v) == len(SEEDS))


def quotients(optimizer: str = "elra_adamw") -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds of test loss over that of the tuned rival, by task and schedule."""
    rival, tasks = COMPARED[optimizer]
    rows = losses({rival, optimizer})
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task in tasks:
        base = tuned(rows, task, rival)
        ours = {key[2]: v for key, v in rows.items() if key[:2] == (task, optimizer)}
        found[task] = {s: (mean(ours[s]) / base, stdev(ours[s]) / base) for s in SCHEDULES}
    return found


def others() -> list[tuple[str, str, str]]:
    """The rows of a table: what is used with nothing set, geometric mean and worst of its losses over tuned AdamW's."""
    rows, table = losses({"adamw", *(name for name, _ in OTHERS)}), []
    for (name, schedule), shown in OTHERS.items():
        found = {
            task: min(mean(v) for key, v in rows.items() if key[:3] == (task, name, schedule)) / tuned(rows, task, "adamw")
            for task in TASKS
        }
        worst = max(found, key=lambda task: found[task])
        table.append((shown, f"{geometric_mean(found.values()):.3f}", f"{found[worst]:.3f} ({TASKS[worst]})"))
    return table


def table(optimizer: str = "elra_adamw") -> list[tuple[str, str, str, str]]:
    """The rows of a table: task, linear, constant, the better of the two; the last two are means and worsts."""
    found = quotients(optimizer)
    rows = [
        (
            COMPARED[optimizer][1][task],
            *(f"{of[s][0]:.3f} ± {of[s][1]:.3f}" for s in SCHEDULES),
            f"{min(m for m, _ in of.values()):.3f}",
        )
        for task, of in found.items()
    ]
    columns = [[of[s][0] for of in found.values()] for s in SCHEDULES]
    columns.append([min(pair) for pair in zip(*columns, strict=True)])
    rows.append(("**geometric mean**", *(f"{geometric_mean(column):.3f}" for column in columns)))
    rows.append(("**worst**", *(f"{max(column):.3f}" for column in columns)))
    return rows


def draw(path: Path) -> None:
    """One line a task, one mark a schedule, with the standard deviation over seeds."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for y, of in enumerate(reversed(quotients().values())):
        for schedule, color, shift in zip(SCHEDULES, ("tab:blue", "tab:orange"), (0.12, -0.12), strict=True):
            middle, spread = of[schedule]
            label = schedule if y == 0 else None
            axes.errorbar(middle, y + shift, xerr=spread, fmt="o", color=color, markersize=5, capsize=2, label=label)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(TASKS)), list(reversed(TASKS.values())), fontsize=8)
    axes.set_xlabel("test loss of elra_adamw, nothing set, over that of AdamW with the best rate of a sweep", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(RESULTS / "untuned.png")
    for optimizer, (rival, _) in COMPARED.items():
        print(f"\n{optimizer} over tuned {rival}\n")
        for row in (("task", "linear", "constant", "better"), ("---",) * 4, *table(optimizer)):
            print("|", " | ".join(row), "|")
    print("\nothers, with nothing set\n")
    for line in (("optimizer", "geometric mean", "worst"), ("---",) * 3, *others()):
        print("|", " | ".join(line), "|")
