"""What the ranks of a launch do. Each function is called by name, see `harness`."""

from __future__ import annotations

import os
import signal
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.nn.parallel import DistributedDataParallel as Ddp

from elra_hf import ElraC2Min
from elra_hf.adapters.accelerate import sharding_group
from elra_hf.reduce import local

from .setups import (
    FULL,
    FUSED,
    NO,
    NORMS,
    SETUPS,
    STEPS,
    VARIANTS,
    Net,
    Outcome,
    Wrapped,
    advance,
    alone,
    batch,
    build,
    collectives,
    ddp,
    flatten,
    fsdp1,
    fsdp2,
    make,
    train,
    whole,
)


def rows() -> dict[tuple[str, str, str], Any]:
    """Every set-up of this world size, by (set-up, variant, reduction); a traceback where one failed on this rank."""
    results: dict[tuple[str, str, str], Any] = {}
    for name, setup in SETUPS.items():
        if setup.world != dist.get_world_size():
            continue
        start = time.monotonic()
        for variant in VARIANTS:
            for kind in ("right", "checked", *setup.wrong):
                try:
                    results[name, variant, kind] = train(setup, variant, kind)
                except Exception:
                    results[name, variant, kind] = traceback.format_exc()
                    print(name, variant, kind, results[name, variant, kind], flush=True)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return results


def launched() -> dict[tuple[str, str], tuple[Outcome, int]]:
    """Set-ups of this world size through the kernels for accelerators, and how many of the steps took few launches."""
    import elra_hf.kernels
    from elra_hf.launches import Launches

    few, real = [0], Launches._launch

    def count(self: Any, *args: Any) -> None:
        few[0] += 1
        real(self, *args)

    results = {}
    choose, elra_hf.kernels.choose = elra_hf.kernels.choose, lambda *_: "triton"
    Launches._launch = count  # type: ignore[method-assign]
    try:
        for name, variant in FUSED:
            few[0] = 0
            results[name, variant] = train(replace(SETUPS[name], dtype=torch.float32), variant), few[0]
            print(name, variant, few, flush=True)
    finally:
        elra_hf.kernels.choose, Launches._launch = choose, real  # type: ignore[method-assign]
    return results


# ---- behaviour, 2 ranks ------------------------------------------------------------------------------------------------


def behaviour() -> dict[str, Any]:
    """Everything below, by name."""
    results: dict[str, Any] = {}
    for function in (refusals, check_sync, join, scaler, accelerated, bad_shards, hung):
        for key, value in function().items():
            results[f"{function.__name__}: {key}"] = value
        print(function.__name__, flush=True)
    return results


