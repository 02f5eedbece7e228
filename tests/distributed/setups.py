"""The set-ups to be compared with one process, a model that is awkward to cut, and the training loop that both share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as Ddp

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min
from elra_hf.adapters.accelerate import sharding_group

VARIANTS = {"elra_c2min": (ElraC2Min, 1e-2), "elra_p2min": (ElraP2Min, 1e-2), "elra_adamw": (ElraAdamW, 1e-3)}
STEPS = 20
BATCH = 8
FAR = 14  # the step with targets so far away that its gradient is one of an explosion


class Net(nn.Module):
    """A residual block between two layers, with sizes that 4 ranks cannot share evenly, and a bias of 3."""

    inputs, outputs = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, 12)
        self.down = nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


class Tiny(nn.Module):
    """Five numbers: some ranks of four hold nothing at all."""

    inputs, outputs = 4, 1

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return kind().to(dtype)


def batch(step: int, model: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, model.inputs, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x[:, : model.outputs]) + 0.3 * torch.randn(BATCH, model.outputs, generator=generator, dtype=torch.float64)
    if step == FAR:
        y = 60 * y
    return x.to(dtype), y.to(dtype)


def groups(named: list[tuple[str, nn.Parameter]], single: bool) -> list[dict[str, Any]]:
    """Two groups, as Trainer makes them, one of which moves half as far; or one."""
    if single:
        return [{"params": [p for _, p in named], "weight_decay": 0.01}]
    rest = [p for name, p in named if not name.endswith("weight")]
    return [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.01},
        {"params": rest, "weight_decay": 0.0, "half": True},
    ]


def make(variant: str, named: list[tuple[str, nn.Parameter]], single: bool, **options: Any) -> Any:
    """An optimizer of one group or two."""
    cls, lr = VARIANTS[variant]
    made = groups(named, single)
    for group in made:
        group["lr"] = lr / 2 if group.pop("half", False) else lr
    return cls(made, lr=lr, **options)


@dataclass
class Wrapped:
    """A model as a set-up wraps it.

    Attributes:
        module: what is called.
        named: the parameters that the optimizer gets.
        full: returns the whole parameters by name.
        options: more arguments of the optimizer.
        data: (which, of how many) slice of the global batch this rank takes.
        unmanaged: parameters whose gradient nobody averages.
    """

    module: nn.Module
    named: list[tuple[str, nn.Parameter]]
    full: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    data: tuple[int, int] = (0, 1)
    unmanaged: list[nn.Parameter] = field(default_factory=list)


@dataclass(frozen=True)
class SetUp:
    """One row of the table.

    Attributes:
        world: how many ranks.
        wrap: wraps a model.
        collectives: how many a sum is made of.
        wrong: reductions that must be noticed: "local" sums nothing, "world" sums over all ranks.
        model: what is trained.
        single: one parameter group, where a flat parameter allows no more.
        accumulate: micro-batches a step.
        dtype: of the parameters.
        tolerance: largest relative error of α and x after 20 steps.
        fp16: the reference rounds as the communication hook does.
    """

    world: int
    wrap: Callable[[nn.Module], Wrapped]
    collectives: int
    wrong: tuple[str, ...] = ()
    model: type[nn.Module] = Net
    single: bool = False
    accumulate: int = 1
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    fp16: bool = False


def whole(named: list[tuple[str, nn.Parameter]]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named}


def everyone() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


# ---- the ways to wrap --------------------------------------------------------------------------------------------------


def ddp(hook: Any = None, **options: Any) -> Callable[[nn.Module], Wrapped]:
    def wrap(model: nn.Module) -> Wrapped:
        module = Ddp(model, **options)
        if hook is not None:
            module.register_comm_hook(None, hook)
        named = list(model.named_parameters())
        return Wrapped(module, named, whole(named), data=everyone())

    return wrap


def mesh_of(*shape: int) -> Any:
    names = {1: ("dp",), 2: ("outer", "inner")}[len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp2(*shape: int, ignore: tuple[str, ...] = (), units: tuple[str, ...] = ("up", "down")) -> Callable[[nn.Module], Wrapped]:
    """``fully_shard`` over a 1-D mesh, or HSDP over (replicate, shard)."""

    def wrap(model: nn.Module) -> Wrapped:
        mesh = mesh_of(*shape)
        ignored = [p for name, p in model.named_parameters() if name.startswith(ignore)] if ignore else []
        for unit in units:
            fully_shard(getattr(model, unit), mesh=mesh, ignored_params=set(ignored))
        fully_shard(model, mesh=mesh, ignored_params=set(ignored))
        named = list(model.named_parameters())
        return Wrapped(model, named, whole(named), data=everyone(), unmanaged=ignored)

    return wrap


def tensor_parallel(model: nn.Module, mesh: Any, sequence: bool) -> None:
    if not sequence:
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return
    split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))
    parallelize_module(model, mesh, {"norm": split})
    plan = {"norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0)), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def tp(sequence: bool = False) -> Callable[[nn.Module], Wrapped]:
    def wrap(model: nn.Module) -> Wrapped:
        tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)), sequence)
        named = list(model.named_parameters())
        return Wrapped(model, named, whole(named))

    return wrap


def fsdp2_tp(model: nn.Module) -> Wrapped:
    mesh = mesh_of(2, 2)
    tensor_parallel(model, mesh["inner"], sequence=False)
    for unit in (model.up, model.down, model):
        fully_shard(unit, mesh=mesh["outer"])
    named = list(model.named_parameters())
    return Wrapped(model, named, whole(named), data=(mesh.get_local_rank("outer"), 2))


def fsdp1(
    strategy: ShardingStrategy, original: bool, ignore: tuple[str, ...] = (), units: tuple[str, ...] = ("up", "down")
) -> Callable[[nn.Module], Wrapped]:
    def wrap(model: nn.Module) -> Wrapped:
        hybrid = strategy is ShardingStrategy.HYBRID_SHARD
        ignored = [p for name, p in model.named_parameters() if name.startswith(ignore)] if ignore else []
        options = {
            "sharding_strategy": strategy,
            "use_orig_params": original,
            "device_id": torch.device("cpu"),
            "device_mesh": mesh_of(2, 2) if hybrid else None,
            "ignored_states": ignored,
        }
        for unit in units:
            setattr(model, unit, Fsdp1(getattr(model, unit), **options))
        module = Fsdp1(model, **options)

        def plain(name: str) -> str:
            return name.replace("_fsdp_wrapped_module.", "")

        def full() -> dict[str, Tensor]:
            with Fsdp1.summon_full_params(module, writeback=False):
                return {plain(name): p.detach().clone() for name, p in module.named_parameters()}

        named = [(plain(name), p) for name, p in module.named_parameters()]
        return Wrapped(module, named, full, {"process_group": sharding_group(module)}, everyone(), ignored)

    return wrap


NORMS = ("norm", "embed")
# that the kernels for accelerators are tried on, in an interpreter that takes its time
FUSED = (("DDP", "elra_adamw"), ("FSDP2", "elra_c2min"), ("FSDP1 FULL_SHARD", "elra_adamw"))
FULL, HYBRID, NO = ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD
GRADIENTS = ShardingStrategy.SHARD_GRAD_OP
SETUPS: dict[str, SetUp] = {
    "DDP": SetUp(2, ddp(), 0),
    "DDP, accumulation": SetUp(2, ddp(), 0, accumulate=2),
    "DDP, bucket views": SetUp(2, ddp(gradient_as_bucket_view=True), 0),
    "DDP, fp16 hook": SetUp(2, ddp(fp16_compress_hook), 0, dtype=torch.float32, tolerance=1e-4, fp16=True),
    "DDP, 4 ranks": SetUp(4, ddp(), 0),
    "FSDP2": SetUp(2, fsdp2(2), 1, ("local",)),
    "FSDP2, accumulation": SetUp(2, fsdp2(2), 1, ("local",), accumulate=2),
    "FSDP2, ignored_params": SetUp(2, fsdp2(2, ignore=NORMS), 1, ("local", "world")),
    "FSDP2, uneven": SetUp(4, fsdp2(4), 1, ("local",)),
    "FSDP2, empty ranks": SetUp(4, fsdp2(4, units=()), 1, ("local",), model=Tiny),
    "HSDP 2x2": SetUp(4, fsdp2(2, 2), 1, ("local",)),
    "HSDP 2x2, ignored_params": SetUp(4, fsdp2(2, 2, ignore=NORMS), 1, ("local", "world")),
    "TP": SetUp(2, tp(), 1, ("local", "world")),
    "TP, sequence parallel": SetUp(2, tp(sequence=True), 1, ("local", "world")),
    "TP, 4 ranks": SetUp(4, tp(), 1, ("local", "world")),
    "FSDP2 + TP 2x2": SetUp(4, fsdp2_tp, 2, ("local", "world")),
    "FSDP1 FULL_SHARD": SetUp(2, fsdp1(FULL, True), 1, ("local",)),
    "FSDP1 FULL_SHARD, flat": SetUp(2, fsdp1(FULL, False), 1, ("local",), single=True),
    "FSDP1 SHARD_GRAD_OP": SetUp(2, fsdp1(GRADIENTS, True), 1, ("local",)),
    "FSDP1 FULL_SHARD, ignored_states": SetUp(2, fsdp1(FULL, True, ignore=NORMS), 1, ("local", "world")),
    "FSDP1 FULL_SHARD, uneven": SetUp(4, fsdp1(FULL, True), 1, ("local",)),
    "FSDP1 FULL_SHARD, flat, uneven": SetUp(4, fsdp1(FULL, False), 1, ("local",), single=True),
    "FSDP1 FULL_SHARD, empty ranks": SetUp(4, fsdp1(FULL, True, units=()), 1, ("local",), model=Tiny),
    "FSDP1 HYBRID_SHARD 2x2": SetUp(4, fsdp1(HYBRID, True), 1, ("local",)),
    "FSDP1 HYBRID_SHARD 2x2, flat": SetUp(4, fsdp1(HYBRID, False), 1, ("local",), single=True),
    "FSDP1 HYBRID_SHARD 2x2, ignored_states": SetUp(4, fsdp1(HYBRID, True, ignore=NORMS), 1, ("local", "world")),
    "FSDP1 NO_SHARD": SetUp(2, fsdp1(NO, True), 0),
    "FSDP1 NO_SHARD, flat": SetUp(2, fsdp1(NO, False), 0, single=True),
}


# ---- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """α after every step, x at the end as one float64 vector, and how many collectives a step issues."""

    alphas: list[float]
    x: Tensor
    collectives: int


Absent = Callable[[int], tuple[str, ...]]


def nothing_absent(step: int) -> tuple[str, ...]:
    return ()


def flatten(full: dict[str, Tensor]) -> Tensor:
    return torch.cat([full[name].reshape(-1).double() for name in sorted(full)])


@contextmanager
def reduction(kind: str) -> Iterator[None]:
    """Replace the sum over ranks by a wrong one: none at all ("local"), or over all ranks ("world"); "checked" leaves it."""

    def wrong(parts: dict[Any, Tensor]) -> Tensor:
        total = torch.stack(list(parts.values())).sum(0)
        if kind == "world":
            dist.all_reduce(total)
        return total

    with nullcontext() if kind == "checked" else mock.patch("elra_hf.optimizer.all_sum", wrong):
        yield


def advance(
    wrapped: Wrapped, optimizer: Any, setup: SetUp, steps: Iterable[int], absent: Absent = nothing_absent
) -> list[float]:
    """Train over ``steps`` as one of several ranks; return α after each. ``absent`` names what has no gradient in a step."""
    which, of = wrapped.data
    alphas = []
    for step in steps:
        x, y = batch(step, setup.model, setup.dtype)
        x, y = x.chunk(of)[which], y.chunk(of)[which]
        micro = list(zip(x.chunk(setup.accumulate), y.chunk(setup.accumulate), strict=True))
        for i, (xs, ys) in enumerate(micro):
            last = i == len(micro) - 1
            if hasattr(wrapped.module, "set_requires_gradient_sync"):
                wrapped.module.set_requires_gradient_sync(last)
            with wrapped.module.no_sync() if isinstance(wrapped.module, Ddp) and not last else nullcontext():
                (nn.functional.mse_loss(wrapped.module(xs), ys) / len(micro)).backward()
        for p in wrapped.unmanaged:
            dist.all_reduce(p.grad)
            p.grad /= of
        for name, p in wrapped.named:
            if name in absent(step):
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        alphas.append(float(optimizer.param_groups[0]["alpha"]))
    return alphas


def train(setup: SetUp, variant: str, kind: str = "right") -> Outcome:
    """``STEPS`` steps as one of several ranks; few with a wrong reduction, which shows at once, or with ``check_sync``."""
    wrapped = setup.wrap(build(setup.model, setup.dtype))
    optimizer = make(variant, wrapped.named, setup.single, check_sync=kind == "checked", **wrapped.options)
    if kind != "right":
        with reduction(kind):
            return Outcome(advance(wrapped, optimizer, setup, range(6)), flatten(wrapped.full()), 0)
    alphas = advance(wrapped, optimizer, setup, range(STEPS))
    return Outcome(alphas, flatten(wrapped.full()), collectives(wrapped, optimizer))


def alone(model: nn.Module) -> Wrapped:
    """Neither wrapped nor cut: one process."""
    named = list(model.named_parameters())
    return Wrapped(model, named, whole(named))


def collectives(wrapped: Wrapped, optimizer: Any) -> int:
    """How many one more step issues, with a gradient of ones."""
    for _, p in wrapped.named:
        p.grad = torch.ones_like(p)
    with CommDebugMode() as counter:
        optimizer.step()
    return counter.get_total_counts()


def train_alone(setup: SetUp, variant: str) -> Outcome:
    """The same on the same global batches, in this process and without torch.distributed."""
    model = build(setup.model, setup.dtype)
    named = list(model.named_parameters())
    optimizer = make(variant, named, setup.single)
    alphas = []
    for step in range(STEPS):
        x, y = batch(step, setup.model, setup.dtype)
        if setup.fp16:
            rounded = []
            for xs, ys in zip(x.chunk(setup.world), y.chunk(setup.world), strict=True):
                grads = torch.autograd.grad(nn.functional.mse_loss(model(xs), ys), list(model.parameters()))
                rounded.append([g.half() / setup.world for g in grads])
            for p, *slices in zip(model.parameters(), *rounded, strict=True):
                p.grad = sum(slices).to(setup.dtype)
        else:
            nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        alphas.append(float(optimizer.param_groups[0]["alpha"]))
    return Outcome(alphas, flatten(whole(named)()), 0)
