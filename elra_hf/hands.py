"""What other hands do to the parameters between two steps, such as to clamp or to normalise them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .directions.base import share
from .pieces import PLAIN_TENSORS, dot

# What is known of a parameter: it is followed; or it was written to some time ago, between the last two steps, since the last.
FOLLOWED, WATCHED, BEFORE, SINCE = MARKS = ("", "w", "b", "s")
AFTER_STEP = {SINCE: BEFORE, BEFORE: WATCHED}

States = Mapping[Tensor, dict[str, Any]]


class Hands:
    """Follows the parameters that others move between steps, so that the way back to their average stays what it is.

    The way x̄ - x is what is stored of the average. Where a constraint takes part of the steps back, after each or every now and
    then, that part would pile up in it, and the rate would rise without end. That a parameter was written to shows in torch's
    count of it, which what is done through ``.data`` escapes; how far it was moved shows in a copy from step to step, 4 bytes
    more a float32 parameter. Somebody may also put in other weights now and then, to look at them, and put these back. So a
    parameter is followed once it was written to between two pairs of steps on end, or its norm shows that it is no longer where
    it was; a norm is kept of what was written to before.

    Args:
        marks: parameters that are known to have been written to, each with one of `MARKS`.
    """

    def __init__(self, marks: Mapping[Tensor, str] | None = None) -> None:
        self.marks = dict(marks or {})
        self.away = False  # other weights are in the parameters
        self._versions: list[int] = []
        self._norms: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, Tensor] = {}

    def look(self, params: list[Tensor], states: States, power: int) -> None:
        """Before a step: who has been moved since the last? Waits for the device where a norm has to be compared."""
        versions = counts(params)
        if self.away or versions == self._versions:
            return
        for p, old, new in zip(params, self._versions, versions, strict=False):
            mark = self.marks.get(p, WATCHED)
            if old != new and mark != FOLLOWED and type(p) in PLAIN_TENSORS:
                self.marks[p] = FOLLOWED if mark == BEFORE or self._is_elsewhere(p) else SINCE
        self.tell(states, power)

    def _is_elsewhere(self, p: Tensor) -> bool:
        known = self._norms.get(p)
        return known is not None and known.device == p.device and not torch.equal(known, norm(p))

    def tell(self, states: States, power: int) -> None:
        """Let the ways know how far the parameters that are followed have been moved since they were last told.

        ``power`` is that of the direction.
        """
        if self.away:
            return
        for p, copy in self._copies.items():
            state = states.get(p, {})
            if "way" in state and (copy.shape, copy.dtype, copy.device) == (p.shape, p.dtype, p.device):
                rest = 1.0 - torch.as_tensor(share(state["step"], power))
                state["way"].sub_((p.detach() - copy) * rest.to(p.dtype))
                copy.copy_(p.detach())

    def remember(self, params: list[Tensor]) -> None:
        """After a step: how everything is."""
        self._versions = counts(params)
        if self.marks:  # those of parameters that wrappers have taken away are let go
            self.marks = {p: AFTER_STEP.get(mark, mark) for p in params if (mark := self.marks.get(p)) is not None}
            self._copies = {p: p.detach().clone() for p, mark in self.marks.items() if mark == FOLLOWED}
            self._norms = {p: norm(p) for p, mark in self.marks.items() if mark != FOLLOWED}

    def forget(self) -> None:
        """In a step that does not look: where everything was is not where the next one begins."""
        self._versions, self._norms, self._copies = [], {}, {}

    def forgive(self, params: list[Tensor], before: list[int]) -> None:
        """After somebody has put everything back: the `counts` since ``before`` are not those of a move."""
        self._versions = [seen + new - old for seen, old, new in zip(self._versions, before, counts(params), strict=False)]


def norm(p: Tensor) -> Tensor:
    """‖p‖², 0-dim, in float32 at least; in half precision ‖p‖, which needs no copy."""
    x = p.detach()
    if x.dtype in (torch.bfloat16, torch.float16):
        result: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
        return result
    return dot(x, x)


def counts(params: list[Tensor]) -> list[int]:
    """How often each of ``params`` has been written to, as torch counts it."""
    try:
        return [p._version for p in params]
    except RuntimeError:  # those of inference mode are not counted
        return []