def complaint(function: Any) -> str:
    """What ``function`` raises, or an empty string."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[str, str]:
    """What is refused: slices without a group, a group where it would be wrong."""

    def fsdp1_step(**options: Any) -> None:
        wrapped = fsdp1(FULL, True)(build(Net))
        advance(wrapped, make("elra_c2min", wrapped.named, False, **options), SETUPS["DDP"], range(1))

    def bare() -> None:
        parts = [torch.ones(3, requires_grad=True)]
        parts[0].grad = torch.ones(3)
        ElraC2Min(parts).step()

    def fsdp2_with_group() -> None:
        wrapped = fsdp2(2)(build(Net))
        advance(wrapped, make("elra_c2min", wrapped.named, False, process_group=dist.group.WORLD), SETUPS["DDP"], range(1))

    def mixed_strategies() -> None:
        model = build(Net)
        model.up = Fsdp1(model.up, sharding_strategy=NO, device_id=torch.device("cpu"))
        sharding_group(Fsdp1(model, sharding_strategy=FULL, device_id=torch.device("cpu")))

    return {function.__name__: complaint(function) for function in (fsdp1_step, bare, fsdp2_with_group, mixed_strategies)}


def check_sync() -> dict[str, str]:
    """What ``check_sync`` says to ranks that do not agree."""
    rank, setup = dist.get_rank(), SETUPS["DDP"]

    def plain(seed: int = 7) -> tuple[Any, Any]:
        model = build(Net)
        if seed != 7:
            torch.manual_seed(seed)
            model = Net().double()
        named = list(model.named_parameters())
        return Wrapped(model, named, whole(named), data=(rank, 2)), make("elra_c2min", named, False, check_sync=True)

    def average(wrapped: Any) -> None:
        for _, p in wrapped.named:
            dist.all_reduce(p.grad)

    def backward(wrapped: Any) -> None:
        x, y = batch(0, setup.model)
        torch.nn.functional.mse_loss(wrapped.module(x.chunk(2)[rank]), y.chunk(2)[rank]).backward()

    def not_prepared() -> None:
        wrapped, optimizer = plain()
        advance(wrapped, optimizer, setup, range(1))

    def one_rank_skips_its_all_reduce() -> None:
        wrapped, optimizer = plain()
        backward(wrapped)
        kept = [p.grad.clone() for _, p in wrapped.named]
        average(wrapped)
        if rank == 1:
            for (_, p), grad in zip(wrapped.named, kept, strict=True):
                p.grad = grad
        optimizer.step()

    def one_rank_has_no_gradient() -> None:
        wrapped, optimizer = plain()
        if rank == 0:
            backward(wrapped)
        optimizer.step()

    def no_sync() -> None:
        wrapped = ddp()(build(Net))
        with wrapped.module.no_sync():
            backward(wrapped)
        make("elra_c2min", wrapped.named, False, check_sync=True).step()

    def other_seeds() -> None:
        wrapped, optimizer = plain(seed=rank)
        backward(wrapped)
        average(wrapped)
        optimizer.step()

    def other_rates() -> None:
        wrapped = ddp()(build(Net))
        optimizer = make("elra_c2min", wrapped.named, False, check_sync=True)
        advance(wrapped, optimizer, setup, range(3))
        if rank == 1:
            for group in optimizer.param_groups:
                group["elra_alpha"] = group["elra_alpha"] * 2
        advance(wrapped, optimizer, setup, range(1))

    def unmanaged_parameters() -> None:
        wrapped = fsdp2(2, ignore=NORMS)(build(Net))
        wrapped.unmanaged = []
        advance(wrapped, make("elra_c2min", wrapped.named, False, check_sync=True), setup, range(1))

    def nan_everywhere() -> None:
        wrapped = ddp()(build(Net))
        backward(wrapped)
        for _, p in wrapped.named:
            p.grad.fill_(torch.nan)
        make("elra_c2min", wrapped.named, False, check_sync=True).step()

    cases = (
        not_prepared,
        one_rank_skips_its_all_reduce,
        one_rank_has_no_gradient,
        no_sync,
        other_seeds,
        other_rates,
        unmanaged_parameters,
        nan_everywhere,
    )
    result = {function.__name__: complaint(function) for function in cases}
    for kind in ("DDP", "FSDP2"):
        wrapped = SETUPS[kind].wrap(build(Net))
        checked = make("elra_c2min", wrapped.named, False, check_sync=True)
        result[f"collectives, {kind}"] = str(collectives(wrapped, checked))
    return result


def join() -> dict[str, Any]:
    """Steps taken with DDP's ``join()`` where rank 1 has twice as many batches."""
    taken = {}
    for variant in VARIANTS:
        wrapped = ddp()(build(Net))
        optimizer = make(variant, wrapped.named, False)
        with wrapped.module.join():
            taken[variant] = len(advance(wrapped, optimizer, SETUPS["DDP"], range(3 * (dist.get_rank() + 1))))
    return taken


