"""Ours with nothing set over what they build on at the best rate and schedule of its sweep, task by task, and a picture.

``python -m recipes.benchmarks.untuned`` prints the tables, of ElraAdamW over AdamW and of ElraC2Min and ElraP2Min over SGD with
momentum, and draws results/untuned.png, from language.csv, quick.csv and full.csv there.
"""

from __future__ import annotations

import csv
from collections import defaultdict
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
SCHEDULES = ("linear", "constant")
SEEDS = ("1", "2", "3")


def quotients(optimizer: str = "elra_adamw") -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds of test loss over that of the tuned rival, by task and schedule."""
    rival, tasks = COMPARED[optimizer]
    losses: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for name, optimizers in (("quick", {rival}), ("full", {rival}), ("language", {rival, optimizer})):
        with (RESULTS / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["optimizer"] in optimizers and row["seed"] in SEEDS and row["status"] == "ok":
                    key = (row["task"], row["optimizer"], row["schedule"], row["rate"])
                    losses[key][row["seed"]] = float(row["test_loss"])
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task in tasks:
        runs = {key[1:]: list(seeds.values()) for key, seeds in losses.items() if key[0] == task and len(seeds) == len(SEEDS)}
        tuned = min(mean(values) for (name, *_), values in runs.items() if name == rival)
        ours = {schedule: values for (name, schedule, _), values in runs.items() if name == optimizer}
        found[task] = {s: (mean(ours[s]) / tuned, stdev(ours[s]) / tuned) for s in SCHEDULES}
    return found


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
