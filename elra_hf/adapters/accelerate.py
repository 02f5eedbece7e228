"""Accelerate. DDP and FSDP2 need nothing: prepare model and optimizer together, as with any other optimizer.

FSDP version 1 hides which ranks hold the rest of a parameter. It takes one more argument, after the model is wrapped::

    model = accelerator.prepare(model)
    optimizer = ElraC2Min(model.parameters(), process_group=sharding_group(model))
    optimizer = accelerator.prepare(optimizer)

The same line is right for models that are wrapped otherwise, or not at all.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def sharding_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which FSDP1 cuts the parameters of ``model``, for ``process_group=``.

    Returns:
        None without FSDP1. Under NO_SHARD a group of this rank alone, which says that the parameters are whole.

    Raises:
        ValueError: the parts of ``model`` are sharded in different ways, so that no one group fits.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    units = FullyShardedDataParallel.fsdp_modules(model)
    if not units:
        return None
    alone = (dist.get_rank(),)
    groups = {}
    for unit in units:
        whole = unit.sharding_strategy is ShardingStrategy.NO_SHARD
        groups[alone if whole else tuple(dist.get_process_group_ranks(unit.process_group))] = unit.process_group
    if len(groups) > 1:
        raise ValueError(
            f"FSDP1 shards parts of the model over the ranks {sorted(groups)}, and a parameter does not show over which: "
            "give all FSDP units the same sharding strategy and group, or use FSDP2 (fully_shard), where it is visible"
        )
    [(ranks, group)] = groups.items()
    return dist.new_group([*alone], use_local_synchronization=True) if ranks == alone else group
