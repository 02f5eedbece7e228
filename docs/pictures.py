"""The pictures of these pages, from real runs: ``python -m docs.pictures`` writes docs/img/*.png, in about two minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR

from elra_hf import ElraAdamW, rate
from elra_hf.plots import SMOOTHING
from recipes.benchmarks.optimizers import SCHEDULES
from recipes.benchmarks.tasks import Batch, Problem, find

IMAGES = Path(__file__).parent / "img"
SICK, WELL = "tab:red", "tab:gray"


# ---- symptoms: docs/curves.md ----------------------------------------------------------------------------------------------


@dataclass
class Log:
    """What a run showed, step by step, and the test loss that it ended with."""

    loss: list[float]
    rate: list[float]
    cos: list[float]
    restarts: list[float]
    test: float


def train(
    task: str,
    *,
    steps: int = 0,
    schedule: str = "linear",
    spoil: Callable[[Problem], Iterator[Batch]] | None = None,
    seed: int = 1,
) -> Log:
    """Train a net of the benchmarks with ElraAdamW; ``spoil`` takes the place of its batches."""
    declared = find(task)
    problem = declared.build(seed)
    steps = steps or declared.steps
    optimizer = ElraAdamW(problem.model.parameters())
    scheduler = LambdaLR(optimizer, lambda step: SCHEDULES[schedule](step, steps))
    group = optimizer.param_groups[0]
    log = Log([], [], [], [], 0.0)
    batches = spoil(problem) if spoil else problem.batches
    for _ in range(steps):
        loss = problem.loss(problem.model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        log.loss.append(loss.item())
        log.rate.append(rate(optimizer))
        log.cos.append(float(group["cos"]))
        log.restarts.append(float(group["restarts"]))
    with torch.no_grad():
        losses = [float(problem.loss(problem.model.eval(), batch)) for batch in problem.splits["test"]]
    log.test = sum(losses) / len(losses)
    return log


def broken_from_400(problem: Problem) -> Iterator[Batch]:
    """From step 400 on every batch has a NaN, as where a second file of data lacks a column."""
    for step, (x, y) in enumerate(problem.batches):
        yield x + (torch.nan if step >= 400 else 0.0), y


def smooth(values: list[float]) -> np.ndarray:
    """A running mean; what is not a number is left out of it, and leaves a gap."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(mean / weight if np.isfinite(value) else np.nan)
    return np.array(means)


def compare(name: str, sick: tuple[str, Log], well: tuple[str, Log], third: str = "cosine", first: int = 0) -> None:
    """Draw two runs, or their ``first`` steps: loss, applied rate, and cosine or restarts."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 3))
    for (label, log), color in ((well, WELL), (sick, SICK)):
        steps = np.arange(1, len(log.loss) + 1)
        panels[0].plot(steps, log.loss, color=color, alpha=0.3, linewidth=0.6)
        panels[0].plot(steps, smooth(log.loss), color=color, linewidth=1.4, label=label)
        panels[1].plot(steps, [value or np.nan for value in log.rate], color=color, linewidth=1.4)
        panels[2].plot(steps, smooth(log.cos) if third == "cosine" else log.restarts, color=color, linewidth=1.4)
        print(
            f"{name:10} {label:28} test loss {log.test:.3f}, highest rate {max(log.rate):.1e}, restarts {log.restarts[-1]:.0f}"
        )
    for panel, title in zip(panels, ("loss of a batch", "applied rate", third), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_xlim(0, first or None)
    panels[0].set_yscale("log")
    panels[1].set_yscale("log")
    if third == "cosine":
        panels[2].axhline(0.0, color="black", linewidth=0.5)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(IMAGES / f"{name}.png", dpi=80)


def symptoms() -> None:
    """Each with a healthy run beside it."""
    well = train("mnist-mlp")
    compare("healthy", ("constant schedule", train("mnist-mlp", schedule="constant")), ("linear schedule", well))
    compare("stuck", ("gradient lost in noise", train("mnist-mlp@gradient=100")), ("as it should be", well))
    long = train("digits-cnn")
    compare("rising", ("25 steps", train("digits-cnn", steps=25, schedule="constant")), ("600 steps", long), first=120)
    jumping, calm = (train("digits-cnn", steps=2000, schedule=schedule, seed=2) for schedule in ("constant", "linear"))
    compare("jumps", ("constant schedule", jumping), ("linear schedule", calm))  # seeds 1 and 3 do not jump
    compare("nan", ("broken from step 400", train("mnist-mlp", spoil=broken_from_400)), ("as it should be", well), "restarts")


# ---- the question in pictures: docs/how.md ---------------------------------------------------------------------------------

SLOPES = np.array([1.0, 12.0])  # a valley: ½ (x² + 12 y²)
NOISE = 0.6


def walk(rate: float, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient descent with a fixed rate: all places, and the gradient at the last one."""
    rng = np.random.default_rng(seed)
    places = [np.array([-4.0, 0.9])]
    for _ in range(steps):
        gradient = SLOPES * places[-1] + NOISE * rng.normal(size=2)
        places.append(places[-1] - rate * gradient)
    return np.array(places), SLOPES * places[-1] + NOISE * rng.normal(size=2)


def average_of(places: np.ndarray) -> np.ndarray:
    """The k-th weighs k."""
    return np.average(places, axis=0, weights=np.arange(1, len(places) + 1))


def question(panel: Axes, title: str, rate: float, steps: int, wanted: float) -> None:
    """Draw the walk, of some seeds the one whose cosine comes nearest to ``wanted``."""

    def cosine(seed: int) -> float:
        places, gradient = walk(rate, steps, seed)
        back = average_of(places) - places[-1]
        return float(gradient @ back / np.linalg.norm(gradient) / np.linalg.norm(back))

    seed = min(range(200), key=lambda seed: abs(cosine(seed) - wanted))
    places, gradient = walk(rate, steps, seed)
    here, average = places[-1], average_of(places)
    x, y = np.meshgrid(np.linspace(-4.8, 2.2, 200), np.linspace(-2.0, 2.0, 200))
    panel.contour(
        x, y, 0.5 * (SLOPES[0] * x**2 + SLOPES[1] * y**2), levels=[0.3, 1.5, 4, 8, 14, 22], colors="0.8", linewidths=0.8
    )
    panel.plot(*places.T, "o-", color="tab:blue", markersize=2.5, linewidth=0.8)
    panel.plot(*zip(average, here, strict=True), "--", color="black", linewidth=1.2)
    panel.plot(*average, "o", color="white", markeredgecolor="black", markersize=8)
    panel.plot(*here, "o", color="tab:blue", markersize=7)
    downhill = -1.3 * gradient / np.linalg.norm(gradient)
    panel.annotate("", here + downhill, here, arrowprops={"arrowstyle": "-|>", "color": "tab:red", "linewidth": 2})
    panel.text(average[0] - 0.15, average[1] + 0.28, "x̄", ha="right", fontsize=11)
    panel.text(here[0] + 0.15, here[1] - 0.42, "x", fontsize=11)
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_title(f"{title}: cosine {cosine(seed):+.2f}", fontsize=10)


def questions() -> None:
    """Too short, right, too long."""
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    short, right, long = figure.subplots(1, 3)
    question(short, "too short", 0.02, 25, 0.95)
    question(right, "right", 0.09, 40, 0.0)
    question(long, "too long", 0.166, 13, -0.95)
    figure.savefig(IMAGES / "question.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions()
    symptoms()
