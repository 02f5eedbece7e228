"""Which ranks hold the rest of x, and the sum of a step's inner products over exactly those.

Plain parameters are whole on every rank (DDP has averaged their gradients already): nothing is summed, no collective runs.
A DTensor is summed over the mesh dimensions that its placements do not replicate; what is replicated counts once.
FSDP1 and DeepSpeed ZeRO show slices without a trace of where the rest is: they need ``process_group``, and are refused
without one.
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


def world_size() -> int:
    """The number of ranks, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lives on this rank, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient(param: Tensor) -> Tensor:
    """The gradient of ``param``, laid out over the ranks like ``param``: autograd may leave a sum pending."""
    grad = param.grad
    assert grad is not None
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def is_bare(param: Tensor) -> bool:
    """Whether ``param`` is no torch.nn.Parameter. ZeRO's flat slices are not; leaves made by hand may not be either."""
    return type(param) is Tensor


def slicer(param: Tensor) -> str | None:
    """What may have put a slice in the place of ``param`` without a trace of the rest; None for what can be trusted."""
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        return "FSDP1"
    return "DeepSpeed ZeRO" if is_bare(param) else None


def groups_of(params: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> list[Groups]:
    """The process groups that hold other parts of each parameter, in a fixed order; empty where it is whole.

    Args:
        params: the parameters, in the same order on every rank.
        process_group: the group over which FSDP1's and ZeRO's slices are split; if there are none, all plain parameters.
            A group of one rank says that they are whole.

    Raises:
        RuntimeError: slices without ``process_group``, or ``process_group`` for parameters that show their own.
    """
    params = list(params)
    if process_group is None and world_size() == 1:
        return [()] * len(params)
    slicers = [slicer(p) for p in params]
    suspect = next((s for s in slicers if s), None)
    if process_group is None and suspect and world_size() > 1:
        raise RuntimeError(
            f"the parameters look like slices made by {suspect}, which hides the ranks that hold the rest: pass "
            "process_group=elra_hf.adapters.accelerate.sharding_group(model) for FSDP1, or "
            "process_group=elra_hf.adapters.deepspeed.sharding_group(model, config) for DeepSpeed ZeRO. If they are whole on "
            "every rank, make them torch.nn.Parameter. With FSDP2 (fully_shard) nothing needs to be passed"
        )
    if process_group is not None and suspect is None and any(isinstance(p, DTensor) for p in params):
        raise RuntimeError(
            "process_group= is for FSDP1 and DeepSpeed ZeRO; these parameters are DTensors (FSDP2, tensor parallelism), "
            "which show their own groups: leave it out"
        )
    plain: Groups = () if process_group is None or dist.get_world_size(process_group) == 1 else (process_group,)
    result: list[Groups] = []
    for p, cut in zip(params, slicers, strict=True):
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            # by what is not replicated: FSDP2 with tensor parallelism has placements that are no Shard
            dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]
            result.append(tuple(mesh.get_group(i) for i in dims))
        else:
            result.append(plain if cut or suspect is None else ())
    return result


def all_sum(parts: dict[Groups, Tensor]) -> Tensor:
    """Sum ``parts``, each over its own groups, with one all-reduce for each distinct group.

    Args:
        parts: equally shaped tensors by the groups that hold the rest of them. Keys must be the same on all ranks.

    Returns:
        The total, the same bits on every rank of these groups.
    """
    pending = dict(parts)
    while any(pending):
        # by order of appearance, which all ranks share; group names are not the same from rank to rank
        by_name = {group.group_name: group for groups in pending for group in groups}
        name, group = list(by_name.items())[-1]
        # a part that this group does not split counts once: its first rank brings it, for everyone to get the same bits
        first = dist.get_rank(group) == 0
        mine = [first or any(g.group_name == name for g in groups) for groups in pending]
        packed = torch.stack(
            [part if own else torch.zeros_like(part) for own, part in zip(mine, pending.values(), strict=True)]
        )
        dist.all_reduce(packed, group=group)
        done: dict[Groups, Tensor] = {}
        for groups, part in zip(pending, packed.unbind(0), strict=True):
            rest = tuple(g for g in groups if g.group_name != name)
            done[rest] = done[rest] + part if rest in done else part
        pending = done
    return pending[()]


def require_same(x: Tensor, grad: Tensor, alpha: Tensor) -> None:
    """Compare three fingerprints over all ranks, bit for bit, with one all-reduce over the default group.

    Args:
        x: numbers that follow from the parameters, e.g. their squared norm.
        grad: numbers that follow from the gradient.
        alpha: the rates about to be used.

    Raises:
        RuntimeError: on every rank, if the ranks do not agree; names what differs first, and its likely cause.
    """
    if world_size() == 1:
        return
    # the gradient first: where it is averaged, it is the same even at different parameters
    named = {"gradient": grad, "parameters": x, "rate": alpha}
    flat = torch.cat([value.reshape(-1).double() for value in named.values()])
    bits = torch.where(flat.isnan(), torch.nan, flat).view(torch.int64)  # every NaN the same
    both = torch.stack([bits, ~bits])  # ~ turns the order round, so that one maximum gives both ends
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    differs = torch.split(both[0] != ~both[1], [value.numel() for value in named.values()])  # type: ignore[no-untyped-call]
    causes = {
        "parameters": "different seeds before the model was built, a checkpoint loaded on some ranks only, or a model that "
        "was never wrapped: accelerator.prepare(model) and DistributedDataParallel copy rank 0's parameters to all",
        "gradient": "a step before the gradients were all-reduced: a model without accelerator.prepare(model) or "
        "DistributedDataParallel, a backward pass under no_sync(), or a loop that skips the all-reduce on some ranks; "
        "on unlike hardware, other rounding",
        "rate": "an optimizer state loaded on some ranks only, or step(loss=...) with a loss that was not averaged over ranks",
    }
    for (name, value), differ in zip(named.items(), differs, strict=True):
        if differ.any():
            raise RuntimeError(
                f"check_sync: the ranks are about to step with a different {name} (rank {dist.get_rank()} has the fingerprint "
                f"{value.reshape(-1)[differ][0].item():.9g}). Likely cause: {causes[name]}"
            )
