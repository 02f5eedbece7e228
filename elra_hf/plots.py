"""Pictures of finished runs, from the ``log_history`` that the Trainer keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[Mapping[str, Any]]

SMOOTHING = 0.9  # of the running mean drawn over the losses and cosines of single steps


def plot_rates(runs: Mapping[str, Log], path: str | Path) -> Path:
    """Draw loss, applied rate (log axis) and cosine over the steps.

    Args:
        runs: the ``log_history`` of each run under its name; entries have ``step`` and some of ``loss``, ``eval_loss``,
            ``learning_rate``, ``elra_cos``, ``elra_restarts``.
        path: where to write the picture; its ending decides the format.

    Returns:
        ``path``.

    Raises:
        ValueError: no run has a logged loss.
    """
    from matplotlib.figure import Figure  # a Figure without pyplot: draws to files, touches no global state

    if not any(series(log, "loss") for log in runs.values()):
        raise ValueError(f"no loss is logged in {', '.join(runs) or 'no run'}: train with logging_steps=1")
    with_cosine = any(series(log, "elra_cos") for log in runs.values())
    figure = Figure(figsize=(7, 6.5 if with_cosine else 4.8), layout="constrained")
    panels: list[Axes] = list(figure.subplots(3 if with_cosine else 2, 1, sharex=True))
    for index, (name, log) in enumerate(runs.items()):
        color = f"C{index}"
        _draw(panels[0], series(log, "loss"), color, name)
        held_out = series(log, "eval_loss")
        panels[0].plot([s for s, _ in held_out], [v for _, v in held_out], "o--", color=color, markersize=4, label="held out")
        rates = [(s, v) for s, v in series(log, "learning_rate") if v > 0]  # a schedule may end at 0
        panels[1].plot([s for s, _ in rates], [v for _, v in rates], color=color, linewidth=1)
        if with_cosine:
            _draw(panels[2], series(log, "elra_cos"), color)
        for step in restarts(log):
            panels[1].axvline(step, color=color, linewidth=0.6, linestyle=":")
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)
    panels[1].set_yscale("log")
    panels[1].set_ylabel("applied rate")
    if with_cosine:
        panels[2].axhline(0, color="gray", linewidth=0.6)
        panels[2].set_ylabel("cosine")
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=100)
    return Path(path)


def series(log: Log, key: str) -> list[tuple[int, float]]:
    """The (step, value) pairs logged under ``key``."""
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def restarts(log: Log) -> list[int]:
    """The steps at which the count of restarts had risen."""
    counts = series(log, "elra_restarts")
    before = [0.0, *(count for _, count in counts)]
    return [step for (step, count), last in zip(counts, before, strict=False) if count > last]


def _draw(panel: Axes, points: Iterable[tuple[int, float]], color: str, label: str | None = None) -> None:
    """Draw values pale and their running mean over them."""
    points = [(step, value) for step, value in points if math.isfinite(value)]  # one nan would be in all means after it
    if not points:
        return
    steps = [step for step, _ in points]
    panel.plot(steps, [value for _, value in points], color=color, alpha=0.3, linewidth=0.7)
    mean, means = 0.0, []
    for count, (_, value) in enumerate(points, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        means.append(mean / (1 - SMOOTHING**count))
    panel.plot(steps, means, color=color, linewidth=1.4, label=label)
