"""The average of the iterates, which is often the better model while the rate is high: `averaged` swaps it in and out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .hands import Hands, counts
from .optimizer import Elra, layers, unwrap
from .reduce import local, slicer

_swapped: weakref.WeakSet[Elra] = weakref.WeakSet()


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Hold the average x̄ of all iterates in the parameters, and put the iterate x back at the end, bit for bit.

    ::

        with elra_hf.averaged(optimizer):
            evaluate(model)
            model.save_pretrained("averaged")

    x̄ is the average of the parameters at the start of the run and after each of its steps. In ElraAdamW's the k-th weighs k, so
    that the search at the start is soon forgotten; ElraC2Min's and ElraP2Min's is the plain mean, and starts anew where they
    went back to it after an explosion. There is no mode to switch: whatever happens in the block, training goes on from x.
    Works through the wrappers of Accelerate, Lightning and Fabric, and on the local shards of FSDP2 and tensor parallelism,
    without a collective. ElraAdamW and, unless ``horizon=math.inf``, ElraC2Min and ElraP2Min keep x̄ - x anyway, in the
    parameter's dtype: 4 bytes of state a float32 parameter. The block itself takes as much again, for x. What rounds weights in
    bfloat16 is not in it: after thousands of steps x̄ may be no better than x.

    Buffers are left alone. The running statistics of BatchNorm are those of the iterate, and do not fit the average: take them
    anew inside of the block, with ``torch.optim.swa_utils.update_bn(batches, model)``, before the model is evaluated or saved,
    and once more after it if training goes on.

    Args:
        optimizer: one of ours, or a wrapper of it.

    Raises:
        TypeError: there is no ELRA optimizer inside.
        ValueError: it keeps no average; or it steps copies or slices of the weights (DeepSpeed, FSDP1), so that the model would
            not follow.
        RuntimeError: the parameters hold the average already; or, inside of the block, at a ``step()``.
    """
    inner = keeper(optimizer)
    if inner in _swapped:
        raise RuntimeError("averaged: the parameters hold the average already; do not nest it")
    inner._hands.tell(inner.state, inner.direction.power)
    params = [p for group in inner.param_groups for p in group["params"]]
    before = counts(params)
    pairs = _pairs(inner)
    iterates = [local(p.detach()).clone() for p, _ in pairs]
    _swapped.add(inner)
    inner._hands.away = True
    handle = inner.register_step_pre_hook(_refuse)
    sharded = any(local(p) is not p for p in params)
    try:
        _to_average(pairs)
        with _gathered_anew() if sharded else nullcontext():
            yield
    finally:
        handle.remove()
        _swapped.discard(inner)
        with torch.no_grad():
            for (p, _), iterate in zip(pairs, iterates, strict=True):
                local(p.detach()).copy_(iterate)  # wherever p is by now: the block may have cast or moved the model and back
        inner._hands.forgive(params, before)
        inner._hands.away = False


def settle(optimizer: Any) -> None:
    """Make the average the iterate, for good: x becomes x̄, from where training would go on.

    Raises:
        TypeError, ValueError: as `averaged`.
    """
    inner = keeper(optimizer)
    inner._hands.tell(inner.state, inner.direction.power)
    pairs = _pairs(inner)
    _to_average(pairs)
    for _, way in pairs:
        way.zero_()
    inner._hands = Hands(inner._hands.marks)


def warn_of_statistics(name: str, module: nn.Module) -> None:
    """Warn on behalf of the callback ``name`` where ``module`` has running statistics, which nobody averages."""
    if any(isinstance(each, nn.modules.batchnorm._BatchNorm) and each.track_running_stats for each in module.modules()):
        warnings.warn(
            f"{name}: the running statistics of BatchNorm stay those of the iterate, which do not fit its average. After the "
            "training take them anew, with torch.optim.swa_utils.update_bn(batches, model), and judge the average by that",
            stacklevel=3,
        )


def keeper(optimizer: Any) -> Elra:
    """The `Elra` inside, which keeps an average of the parameters.

    Raises:
        TypeError, ValueError: as `averaged`.
    """
    inner = unwrap(optimizer)
    params = [(p, group) for group in inner.param_groups for p in group["params"]]
    if not all("way" in inner.direction.dtypes(p, group) for p, group in params if p.requires_grad):  # not of frozen float8
        raise ValueError(
            f"averaged: {type(inner).__name__} with direction={inner.direction!r} keeps no average of the iterates: take "
            "ElraAdamW, or leave out horizon=inf"
        )
    *wrappers, _ = layers(optimizer)
    lone = next((each for each in wrappers if type(each).__module__.startswith("torch.distributed.optim.")), None)
    if lone is not None:
        raise ValueError(
            f"averaged: {type(lone).__name__} gives each rank an optimizer of its own, and the average that one keeps is not "
            "that of the model: use DDP or FSDP2 (fully_shard), or evaluate without the average"
        )
    apart = inner.process_group is not None and dist.get_world_size(inner.process_group) > 1
    slicers = {slicer(p) for p, _ in params} if apart else set()
    if any(type(each).__module__.startswith("deepspeed.") for each in wrappers):
        slicers = {"DeepSpeed"}
    if slicers - {None}:
        raise ValueError(
            f"averaged: {' and '.join(sorted(filter(None, slicers)))} lets the optimizer step copies or slices of the weights, "
            "which the model would not follow: use DDP or FSDP2 (fully_shard), or evaluate without the average"
        )
    return inner


def _pairs(inner: Elra) -> list[tuple[Tensor, Tensor]]:
    """(p, x̄ - x) of each parameter that has had a gradient, of the latter the part on this rank."""
    params = (p for group in inner.param_groups for p in group["params"])
    return [(p, local(inner.state[p]["way"])) for p in params if inner.state.get(p)]


@torch.no_grad()
def _to_average(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for p, way in pairs:
        x = local(p.detach())
        x.add_(way.to(x.device))


@contextmanager
def _gathered_anew() -> Iterator[None]:
    """Let FSDP2 gather what the shards hold now: after a forward pass without a backward it keeps some of it gathered."""
    met: list[nn.Module] = []

    def gather_anew(module: nn.Module, _: Any) -> None:
        if is_fsdp2(module) and not any(module is each for each in met):
            met.extend(reshard(module))

    handle = register_module_forward_pre_hook(gather_anew)
    try:
        yield
    finally:
        handle.remove()
        for module in met:
            reshard(module)


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``module``."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> list[nn.Module]:
    """Let all parts of ``module`` that FSDP2 keeps gathered go; return its parts."""
    parts = [each for each in module.modules() if is_fsdp2(each)]
    for each in parts:
        each.reshard()  # type: ignore[operator]
    return parts


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "step() inside averaged(optimizer): it would be lost when the iterate is put back. Leave the block first"
    )
