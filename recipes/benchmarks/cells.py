"""Means, and numbers as cells of Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, infinite if a value is."""
    return math.inf if math.inf in values else statistics.fmean(values)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean, infinite if a value is."""
    values = list(values)
    return math.inf if math.inf in values else statistics.geometric_mean(values)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation, as text."""
    if math.inf in values:
        return f"{values.count(math.inf)} of {len(values)} failed"
    deviation = f" ± {statistics.stdev(values):.{digits}g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}g}{deviation}"


def ratio(value: float) -> str:
    """A quotient of losses, as text."""
    return "failed" if value == math.inf else f"{value:.3f}" if value < 100 else f"{value:.2g}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
