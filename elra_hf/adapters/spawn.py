"""Processes that multiprocessing starts with "spawn" or "forkserver" learn what ``elra_hf.run`` taught their parent."""

from __future__ import annotations

import multiprocessing.spawn
import os
import runpy
import sys
from typing import Any

if __name__ == "elra_hf_child":
    # behind everything else, for a package that is not installed
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))

import elra_hf  # noqa: F401  registers the optimizers


class _Lesson:
    """Part of what a child unpickles before it imports the script."""

    def __init__(self, replaced: str, steps: int) -> None:
        self.replaced, self.steps = replaced, steps

    def __reduce__(self) -> tuple[Any, ...]:
        # by file name: the child does not have the parent's sys.path yet
        return runpy.run_path, (os.path.abspath(__file__), {"REPLACED": self.replaced, "STEPS": self.steps}, "elra_hf_child")


def reach_children(replaced: str, steps: int = 0) -> None:
    """Let the children, and theirs, import elra_hf before the script, replace what is replaced here, and find rates alike."""
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        # the child reads the keys that it knows
        return {**original(name), "elra_hf": _Lesson(replaced, steps)}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


if __name__ == "elra_hf_child":  # in the child
    from elra_hf.adapters import find as _find
    from elra_hf.adapters import replace as _replace
    from elra_hf.adapters import spawn as _spawn

    _replaced, _steps = globals()["REPLACED"], globals()["STEPS"]
    if _replaced:
        _replace.replace(_replaced)
    if _steps:
        _find.find(_steps)
    _spawn.reach_children(_replaced, _steps)
