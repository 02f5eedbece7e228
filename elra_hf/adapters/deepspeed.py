"""DeepSpeed. ZeRO cuts the parameters over the ranks without a trace of where the rest is.

One argument tells::

    deepspeed.init_distributed()
    optimizer = ElraC2Min(model.parameters(), process_group=sharding_group(model, config))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

The config needs ``"zero_allow_untested_optimizer": true``, as for every optimizer that is not DeepSpeed's own. Under the
Trainer all of this happens by itself; with Accelerate alone, ``config`` is
``accelerator.state.deepspeed_plugin.deepspeed_config``.

ZeRO-1, 2 and 3 call ``step()`` once for each parameter group, with the gradients of that group alone. One rate for all
parameters therefore needs one group. With several, pass ``scope="group"``: each has a rate of its own, and skips a step or
restarts by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn


def stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed config asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def sharding_group(model: nn.Module, config: Mapping[str, Any] | str | os.PathLike[str]) -> dist.ProcessGroup:
    """The ranks over which ZeRO cuts the parameters of ``model``, for ``process_group=``: all that train together.

    Args:
        model: what ``deepspeed.initialize`` gets.
        config: the DeepSpeed config that it gets, or the path of the JSON file.

    Returns:
        The group of all ranks. At stage 0 a group of this rank alone, which says that the parameters are whole.

    Raises:
        RuntimeError: there is no process group yet.
        ValueError: the config cuts or moves the parameters in a way in which the rate would be wrong.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group yet: call deepspeed.init_distributed() before building the optimizer")
    options = config if isinstance(config, Mapping) else json.loads(Path(config).read_text("utf-8"))
    zero = options.get("zero_optimization", {})
    split = int(options.get("tensor_parallel", {}).get("autotp_size", 0))
    if split > 1:
        raise ValueError(
            f"tensor_parallel.autotp_size={split} in the DeepSpeed config is not supported: it cuts parameters without a trace "
            "of where the rest is. Leave it out, or use the tensor parallelism of torch (DTensor)"
        )
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device != "none":
        raise ValueError(
            f"zero_optimization.offload_optimizer.device={device!r} in the DeepSpeed config is not supported: Accelerate would "
            "put DeepSpeedCPUAdam in the place of ELRA without a word. Leave offload_optimizer out; ZeRO-3 saves the most "
            "without it"
        )
    group: dist.ProcessGroup | None = dist.group.WORLD
    if stage(options) == 0:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    if stage(options) == 3:
        world = dist.get_world_size()
        # zero.Init leaves empty parameters behind, which know their size
        numels = [getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
        held, limit = sum(-(-numel // world) for numel in numels), float(zero.get("sub_group_size", 1e9))
        if held > limit:
            raise ValueError(
                f"zero_optimization.sub_group_size={limit:g} in the DeepSpeed config is not supported with {held} numbers on "
                "each rank: ZeRO-3 would step them in pieces, each of which would change the rate. Raise it "
                f"to {1.1 * held:.2g} or more; the step then holds the float32 gradient of all of them at once"
            )
    assert group is not None
    return group
