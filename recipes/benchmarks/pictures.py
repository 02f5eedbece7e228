"""The pictures of a report."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from .run import START_RATES

CAP = 10.0  # where the axis of quotients ends


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours: a quarter of the size, since pictures are committed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def plot_regret(found: Mapping[str, Mapping[str, float]], middles: Mapping[str, float], path: Path) -> None:
    """One line an optimizer: a dot a task, a bar at the geometric mean; what is beyond the axis sits at its end."""
    names = sorted(found, key=lambda name: -middles[name])
    tasks = list(dict.fromkeys(task for name in names for task in found[name]))
    figure = Figure(figsize=(8, 1.2 + max(0.32 * len(names), 0.2 * len(tasks))), layout="constrained")
    axes = figure.subplots()
    for color, task in enumerate(tasks):
        points = [(min(found[name][task], CAP), line) for line, name in enumerate(names) if task in found[name]]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], "o", color=matplotlib.colormaps["tab20"](color % 20), label=task
        )
    axes.plot(
        [min(middles[name], CAP) for name in names],
        range(len(names)),
        "k|",
        markersize=14,
        markeredgewidth=2,
        label="geometric mean",
    )
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"test loss over that of AdamW tuned for the task (beyond {CAP:g}: at the edge)")
    axes.set_yticks(range(len(names)), names)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def plot_start_rates(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel a task, test loss against the start rate; a run that failed leaves a gap."""
    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    colors = {
        name: f"C{index}" for index, name in enumerate(dict.fromkeys(n.split(",")[0] for c in curves.values() for n in c))
    }
    for axes, (task, of_task) in zip(panels, curves.items(), strict=True):
        for name, curve in of_task.items():
            optimizer, schedule = name.split(", ")
            values = [loss if math.isfinite(loss) else math.nan for loss in curve]
            style = "-o" if schedule == "linear" else ":o"
            axes.plot(START_RATES, values, style, color=colors[optimizer], markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(task, fontsize="medium")
        axes.set_ylabel("test loss")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("start rate")
    save(figure, path)


def plot_alphas(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]], path: Path) -> None:
    """A row a task, a column an optimizer: α against the step, a line a start rate, all axes logarithmic."""
    names = list(dict.fromkeys(name for of_task in curves.values() for name in of_task))
    figure = Figure(figsize=(3 * len(names), 2 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), len(names), squeeze=False, sharey="row")
    shades = {f"{rate:.3g}": matplotlib.colormaps["viridis"](i / len(START_RATES)) for i, rate in enumerate(START_RATES)}
    for line, (task, of_task) in zip(panels, curves.items(), strict=True):
        for axes, name in zip(line, names, strict=True):
            for rate, points in of_task.get(name, {}).items():
                steps, alphas = zip(*points, strict=True)
                axes.plot(steps, alphas, color=shades[rate], linewidth=1, label=rate)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{name}, {task}", fontsize="small")
        line[0].set_ylabel("α")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    lines = {text: handle for axes in panels.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    rates = sorted(lines, key=float)
    figure.legend([lines[rate] for rate in rates], rates, loc="outside right center", frameon=False, title="start rate")
    save(figure, path)
