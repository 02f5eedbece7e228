"""Which ranks hold the rest of x, and the sum of a step's inner products over exactly those.

Plain tensors are whole on every rank (DDP has averaged their gradients already): nothing is summed, no collective runs.
A DTensor is summed over the mesh dimensions that its placements do not replicate; what is replicated counts once.
FSDP1 and DeepSpeed ZeRO show plain tensors that are slices, and no group can be seen from them: they need
``process_group``, and a slice that can be recognised is refused without one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a torch built without distributed has no DTensor either

    class DTensor:  # type: ignore[no-redef]
        """Never instantiated."""


Groups = tuple["dist.ProcessGroup", ...]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lives on this rank, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(
            f"a gradient or parameter is a DTensor with a pending sum, placements {tensor.placements}: "
            "redistribute it to Shard or Replicate before step()"
        )
    return tensor.to_local()


def is_fsdp1(param: Tensor) -> bool:
    """Whether FSDP1 holds ``param`` as (part of) a flat parameter. It may still be whole, under NO_SHARD."""
    return bool(getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False))


def groups_of(params: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> list[Groups]:
    """The process groups that hold other parts of each parameter, in a fixed order; empty where it is whole.

    Args:
        params: the parameters, in the same order on every rank.
        process_group: the group over which plain tensors are split. Where FSDP1's are among them, only those are.

    Raises:
        RuntimeError: FSDP1 parameters without ``process_group``.
    """
    params = list(params)
    fsdp1 = any(is_fsdp1(p) for p in params)
    if fsdp1 and process_group is None:
        raise RuntimeError(
            "the parameters are sharded by FSDP1, which hides the ranks that hold the rest of them: pass "
            "process_group=<the sharding group>, or use FSDP2 (fully_shard), where it is visible"
        )
    result: list[Groups] = []
    for p in params:
        if isinstance(p, DTensor):
            dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
            result.append(tuple(p.device_mesh.get_group(i) for i in dims if p.device_mesh.size(i) > 1))
        elif process_group is not None and (is_fsdp1(p) or not fsdp1):
            result.append((process_group,))
        else:
            result.append(())
    return result


def all_sum(parts: dict[Groups, Tensor]) -> Tensor:
    """Sum ``parts``, each first over its own groups, with one all-reduce for each distinct group.

    Args:
        parts: equally shaped tensors by the groups that hold the rest of them. Keys must be the same on all ranks.

    Returns:
        The total, the same on every rank.
    """
    pending = dict(parts)
    while any(pending):
        # by order of appearance, which all ranks share; group names are not the same from rank to rank
        by_name = {group.group_name: group for groups in pending for group in groups}
        name, group = list(by_name.items())[-1]
        touched = [groups for groups in pending if any(g.group_name == name for g in groups)]
        packed = torch.stack([pending.pop(groups) for groups in touched])
        dist.all_reduce(packed, group=group)
        for groups, part in zip(touched, packed.unbind(0), strict=True):
            rest = tuple(g for g in groups if g.group_name != name)
            pending[rest] = pending[rest] + part if rest in pending else part
    return pending[()]
