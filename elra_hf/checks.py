"""Checks of what users give."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number, or a tensor of one. A text is not: YAML reads 1e-5 as one."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def check_number(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is not a finite number >= 0, nor a tensor of one.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}={value!r} is invalid: Tensor {name} must be 1-element, give one number")
    if is_number(value) and 0.0 <= float(value) < math.inf:
        return float(value)
    raise ValueError(f"{name}={value!r} is invalid: give a finite number >= 0")
