"""Ours with nothing set over what they build on at the best rate and schedule of its sweep, task by task, and a picture.

``python -m recipes.benchmarks.untuned`` draws results/untuned.png and renews the tables in README and docs/evidence.md, of
ElraAdamW over AdamW and of ElraC2Min and ElraP2Min over SGD with momentum, from language.csv, quick.csv, full.csv and
more-seeds.csv. The last has six more seeds of tasks that take seconds, where single seeds differ most. The sentences around
the tables are written by hand; tests/test_figures.py compares them with the rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, stdev

from matplotlib.figure import Figure

from recipes.sweep import Row, read

from .run import TUNING_SEED

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
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
MORE = {
    "python-2x64": "GPT of 2 layers, characters of Python",
    "shakespeare-2x64": "the same, of Shakespeare",
    "shakespeare-4x128": "GPT of 4 layers, characters of Shakespeare",
    "bert-questions": "tiny BERT from scratch, questions",
    "bert-movies": "tiny BERT from scratch, movie sentences",
    "minilm4-questions": "MiniLM, upper layers and head, questions",
    "minilm4-movies": "the same, movie sentences",
    "minilm-questions": "MiniLM, all layers and head, questions",
    "minilm-movies": "the same, movie sentences",
    "minilm-lora-questions": "MiniLM, LoRA and head, questions",
    "fashion-cnn": "CNN on Fashion-MNIST",
    "mnist-paper": "the paper's net on MNIST",
    "mnist-autoencoder": "autoencoder of MNIST",
}
# where SGD with momentum was swept
EUCLIDEAN = (
    "mnist-mlp", "mnist-cnn", "digits-mlp", "digits-cnn", "fashion-cnn", "mnist-autoencoder", "bert-questions", "python-2x64"
)  # fmt: skip
# ours, what it builds on, and the tasks
COMPARED = {
    "elra_adamw": ("adamw", TASKS | MORE),
    "elra_c2min": ("sgd-momentum", {task: (TASKS | MORE)[task] for task in EUCLIDEAN}),
    "elra_p2min": ("sgd-momentum", {task: (TASKS | MORE)[task] for task in EUCLIDEAN}),
}
# others that are used with nothing set, by (optimizer, schedule); they were run on `TASKS`
OTHERS = {
    ("elra_adamw", "linear"): "`elra_adamw`, linear",
    ("elra_adamw", "constant"): "`elra_adamw`, constant",
    ("schedule-free-warmup", "warmup-constant"): "schedule-free AdamW at 2.5e-3, 5 % warm-up",
    ("prodigy-safeguard", "linear"): "Prodigy with `safeguard_warmup`, linear",
    ("nadamw", "warmup-cosine"): "NadamW at AlgoPerf's point",
    ("prodigy-safeguard", "constant"): "Prodigy with `safeguard_warmup`, constant",
}
COLORS = ("tab:blue", "tab:orange", "tab:red", "tab:green")
FILES = ("quick", "full", "language", "more-seeds")

Rows = dict[tuple[str, ...], list[Row]]


def last(row: Row) -> float:
    """Test loss of the last iterate."""
    return float(row["test_loss"])


def average(row: Row) -> float:
    """Test loss of the average of the iterates."""
    return float(row["averaged_test_loss"])


def picked(row: Row) -> float:
    """Test loss of the last iterate, or of the average of the iterates if its validation loss is lower."""
    return average(row) if float(row["averaged_validation_loss"]) < float(row["validation_loss"]) else last(row)


# the columns of ours: schedule, and what is taken at the end
COLUMNS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "linear": ("linear", last),
    "constant": ("constant", last),
    "constant, average": ("constant", average),
    "constant, picked": ("constant", picked),
}


def reported(optimizers: Iterable[str]) -> Rows:
    """Rows of the reporting seeds, by task, optimizer, schedule and rate."""
    found: Rows = defaultdict(list)
    for name in FILES:
        for row in read(RESULTS / f"{name}.csv"):
            if row["optimizer"] in optimizers and row["seed"] != str(TUNING_SEED) and row["status"] == "ok":
                found[row["task"], row["optimizer"], row["schedule"], row["rate"]].append(row)
    return found


def best(rows: Rows, task: str, optimizer: str, schedule: str | None = None) -> float:
    """Lowest mean loss of an optimizer: of a swept one that of its best rate and schedule, which alone has reporting seeds."""
    return min(mean(map(last, of)) for key, of in rows.items() if key[:2] == (task, optimizer) and schedule in (None, key[2]))


def quotients(optimizer: str = "elra_adamw") -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds of test loss over that of the tuned rival, by task and column."""
    rival, tasks = COMPARED[optimizer]
    rows = reported({rival, optimizer})
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task in tasks:
        base = best(rows, task, rival)
        ours = {key[2]: of for key, of in rows.items() if key[:2] == (task, optimizer)}
        losses = {column: [*map(taken, ours[schedule])] for column, (schedule, taken) in COLUMNS.items()}
        found[task] = {column: (mean(of) / base, stdev(of) / base) for column, of in losses.items()}
    return found


