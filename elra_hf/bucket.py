"""What a direction works on: tensors of one kind, and the verdict on a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = list[Tensor]

CHUNK_BYTES = 64 * 2**20  # bounds the temporary memory of one multi-tensor call


class Move(NamedTuple):
    """The verdict on a step: 0-dim tensors, the numbers in the bucket's working dtype, the flags bool.

    Attributes:
        rate: η, what multiplies d_t; 0 where the step is not taken.
        decay: factor on x for the weight decay; None without.
        back: η of the last step where that one is to be undone, else 0; None where nothing can call for it.
        taken: G_t is finite and not zero, and enters the state.
        restart: forget past gradients.
        clip: what G_t is multiplied by, in (0, 1]; None where nothing can call for it.
    """

    rate: Tensor
    decay: Tensor | None
    back: Tensor | None
    taken: Tensor
    restart: Tensor
    clip: Tensor | None


@dataclass(frozen=True)
class Bucket:
    """Tensors of one group, dtype, device, age and sharding. All lists are parallel; tensors are real and local.

    Attributes:
        index: position of the parameter group.
        group: the parameter group, for hyperparameters (``betas``, ``eps``).
        members: positions of the parameters among all parameters.
        idle: the tensors had no gradient in the last step, so it did not move them.
        new: the group is in its first two steps, the first of which may be a dummy without a gradient.
        step: gradients taken in so far, 0-dim float32 on the bucket's device. Shared by all tensors of one age.
        params: x_t.
        grads: G_t as autograd left it; ``opened`` turns it to descent.
        state: the direction's tensors by name.
    """

    index: int
    group: dict[str, Any]
    members: list[int]
    idle: bool
    new: bool
    step: Tensor
    params: Tensors
    grads: Tensors
    state: dict[str, Tensors]

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic runs in float32 at least: an update in bfloat16 would be rounded three times."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    @property
    def age(self) -> Tensor:
        """``step`` in the working dtype, for weights that depend on it."""
        return self.step.to(self.dtype)

    def move(
        self, rate: Tensor, decay: Tensor | None, back: Tensor | None, taken: Tensor, restart: Tensor, clip: Tensor | None
    ) -> Move:
        """Bring a verdict to the bucket's device and dtype."""
        device, dtype = self.params[0].device, self.dtype
        return Move(
            rate.to(device, dtype),
            None if decay is None else decay.to(device, dtype),
            None if back is None else back.to(device, dtype),
            taken.to(device),
            restart.to(device),
            None if clip is None else clip.to(device, dtype),
        )

    def chunks(self) -> Iterator[Bucket]:
        """Cut into pieces for one multi-tensor call each, or for one tensor each with ``foreach=False``."""
        limit = 0 if self.group["foreach"] is False else CHUNK_BYTES
        start = size = 0
        for i, p in enumerate(self.params):
            nbytes = p.numel() * p.element_size()
            if i > start and size + nbytes > limit:
                yield self._cut(start, i)
                start, size = i, 0
            size += nbytes
        yield self._cut(start, len(self.params))

    def _cut(self, start: int, stop: int) -> Bucket:
        return replace(
            self,
            members=self.members[start:stop],
            params=self.params[start:stop],
            grads=self.grads[start:stop],
            state={name: tensors[start:stop] for name, tensors in self.state.items()},
        )

    def opened(self) -> Bucket:
        """The same in the working dtype with descending gradients; copies only where that changes something."""
        grads = [g.to(self.dtype) for g in self.grads]
        if self.group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        return replace(
            self,
            params=[p.to(self.dtype) for p in self.params],
            grads=grads,
            state={name: [t.to(self.dtype) for t in tensors] for name, tensors in self.state.items()},
        )

    def close(self, work: Bucket) -> None:
        """Write back what ``opened`` had to copy."""
        pairs = [(self.params, work.params), *((self.state[name], work.state[name]) for name in self.state)]
        for own, worked in pairs:
            if own[0] is not worked[0]:
                torch._foreach_copy_(own, worked)