def scaler() -> dict[str, Any]:
    """α around a step that a gradient scaler skips since one rank's gradient overflows."""
    wrapped = ddp()(build(Net, torch.float32))
    optimizer = make("elra_c2min", wrapped.named, False)
    scale = torch.amp.GradScaler("cpu", init_scale=2.0)
    alphas = []
    for step in range(6):
        x, y = batch(step, Net, torch.float32)
        loss = torch.nn.functional.mse_loss(wrapped.module(x.chunk(2)[dist.get_rank()]), y.chunk(2)[dist.get_rank()])
        scale.scale(loss).backward()
        if step == 3:
            # after the all-reduce, where an overflow on one rank has reached all of them
            next(iter(wrapped.named))[1].grad.fill_(torch.inf)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        alphas.append(float(optimizer.param_groups[0]["alpha"]))
    return {"alphas": alphas, "restarts": float(optimizer.param_groups[0]["restarts"])}


def accelerated() -> dict[str, Any]:
    """Training with `accelerate`, which round-trips the state at once, with accumulation over two micro-batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    result: dict[str, Any] = {}
    for variant in VARIANTS:
        model = build(Net)
        named = list(model.named_parameters())
        prepared, optimizer = accelerator.prepare(model, make(variant, named, False))
        assert isinstance(prepared, Ddp)
        alphas = []
        for step in range(STEPS):
            x, y = batch(step, Net)
            for xs, ys in zip(*(part.chunk(2)[dist.get_rank()].chunk(2) for part in (x, y)), strict=True):
                with accelerator.accumulate(prepared):
                    accelerator.backward(torch.nn.functional.mse_loss(prepared(xs), ys))
                    optimizer.step()
                    optimizer.zero_grad()
            alphas.append(float(optimizer.param_groups[0]["alpha"]))
        result[variant] = Outcome(alphas, flatten(whole(named)()), 0)
    result["group"] = sharding_group(prepared)
    return result


BAD = 5  # the step in which one rank has a gradient that is no number


def with_a_nan(kind: str, variant: str) -> tuple[list[float], torch.Tensor, list[float]]:
    """α of each step, x at the end and the restarts of a run in which the last rank's part alone has a NaN in step `BAD`."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = (WRAPS[kind](world) if world > 1 else alone)(build(Net))
    optimizer = make(variant, wrapped.named, False, **wrapped.options)
    steps = []

    def poison(*_: Any) -> None:
        steps.append(0)
        if len(steps) == BAD + 1 and rank == world - 1:
            local(next(p.grad for _, p in wrapped.named if p.grad is not None and local(p.grad).numel())).view(-1)[0] = (
                torch.nan
            )

    optimizer.register_step_pre_hook(poison)
    alphas = advance(wrapped, optimizer, SETUPS["DDP"], range(STEPS))
    return alphas, flatten(wrapped.full()), [float(group["restarts"]) for group in optimizer.param_groups]


def bad_shards() -> dict[str, Any]:
    """`with_a_nan` where parameters are cut, which show their groups of ranks or are given one."""
    return {f"{kind}, {variant}": with_a_nan(kind, variant) for kind in ("FSDP2", "FSDP1") for variant in VARIANTS}


def hung() -> dict[str, Any]:
    """One rank is stopped in mid run: what the step of the other one says, and whether it has changed anything."""
    rank, group, pids = dist.get_rank(), dist.new_group(timeout=timedelta(seconds=10)), [0, 0]
    dist.all_gather_object(pids, os.getpid())
    x = torch.nn.Parameter(torch.full((4,), 2.0 + rank))
    optimizer = ElraC2Min([x], process_group=group)
    said = before = None
    for step in range(6):
        x.grad = x.detach() - 1.0
        before = x.detach().clone(), float(optimizer.param_groups[0]["elra_alpha"])
        if step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        said = complaint(optimizer.step)
        if said:
            break
    if rank == 0:
        os.kill(pids[1], signal.SIGCONT)
    assert before is not None
    kept = torch.equal(x, before[0]) and float(optimizer.param_groups[0]["elra_alpha"]) == before[1]
    return {"stopped": (step, said, kept)}


