"""What the ranks of a launch under torch's ZeroRedundancyOptimizer do, and the same in one process."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as Ddp

from elra_hf import ElraAdamW, averaged, rate
from elra_hf.adapters.found import Search

from .setups import BATCH, VARIANTS, Net, batch, build, flatten, groups

STEPS, BAD, SAVED_AFTER = 16, 7, 10


class Lopsided(nn.Module):
    """One parameter in each of two groups: each of two ranks lacks a group, and of four ranks two have nothing."""

    inputs, outputs = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


SHAPES: dict[str, type[nn.Module]] = {"net": Net, "lopsided": Lopsided}
OPTIONS = [
    *((variant, "global") for variant in VARIANTS),
    ("elra_p2min", "group"),
    ("elra_adamw", "group"),
    ("elra_c2min", "tensor"),
]


@dataclass
class Dealt:
    """Rates of the groups after every step, x at the end, restarts of the groups, parameters held of each group."""

    alphas: list[list[float]]
    x: Tensor
    restarts: list[float]
    held: list[int]


def grouped(model: nn.Module, variant: str) -> list[dict[str, Any]]:
    """Two groups, one of which moves half as far."""
    lr = VARIANTS[variant][1]
    made = groups(list(model.named_parameters()), single=False)
    return [{**group, "lr": lr / 2 if group.pop("half", False) else lr} for group in made]


def advance(model: nn.Module, module: nn.Module, optimizer: Any, steps: range) -> list[list[float]]:
    """Train; in step `BAD` one parameter alone, which one rank holds, has a gradient that is no number."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    alphas = []
    for step in steps:
        x, y = (part.chunk(world)[rank] for part in batch(step, model))
        nn.functional.mse_loss(module(x), y).backward()
        if step == BAD:
            next(p for name, p in model.named_parameters() if name.endswith("bias")).grad.fill_(torch.nan)
        optimizer.step()
        optimizer.zero_grad()
        alphas.append([float(group["alpha"]) for group in optimizer.param_groups])
    return alphas


def outcome(model: nn.Module, optimizer: Any, alphas: list[list[float]]) -> Dealt:
    inner = getattr(optimizer, "optim", optimizer)
    return Dealt(
        alphas,
        flatten({name: p.detach() for name, p in model.named_parameters()}),
        [float(group["restarts"]) for group in optimizer.param_groups],
        [len(group["params"]) for group in inner.param_groups],
    )


def alone(shape: str, variant: str, scope: Any) -> Dealt:
    model = build(SHAPES[shape])
    cls, lr = VARIANTS[variant]
    optimizer = cls(grouped(model, variant), lr=lr, scope=scope)
    return outcome(model, optimizer, advance(model, model, optimizer, range(STEPS)))


def train(shape: str, variant: str, scope: str, kind: str) -> Dealt:
    """As `alone` on the ranks; "resumed": from a checkpoint that rank 1 wrote, in a new model and optimizer."""

    def begin() -> tuple[nn.Module, nn.Module, Any]:
        model = build(SHAPES[shape])
        cls, lr = VARIANTS[variant]
        options = {"lr": lr, "scope": scope, "check_sync": kind == "checked"}
        return model, Ddp(model), ZeroRedundancyOptimizer(grouped(model, variant), optimizer_class=cls, **options)

    assert BATCH % dist.get_world_size() == 0
    model, module, optimizer = begin()
    if kind != "resumed":
        return outcome(model, optimizer, advance(model, module, optimizer, range(STEPS)))
    alphas = advance(model, module, optimizer, range(SAVED_AFTER))
    optimizer.consolidate_state_dict(to=1)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 1 else ""]
    dist.broadcast_object_list(folder, src=1)
    path = Path(folder[0], "checkpoint")
    if dist.get_rank() == 1:
        torch.save([model.state_dict(), optimizer.state_dict()], path)
    dist.barrier()
    weights, state = torch.load(path, weights_only=True)
    model, module, optimizer = begin()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return outcome(model, optimizer, alphas + advance(model, module, optimizer, range(SAVED_AFTER, STEPS)))


def rows() -> dict[tuple[str, str, str, str], Any]:
    """Everything, by (shape, variant, scope, kind); a traceback where one failed on this rank."""
    results: dict[tuple[str, str, str, str], Any] = {}
    for shape in SHAPES:
        for variant, scope in OPTIONS:
            for kind in ("right", "checked", "resumed"):
                try:
                    results[shape, variant, scope, kind] = train(shape, variant, scope, kind)
                except Exception:
                    results[shape, variant, scope, kind] = traceback.format_exc()
                    print(shape, variant, scope, kind, results[shape, variant, scope, kind], flush=True)
    return results


def wrapped() -> dict[str, Any]:
    """What torch's wrappers let others see of the rate: {wrapper: (rate of the wrapper, rate of what it wraps, refusals)}."""
    results: dict[str, Any] = {}
    for name in ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"):
        model = build(Net)
        module, params = Ddp(model), [*model.parameters()]
        if name == "ZeroRedundancyOptimizer":
            optimizer: Any = ZeroRedundancyOptimizer(params, optimizer_class=ElraAdamW, lr=1e-3)
        else:
            optimizer = PostLocalSGDOptimizer(ElraAdamW(params, lr=1e-3), PeriodicModelAverager(period=4, warmup_steps=2))
        advance(model, module, optimizer, range(5))
        before, refusals = [p.detach().clone() for p in params], []
        for refused in (lambda o=optimizer: averaged(o).__enter__(), lambda o=optimizer, m=model: Search(3).start(m, o)):
            try:
                refused()
                refusals.append("")
            except ValueError as error:
                refusals.append(str(error))
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        results[name] = rate(optimizer), float(optimizer.optim.param_groups[0]["effective_lr"]), refusals
    return results