def others() -> list[tuple[str, str, str]]:
    """The rows of a table: what is used with nothing set, geometric mean and worst of its losses over tuned AdamW's."""
    rows, table = reported({"adamw", *(name for name, _ in OTHERS)}), []
    for (name, schedule), shown in OTHERS.items():
        found = {task: best(rows, task, name, schedule) / best(rows, task, "adamw") for task in TASKS}
        worst = max(found, key=lambda task: found[task])
        table.append((shown, f"{geometric_mean(found.values()):.3f}", f"{found[worst]:.3f} ({TASKS[worst]})"))
    return table


def table(optimizer: str = "elra_adamw") -> list[tuple[str, ...]]:
    """The rows of a table: task, the columns, the better of linear and picked; the last two are means and worsts."""
    rows = [
        (COMPARED[optimizer][1][task], *(f"{m:.3f} ± {s:.3f}" for m, s in of.values()), f"{better(of):.3f}")
        for task, of in quotients(optimizer).items()
    ]
    return [*rows, *means(optimizer)]


def better(of: dict[str, tuple[float, float]]) -> float:
    """The lower mean of the linear schedule and the constant one, picked."""
    return min(of["linear"][0], of["constant, picked"][0])


def means(optimizer: str = "elra_adamw") -> list[tuple[str, ...]]:
    """Geometric mean and worst over the tasks, of each column."""
    found = quotients(optimizer).values()
    columns = [*([of[column][0] for of in found] for column in COLUMNS), [*map(better, found)]]
    return [
        ("**geometric mean**", *(f"{geometric_mean(column):.3f}" for column in columns)),
        ("**worst**", *(f"{max(column):.3f}" for column in columns)),
    ]


def draw(path: Path) -> None:
    """One line a task, one mark a column, with the standard deviation over seeds."""
    tasks = COMPARED["elra_adamw"][1]
    figure = Figure(figsize=(8, 1 + 0.34 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for y, of in enumerate(reversed(quotients().values())):
        for column, color, shift in zip(COLUMNS, COLORS, (0.27, 0.09, -0.09, -0.27), strict=True):
            middle, spread = of[column]
            label = column if y == 0 else None
            axes.errorbar(middle, y + shift, xerr=spread, fmt="o", color=color, markersize=4, capsize=2, label=label)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), list(reversed(tasks.values())), fontsize=8)
    axes.set_xlabel("test loss of elra_adamw, nothing set, over that of AdamW with the best rate of a sweep", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def put(page: Path, header: Sequence[str], *tables: Iterable[Sequence[str]]) -> None:
    """Renew the tables of ``page`` that begin with ``header``, of which there are as many as ``tables``."""
    head = line(header)
    text, *parts = page.read_text("utf-8").split(head)
    for part, rows in zip(parts, tables, strict=True):
        body = line(["---"] * len(header)) + "".join(map(line, rows))
        text += head + body + part[part.index("\n\n") + 1 :]
    page.write_text(text, "utf-8")


def line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    draw(RESULTS / "untuned.png")
    columns = (*COLUMNS, "better")
    put(ROOT / "README.md", (f"over {len(COMPARED['elra_adamw'][1])} tasks", *columns), means())
    put(ROOT / "docs/evidence.md", ("task", *columns), *map(table, COMPARED))
    put(ROOT / "docs/evidence.md", ("optimizer", "geometric mean", "worst"), others())