def hang() -> None:
    """Rank 1 waits for a rank that never comes."""
    if dist.get_rank() == 0:
        time.sleep(600)
    print("rank 1 waits", flush=True)
    dist.barrier()


# ---- checkpoints -------------------------------------------------------------------------------------------------------

SAVED_AFTER = 10
WRAPS = {"FSDP2": fsdp2, "FSDP1": lambda *shape: fsdp1(FULL, True), "DDP": lambda *shape: ddp()}
STYLES = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
CASES = [
    *(("FSDP2", variant, style) for variant in VARIANTS for style in STYLES),
    *(("DDP", "elra_adamw", style) for style in STYLES),
    # torch 2.13 garbles the full state of FSDP1 on CPU, that of its own AdamW too
    *(("FSDP1", "elra_adamw", style) for style in STYLES if style != "full"),
]
# one age more, and a parameter without a gradient in the very step that is saved
OPTIONS = {"elra_c2min": {}, "elra_p2min": {"scope": "group"}, "elra_adamw": {"scope": "tensor"}}


def absent(step: int) -> tuple[str, ...]:
    return {0: ("norm.bias",), 1: ("norm.bias", "norm.weight"), SAVED_AFTER - 1: ("head.weight",)}.get(step, ())


def begin(kind: str, variant: str) -> tuple[Wrapped, Any]:
    """A fresh model and optimizer, whole where there is one rank."""
    options = {} if kind == "FSDP1" else OPTIONS[variant]
    model = build(Net)
    wrap = alone if dist.get_world_size() == 1 else WRAPS[kind](dist.get_world_size())
    wrapped = wrap(model)
    return wrapped, make(variant, wrapped.named, False, **wrapped.options, **options)


def save(folder: str) -> dict[tuple[str, str], Outcome]:
    """Train without stopping, and save in the middle in every style."""
    results = {}
    for kind, variant in dict.fromkeys(case[:2] for case in CASES):
        wrapped, optimizer = begin(kind, variant)
        alphas = advance(wrapped, optimizer, SETUPS["DDP"], range(SAVED_AFTER), absent)
        path = f"{folder}/{kind}-{variant}-"
        dcp.save(get_model_state_dict(wrapped.module), checkpoint_id=path + "model")
        for style in [case[2] for case in CASES if case[:2] == (kind, variant)]:
            state = get_optimizer_state_dict(wrapped.module, optimizer, options=STYLES[style])
            if style != "full":
                dcp.save(state, checkpoint_id=path + style)
            elif dist.get_rank() == 0:
                torch.save(state, path + style)
        alphas += advance(wrapped, optimizer, SETUPS["DDP"], range(SAVED_AFTER, STEPS), absent)
        results[kind, variant] = Outcome(alphas, flatten(wrapped.full()), 0)
    return results


def resume(folder: str) -> dict[tuple[str, str, str], Outcome | str]:
    """Load each checkpoint into a model that has not been trained, and go on."""
    results: dict[tuple[str, str, str], Outcome | str] = {}
    for kind, variant, style in CASES:
        try:
            wrapped, optimizer = begin(kind, variant)
            path = f"{folder}/{kind}-{variant}-"
            weights = get_model_state_dict(wrapped.module)
            dcp.load(weights, checkpoint_id=path + "model")
            set_model_state_dict(wrapped.module, weights)
            if style == "full":
                state = torch.load(path + style, weights_only=True)
            else:
                state = get_optimizer_state_dict(wrapped.module, optimizer, options=STYLES[style])
                dcp.load(state, checkpoint_id=path + style)
            set_optimizer_state_dict(wrapped.module, optimizer, state, options=STYLES[style])
            alphas = advance(wrapped, optimizer, SETUPS["DDP"], range(SAVED_AFTER, STEPS), absent)
            results[kind, variant, style] = Outcome(alphas, flatten(wrapped.full()), 0)
        except Exception:
            results[kind, variant, style] = traceback.format_exc()
            print(kind, variant, style, results[kind, variant, style], flush=True)
    return results
