"""What other hands do to the parameters between two steps, such as to clamp or to normalise them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .pieces import PLAIN_TENSORS

# A parameter is followed once it was written to between so many pairs of steps on end: not where somebody puts in other weights
# now and then, to look at them, and puts these back.
ON_END = 2

States = Mapping[Tensor, dict[str, Any]]


class Hands:
    """Follows the parameters that others move after each step, so that the way back to their average stays what it is.

    The way x̄ - x is what is stored of the average. Where a constraint takes part of each step back, that part would pile up in
    it, and the rate would rise without end. That a parameter was written to shows in torch's count of it, which what is done
    through ``.data`` escapes; how far it was moved shows in a copy from step to step, 4 bytes more a float32 parameter.

    Args:
        followed: parameters that are followed from the start.
    """

    def __init__(self, followed: Iterable[Tensor] = ()) -> None:
        self._versions: list[int] = []
        self._moved = dict.fromkeys(followed, ON_END)  # between how many pairs of steps on end
        self._copies: dict[Tensor, Tensor] = {}

    @property
    def followed(self) -> set[Tensor]:
        """The parameters that are followed."""
        return {p for p, times in self._moved.items() if times >= ON_END}

    def look(self, params: list[Tensor], states: States) -> None:
        """Before a step: who has been moved since the last?"""
        versions = counts(params)
        if self._versions and (versions != self._versions or self._moved):
            pairs = zip(params, self._versions, versions, strict=False)
            moved = [p for p, old, new in pairs if old != new and type(p) in PLAIN_TENSORS]
            self._moved = {p: self._moved.get(p, 0) + 1 for p in moved} | dict.fromkeys(self._copies, ON_END)
            self.tell(states)

    def tell(self, states: States) -> None:
        """Let the ways know how far the parameters that are followed have been moved since they were last told."""
        for p, copy in self._copies.items():
            state = states.get(p, {})
            if "way" in state and (copy.shape, copy.dtype, copy.device) == (p.shape, p.dtype, p.device):
                # of the average, x after the step has the share 1 / (step + 1)
                rest = state["step"] / (state["step"] + 1.0)
                state["way"].sub_((p.detach() - copy) * rest.to(p.dtype))
                copy.copy_(p.detach())

    def remember(self, params: list[Tensor]) -> None:
        """After a step: how everything is."""
        self._versions = counts(params)
        if self._moved:
            followed = self.followed
            self._copies = {p: p.detach().clone() for p in params if p in followed}

    def forgive(self, params: list[Tensor], before: list[int]) -> None:
        """After somebody has put everything back: the `counts` since ``before`` are not those of a move."""
        self._versions = [seen + new - old for seen, old, new in zip(self._versions, before, counts(params), strict=False)]


def counts(params: list[Tensor]) -> list[int]:
    """How often each of ``params`` has been written to, as torch counts it."""
    try:
        return [p._version for p in params]
    except RuntimeError:  # those of inference mode are not counted
        return []
