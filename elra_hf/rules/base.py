"""What `Elra` asks of a rate rule, and what rules share.

A rule is a pure function of tensors with one entry a cell of the scope, and knows nothing of parameters. The inner products
are named by two letters: g the gradient G_t, m the momentum, s the way back to the average of the iterates, x̄_t - x_t; for the
paper's rules also p the gradient G_{t-1} and d the direction moved along in step t-1. They are taken in the metric of the
direction; see `directions`. One that takes them in passing hands over those of the step before. Beside them a rule gets
``weight``, how much a step says about the schedule's full rate, ``fading``, which counts a decay for less, and ``reached``,
the highest share so far, all in [0, 1]; ``steps``, those taken so far; and of the weights at the start ``scale``, the typical
size of one, and ``size``, the sum of their squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import is_number

Dots = Mapping[str, Tensor]
Memory = Mapping[str, Tensor]


class Decision(NamedTuple):
    """What a rule makes of a step: the next rate, the cosine that it saw, and its memory, each shaped like the rate."""

    alpha: Tensor
    cos: Tensor
    memory: Memory


class Rule(Protocol):
    """What `Elra` asks of a rate rule. See CONTRIBUTING.md for how to add one."""

    @property
    def needs(self) -> frozenset[str]:
        """The names of the inner products it takes."""
        ...

    @property
    def memory(self) -> Mapping[str, float]:
        """The numbers that it keeps from step to step for each cell, with the values that a run starts from."""
        ...

    def __call__(self, alpha: Tensor, dots: Dots, memory: Memory) -> Decision:
        """Return the next rate, the cosine it was taken from and the next memory.

        Where the products carry no information (a zero denominator: first step, or a step of length zero) the rate must come
        back unchanged and the cosine as 0.
        """
        ...


def cosine(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """⟨a, b⟩ / (‖a‖ ‖b‖), elementwise, in [-1, 1]; 0 where either norm is 0."""
    norms = square_a.sqrt() * square_b.sqrt()
    return torch.where(norms > 0, product / norms, torch.zeros_like(norms)).clamp(-1.0, 1.0)


def check_gain(gain: float | tuple[float, float], below: float) -> None:
    """Raise ValueError unless every member of ``gain`` is in (0, ``below``)."""
    members = gain if isinstance(gain, tuple) else (gain,)
    if len(members) not in (1, 2) or not all(is_number(g) and 0.0 < float(g) < below for g in members):
        raise ValueError(
            f"gain={gain!r} is invalid: give a number in (0, {below:g}), or a pair (down, up) of them, e.g. gain=(0.5, 0.6)"
        )


def signed_gain(gain: float | tuple[float, float], signal: Tensor) -> Tensor | float:
    """``gain`` itself, or of a pair (down, up) the member that the sign of ``signal`` selects."""
    if not isinstance(gain, tuple):
        return gain
    down, up = gain
    return torch.where(signal < 0, torch.full_like(signal, down), torch.full_like(signal, up))


def check_positive(**named: float) -> None:
    """Raise ValueError unless every number is positive; infinity is."""
    for name, value in named.items():
        if not (is_number(value) and value > 0.0):
            raise ValueError(f"{name}={value!r} is invalid: give a positive number")


def settling(clock: Tensor, horizon: float) -> Tensor | float:
    """Share of the gain that is left: horizon / (horizon + clock), 1 where the horizon is infinite."""
    return 1.0 if math.isinf(horizon) else horizon / (horizon + clock)


def first_rate(alpha: Tensor, dots: Dots, first: float) -> Tensor:
    """``alpha``, or in the first step the rate with which that is ``first`` of the weights long."""
    known = (dots["steps"] == 0) & (dots["gg"] > 0) & (dots["size"] > 0)
    return torch.where(known, first * (dots["size"] / dots["gg"]).sqrt(), alpha)


def heading(dots: Dots) -> tuple[Tensor, Tensor]:
    """(signal, c_t): c_t is the cosine of G_t with the way back to the average, the signal what follows for the rate.

    The signal is c_t, unless the loss clearly falls along the momentum that x moves with: then steps are too short, whatever
    lies behind. Otherwise a rate that has fallen after an overshoot would hold x where it is, c_t would stay negative, and the
    rate would fall for ever. With u the cosine of G_t with the momentum, where that is positive, and c_t negative, it is
    (1 - u - u²) c_t: as much, with the other sign, where x goes straight; in noise u is near 0.
    """
    cos = cosine(dots["gs"], dots["gg"], dots["ss"])
    on = cosine(dots["gm"], dots["gg"], dots["mm"]).clamp(min=0.0)
    return torch.where(cos < 0, cos * (1.0 - on - on * on), cos), cos
