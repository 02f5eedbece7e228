"""`Elra`: one step, in the order of the method. gather → measure → reduce → decide → update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .checks import check_number, is_number
from .directions import Direction, Move
from .hands import Hands
from .launches import Launches
from .pieces import SIZES, Bucket, dot, is_captured
from .reduce import Groups as Ranks
from .reduce import all_sum, require_same
from .rules import Rule

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

Scope = Literal["global", "group", "tensor"]
SCOPES: tuple[Scope, ...] = ("global", "group", "tensor")


class Elra(Launches):
    """Gradient descent whose rate adapts itself, from a direction and a rate rule. Source: arXiv 2309.06274.

    x_{t+1} = x_t - η_t d_t with η_t = α_t · share_t. The rule turns the inner products of the gradient with where the run comes
    from into α_t. A scheduler that writes ``group["lr"]`` holds the rate down: share_t is lr over the highest lr of the group
    so far, times the ratio of the group's lr to that of the optimizer. Every group shows the same public state, 0-dim tensors:
    ``group["alpha"]`` (α_t; under scope "tensor" the geometric mean of the group's), ``group["cos"]`` (the cosine the rule
    saw), ``group["restarts"]``, ``group["clamps"]`` (how often α met its bounds) and ``group["effective_lr"]`` (η_t), unless
    the group brings a key of that name. The state itself lies under names that begin with "elra_".

    ``step()`` never waits for an accelerator. It issues no collective unless parameters are sharded; see `reduce`.

    Args:
        params: parameters or parameter groups; groups may set ``lr``, ``weight_decay`` and the direction's hyperparameters.
        direction: along what to move, e.g. ``Momentum()`` or ``Adam()``.
        rule: how the rate follows, e.g. ``C2Min()``, ``P2Min()`` or ``Tracking()``.
        lr: α_0 > 0, a float or a tensor of one number.
        weight_decay: decoupled; x is multiplied by exp(-η·weight_decay), at most by exp(-0.01), which never changes a sign.
        scope: over what the inner products are summed and one rate is kept: "global", "group" or "tensor".
        bounds: (lowest, highest) α; beyond them it is clamped and ``clamps`` counts.
        restart_factor: factor on α at a restart, in (0, 1); less where the gradient has grown by more.
        maximize: ascend.
        stochastic_rounding: round weights and states in bfloat16 up or down by chance, the same on all ranks, so that steps
            below their resolution move them in the mean.
        process_group: the ranks that hold other parts of the parameters, where that cannot be seen from them
            (FSDP1, DeepSpeed ZeRO). Not for DDP, nor for FSDP2 and tensor parallelism, which are recognised.
        check_sync: at every step, compare parameters, gradient and rate over all ranks, and raise where they have come
            apart. Costs one small all-reduce and a wait for the device: for debugging.

    Raises:
        ValueError: an argument or a group's entry is out of range, or the rule needs products the direction lacks.
    """

    def __init__(
        self,
        params: ParamsT,
        direction: Direction,
        rule: Rule,
        *,
        lr: float | Tensor = 1e-5,
        weight_decay: float = 0.0,
        scope: Scope = "global",
        bounds: tuple[float, float] = (1e-30, 1e30),
        restart_factor: float = 1 / 3,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        process_group: dist.ProcessGroup | None = None,
        check_sync: bool = False,
    ) -> None:
        if not rule.needs <= direction.offers:
            raise ValueError(
                f"rule={rule!r} needs the inner products {sorted(rule.needs - direction.offers)}, which "
                f"direction={direction!r} does not measure; it offers {sorted(direction.offers)}"
            )
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is unknown: give one of {', '.join(map(repr, SCOPES))}")
        pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(is_number, bounds))
        if not (pair and 0.0 < bounds[0] < bounds[1] < math.inf):
            raise ValueError(f"bounds={bounds!r} is invalid: give (lowest, highest) with 0 < lowest < highest < inf")
        if scope == "tensor" and process_group is not None:
            raise ValueError(
                'scope="tensor" does not go with process_group=: FSDP1 and DeepSpeed ZeRO cut parameters where they like, '
                'and ranks without a part of one would not know its rate. Take scope="global" or "group", or FSDP2'
            )
        if not (is_number(restart_factor) and 0.0 < restart_factor < 1.0):
            raise ValueError(f"restart_factor={restart_factor!r} is invalid: give a factor in (0, 1), e.g. 1/3")
        if not check_number("lr", lr) > 0.0:
            raise ValueError(
                f"lr={lr!r} is invalid: schedules and groups refer to it, and it must be positive, e.g. 1e-5. "
                "To hold a parameter group still, set lr=0 in that group only"
            )
        self.direction = direction
        self.rule = rule
        self.scope: Scope = scope
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.restart_factor = float(restart_factor)
        self.process_group = process_group
        self.check_sync = check_sync
        # one of the parameters, where whole ones are dealt out over process_group, so that a rank may hold none
        self.dealt: Tensor | None = None
        self._hands = Hands()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **direction.defaults(),
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
        }
        self._all_groups = []
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss; called once, first, with gradients enabled. What it returns is
                handed through and not used, since the loss of one batch says little.
            loss: the loss at x_t, a number equal on all ranks. Optional: with it, steps are undone after which it exploded.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: ``loss`` is not one number.
            RuntimeError: a sparse gradient, slices whose group cannot be known, or a CUDA graph that would not repeat it.
        """
        if loss is not None and not is_number(loss):
            shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"step: loss={shown} is invalid: give one number, as loss.mean()")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        captured = is_captured()
        # slices are written to by those who cut them
        hands = None if torch.compiler.is_compiling() or self.process_group is not None else self._hands
        if hands is None:
            self._hands.forget()
        elif not captured:
            hands.look(params, self.state, self.direction.power)
        ranks = self._ranks(params)
        buckets = self._gather(params, ranks)
        self._require_all(params)
        if buckets or any(ranks) or self.check_sync or self.dealt is not None:
            groups, shares = self._enter(params, buckets)
            programs = self._fused(buckets, ranks) if loss is None else None
            if captured:
                self._require_repeatable(programs is not None)
            if programs is not None:
                self._launch(programs, buckets, shares)
            else:
                self._step(params, buckets, ranks, groups, shares, loss)
            for group in self.param_groups:
                if not self._absent(group):
                    group["elra_calls"] = min(group["elra_calls"] + 1, 2)
        for bucket in buckets:
            if captured:
                self._captured += (bucket.tables.copy(),)
            bucket.clear()
        if hands is not None:
            hands.remember(params)
        return result

    def _step(
        self,
        params: list[Tensor],
        buckets: list[Bucket],
        ranks: list[Ranks],
        groups: dict[str, Tensor],
        shares: Tensor,
        loss: float | Tensor | None,
    ) -> None:
        """Measure, reduce, decide and update."""
        before = self._recall(params, groups)
        parts = self._measure(buckets, ranks, shares, groups)
        total = all_sum(parts)
        verdict = self._decide(total, groups, before, shares, loss)
        if self.check_sync and not self._apart:
            # also of what is whole on every rank, since the sum takes that from one rank only
            seen = torch.stack([total, parts.get((), total)])
            n = len(self._needs)
            # gg; what follows from x_t alone; and products with the state, which may have been loaded on some ranks only
            require_same(seen[..., n + 3 :], seen[..., n], torch.cat([verdict.alpha, seen[..., :n].flatten()]))
        moves = [self._move(bucket, verdict, shares, groups) for bucket in buckets]
        passing = self._update(buckets, moves, ranks, shares, groups)
        if self._passing:
            verdict = verdict._replace(memory={**verdict.memory, **self._noted(all_sum(passing), before)})
        self._publish(params, verdict, self._written(verdict, groups, shares))

    # ---- measure ----------------------------------------------------------------------------------------------------------

    def _measure(
        self, buckets: list[Bucket], ranks: list[Ranks], shares: Tensor, groups: dict[str, Tensor]
    ) -> dict[Ranks, Tensor]:
        """This rank's inner products of each cell, by the groups of ranks that hold the rest of them, shape (cells, columns).

        The columns are `_needs` in a metric in which a group that moves w times as far counts w times; without that ``gg`` of
        all, of what the last step moved where others have rates of their own, and of what may move at all; the sizes of
        newborn tensors (see `SIZES`); and with ``check_sync`` ‖x_t‖².
        """
        needs = self._needs
        parts = self._parts(ranks, shares, len(needs) + 3 + len(SIZES) + self.check_sync)
        for bucket in buckets:
            counts = dict(zip(bucket.counts, bucket.read(*bucket.counts.values()), strict=True))
            products = kernels.measure(self.direction, bucket, counts, needs).to(shares)
            row = self._weigh(bucket, products, bucket.sizes().to(shares), shares, groups)
            if self.check_sync:
                squares = [dot(p.to(bucket.dtype), p.to(bucket.dtype)) for p in bucket.params]
                row = torch.cat([row, torch.stack(squares).sum()[None].to(shares)])
            parts[bucket.ranks][bucket.cell] += row
        return parts

    # ---- update -----------------------------------------------------------------------------------------------------------

    def _update(
        self, buckets: list[Bucket], moves: list[Move], ranks: list[Ranks], shares: Tensor, groups: dict[str, Tensor]
    ) -> dict[Ranks, Tensor]:
        """Take the step, or undo what led to an explosion.

        Returns:
            This rank's products taken in passing, as `_measure` returns those taken before, shape (cells, len(`_passing`)).
        """
        parts = self._parts(ranks, shares, len(self._passing))
        counted: dict[int, tuple[Bucket, Move, dict[str, Any]]] = {}
        for bucket, move in zip(buckets, moves, strict=True):
            given = {name: value for name, value in move._asdict().items() if value is not None}
            values = bucket.read(*bucket.counts.values(), *given.values())
            counts = dict(zip(bucket.counts, values, strict=False))
            move = move._replace(**dict(zip(given, values[len(counts) :], strict=True)))
            if not isinstance(move.taken, float) or move.taken or not move.kept:
                found = kernels.update(self.direction, bucket, counts, move).to(shares)
                parts[bucket.ranks][bucket.cell] += self._note(bucket, found, shares, groups)
            counted[id(bucket.counts["step"])] = bucket, move, counts
        for bucket, move, counts in counted.values():
            for name, value in self.direction.count(bucket.group, counts, move).items():
                bucket.counts[name].copy_(value) if isinstance(value, Tensor) else bucket.counts[name].fill_(value)
        return parts


