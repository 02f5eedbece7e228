"""What the study of start rates found: losses, α and plateaus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .cells import markdown, ratio
from .optimizers import OPTIMIZERS
from .run import START_RATE_SEED, START_RATES, Done, alpha_steps, number

PLATEAU = 1.05  # a loss up to this many times the best one counts as equally good


def start_rate_curves(done: Done) -> dict[str, dict[str, list[float]]]:
    """Task → optimizer with schedule → test loss from each of `START_RATES`, where all were run."""
    rates = [f"{rate:.3g}" for rate in START_RATES]
    curves: dict[str, dict[str, list[float]]] = {}
    for task in dict.fromkeys(run.task for run in done):
        for name, declared in OPTIMIZERS.items():
            for schedule in declared.schedules:
                runs = {
                    run.rate: row
                    for run, row in done.items()
                    if (run.task, run.optimizer, run.schedule, run.seed) == (task, name, schedule, START_RATE_SEED)
                }
                if all(rate in runs for rate in rates):
                    curve = [number(runs[rate]["test_loss"]) for rate in rates]
                    curves.setdefault(task, {})[f"{name}, {schedule}"] = curve
    return curves


def alpha_curves(done: Done) -> dict[str, dict[str, dict[str, list[tuple[int, float]]]]]:
    """Task → optimizer → start rate → (step, α), where α was kept from several of `START_RATES`."""
    rates = {f"{rate:.3g}" for rate in START_RATES}
    found: dict[str, dict[str, dict[str, list[tuple[int, float]]]]] = {}
    for run, row in sorted(done.items(), key=lambda item: float(item[0].rate)):
        if row["alphas"] and run.rate in rates:
            points = zip(alpha_steps(run.steps), map(float, row["alphas"].split(";")), strict=False)
            found.setdefault(run.task, {}).setdefault(run.optimizer, {})[run.rate] = list(points)
    several = {task: {name: of for name, of in by_name.items() if len(of) > 1} for task, by_name in found.items()}
    return {task: by_name for task, by_name in several.items() if by_name}


def plateau(curve: Sequence[float]) -> tuple[float, float]:
    """The first and the last start rate of the stretch around the best whose losses are within `PLATEAU` of it."""
    best = min(range(len(curve)), key=lambda i: curve[i])
    low = high = best
    while low > 0 and curve[low - 1] <= PLATEAU * curve[best]:
        low -= 1
    while high < len(curve) - 1 and curve[high + 1] <= PLATEAU * curve[best]:
        high += 1
    return START_RATES[low], START_RATES[high]


def plateau_table(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Decades of start rates that end equally well, and the largest loss over the smallest."""
    names = dict.fromkeys(name for of_task in curves.values() for name in of_task)
    rows = []
    for name in names:
        cells = []
        for of_task in curves.values():
            if name not in of_task:
                cells.append("")
                continue
            curve = of_task[name]
            low, high = plateau(curve)
            cells.append(f"{round(math.log10(high / low))} ({low:.0e} … {high:.0e}); {ratio(max(curve) / min(curve))}")
        rows.append([name, *cells])
    return markdown(["optimizer", *curves], rows)