def rate(optimizer: Any) -> float:
    """Return the rate that the last step applied to the first parameter group, η; 0 where it did not move; before it, ``lr``.

    Works through the wrappers of Accelerate, Lightning, Fabric, DeepSpeed and torch.distributed.optim. Waits for the device:
    for logs, not for loops.

    Raises:
        TypeError: there is no ELRA optimizer inside.
    """
    group = unwrap(optimizer).param_groups[0]
    if not group["elra_calls"]:
        return float(group["lr"])
    return float(group["elra_alpha"]) * float(group["elra_multiplier"])


def unwrap(optimizer: Any) -> Elra:
    """The `Elra` inside the wrappers of Accelerate, Lightning, Fabric, DeepSpeed and torch.distributed.optim.

    Raises:
        TypeError: there is none.
    """
    found = inside(optimizer)
    if found is None:
        raise TypeError(
            f"{type(optimizer).__name__} holds no ELRA optimizer: pass ElraC2Min, ElraP2Min, ElraAdamW or a wrapper of one"
        )
    return found


def inside(optimizer: Any) -> Elra | None:
    """As `unwrap`; None where there is none."""
    found = layers(optimizer)[-1]
    return found if isinstance(found, Elra) else None


def layers(optimizer: Any) -> list[Any]:
    """``optimizer``, what it wraps, and so on to the `Elra`, or to what wraps nothing."""
    found = [optimizer]
    while not isinstance(found[-1], Elra):
        # that of torch's PostLocalSGDOptimizer and ZeroRedundancyOptimizer is called optim
        within = getattr(found[-1], "optimizer", None) or getattr(found[-1], "optim", None)
        if within is None or any(within is each for each in found):
            break
        found.append(within)
    return found
