"""The first phase of a step: which ranks hold what, and parameters with a gradient sorted into buckets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .checkpoints import Checkpoints
from .groups import is_wide
from .pieces import PLAIN_TENSORS, Bucket, is_negated
from .reduce import Groups as Ranks
from .reduce import gradient, groups_of, is_bare, local


def real(tensor: Tensor) -> Tensor:
    """The local part of ``tensor``, complex numbers as pairs of real ones; shares its memory."""
    tensor = local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def slope(p: Tensor) -> Tensor:
    """The local part of the gradient of ``p``, its numbers as they are, since kernels look past what torch only notes of them.

    Autograd leaves the conjugate of complex numbers, and the negative of their imaginary parts, as a note beside the memory.
    """
    return local(gradient(p)).resolve_conj().resolve_neg()


Order = list[int] | None
Target = tuple[Bucket, Order]  # of a parameter that has a gradient


def order_of(p: Tensor, grad: Tensor) -> Order:
    """The dimensions in the order in which both lie in memory; None where that is their own, or where they do not lie alike.

    So weights in ``channels_last`` and transposed ones are worked on where they lie, like all others.
    """
    if p.is_contiguous():
        return None
    order = sorted(range(p.ndim), key=lambda d: (p.stride(d), p.shape[d]), reverse=True)
    return order if all(tensor.permute(order).is_contiguous() for tensor in (p, grad)) else None


def lying(tensor: Tensor, order: Order) -> Tensor:
    """The local part of ``tensor`` with its dimensions in that order; shares its memory."""
    tensor = real(tensor)
    return tensor if order is None else tensor.permute(order)


class Plan(NamedTuple):
    """How the last step sorted its parameters. It holds none of them, and no state: others may have moved those away.

    Attributes:
        seen: what that follows from.
        buckets: the buckets, emptied.
        members: of each bucket, the positions of its parameters and of their states, and the order of their dimensions.
        plain: all of them are worked on as they are.
    """

    seen: list[Any]
    buckets: list[Bucket]
    members: list[list[tuple[int, int, Order]]]
    plain: bool


class Gatherer(Checkpoints):
    """What `Elra` gathers before it measures."""

    check_sync: bool
    dealt: Tensor | None
    _plan: Plan | None = None

    @property
    def _apart(self) -> bool:
        """Whether each rank alone knows the rates of its parameters."""
        return self.dealt is not None and self.scope == "tensor"

    def _ranks(self, params: list[Tensor]) -> list[Ranks]:
        """The groups of ranks that hold the rest of each parameter, or of all of them where they are dealt out."""
        if self.dealt is None:
            return groups_of(params, self.process_group)
        alone = self._apart or dist.get_world_size(self.process_group) == 1
        others: Ranks = () if alone or self.process_group is None else (self.process_group,)
        return [others] * max(len(params), 1)  # a rank without parameters enters the sum, too

    def _gather(self, params: list[Tensor], ranks: list[Ranks]) -> list[Bucket]:
        """Sort the parameters that have a gradient into buckets, as in the last step if all is as it was."""
        grads, plan = [p.grad for p in params], self._plan
        seen = self._look(params, grads, ranks)
        if plan is not None and seen == plan.seen:
            self._fill(plan, params, grads)
            return plan.buckets
        idle = [group["elra_idle"] for group in self.param_groups]
        buckets, targets = self._sort(ranks)
        lasting = not any(bucket.new for bucket in buckets) and idle == [group["elra_idle"] for group in self.param_groups]
        seen = self._look(params, grads, ranks)
        self._plan = self._planned(seen, params, buckets, targets) if lasting and seen is not None else None
        return buckets

    def _planned(self, seen: list[Any], params: list[Tensor], buckets: list[Bucket], targets: list[Target]) -> Plan | None:
        """What to do in the next step, if that looks alike; None where a look does not tell that."""
        states = self.state.values()
        tensors = [*map(local, params), *(local(tensor) for state in states for tensor in state.values())]
        if not {*PLAIN_TENSORS}.issuperset(map(type, tensors)) or any(map(torch.is_complex, tensors)):
            return None
        places = {id(p): k for k, p in enumerate(self.state)}
        members: dict[int, list[tuple[int, int, Order]]] = {id(bucket): [] for bucket in buckets}
        having = [i for i, p in enumerate(params) if p.grad is not None]
        for i, (bucket, order) in zip(having, targets, strict=True):
            members[id(bucket)].append((i, places[id(params[i])], order))
        plain = all(type(params[i]) in PLAIN_TENSORS and order is None for i, (_, order) in zip(having, targets, strict=True))
        return Plan(seen, buckets, [*members.values()], plain)

    def _fill(self, plan: Plan, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Put parameters, gradients and states into their buckets."""
        states = [*self.state.values()]
        for bucket, members in zip(plan.buckets, plan.members, strict=True):
            bucket.clear()
            if not plan.plain:
                for i, k, order in members:
                    tensors = {name: lying(states[k][name], order) for name in bucket.state}
                    bucket.add(lying(params[i], order), lying(slope(params[i]), order), tensors)
                continue
            bucket.params.extend([params[i] for i, *_ in members])
            found = [grad for i, *_ in members if (grad := grads[i]) is not None]
            bucket.grads.extend([grad.resolve_neg() if grad.is_neg() else grad for grad in found])
            for name, column in bucket.state.items():
                column.extend([states[k][name] for _, k, _ in members])

    def _look(self, params: list[Tensor], grads: list[Tensor | None], ranks: list[Ranks]) -> list[Any] | None:
        """What the sorting follows from; None where that cannot be told by a look.

        Tensors by their identity, layout and place, since wrappers put others there or move them. In flat lists, since each
        step makes them.
        """
        if torch.compiler.is_compiling() or self.scope == "tensor":
            return None
        if any(grad is not None and grad.is_sparse for grad in grads):
            return None
        # a direction with a beta of 0 may keep less
        betas = [[beta == 0 for beta in group.get("betas", ())] for group in self.param_groups]
        groups = [(id(g), g["elra_idle"], g["elra_calls"], len(g["params"])) for g in self.param_groups]
        try:
            xs, kept = params, [tensor for state in self.state.values() for tensor in state.values()]
            if not {*PLAIN_TENSORS}.issuperset(map(type, params)):
                xs, kept = [local(p) for p in params], [local(tensor) for tensor in kept]
            places = [tensor.data_ptr() for tensor in (*xs, *kept)]
        except (AttributeError, RuntimeError):  # no state of a parameter, no tensor, or one without memory
            return None
        return [
            (self.scope, ranks, groups, betas),
            [grad is None for grad in grads],
            [x.dtype for x in (*xs, *kept)],
            [x.shape for x in xs],
            [x.stride() for x in xs],
            [*map(id, params), *map(id, self.state), *map(id, kept)],
            places,
        ]

    def _sort(self, ranks: list[Ranks]) -> tuple[list[Bucket], list[Target]]:
        """Buckets, and that of each parameter that has a gradient; creates the state of new ones."""
        buckets: dict[tuple[Any, ...], Bucket] = {}
        targets: list[Target] = []
        newborn: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._raise_counters()
        member = -1
        for index, group in enumerate(self.param_groups):
            # a string, since distributed checkpoints take lists apart and expect the same length when they load
            idle = {int(position) for position in group["elra_idle"].split()}
            absent = []
            for position, p in enumerate(group["params"]):
                member += 1
                if p.grad is None:
                    if local(p).numel():  # FSDP1 gives no gradient to the ranks that hold nothing of a parameter
                        absent.append(str(position))
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter of shape {tuple(p.shape)}): "
                        "build the embedding with sparse=False"
                    )
                state = self.state[p]
                if not state:
                    self._give_birth(p, group, newborn, self._peers(index, member, p))
                self._raise_state(p, group)
                grad = slope(p)
                order = order_of(real(p), real(grad))
                x, tensors = lying(p, order), {name: lying(state[name], order) for name in self.direction.dtypes(p, group)}
                chosen = "plain" if is_negated(x) else kernels.choose(self.direction, x, tensors, group)
                key = (
                    (member,)
                    if self.scope == "tensor"
                    else (index, p.device, p.dtype, id(state["step"]), position in idle, ranks[member], chosen)
                )
                if key not in buckets:
                    # a mean of logarithms bears no numbers by chance; one of squares hardly changes
                    padded = self.process_group is not None and self.dealt is None and self.direction.relative
                    # or of a first step that failed
                    young = any(state["step"] is fresh["step"] for fresh in newborn.values()) or not group["elra_calls"]
                    buckets[key] = Bucket(
                        index=index,
                        cell=self._cell(index, member),
                        group=group,
                        counts={name: state[name] for name in self.direction.counters},
                        ranks=ranks[member],
                        idle=position in idle,
                        new=young or (padded and group["elra_calls"] < 2),
                        padded=padded,
                        kernels=chosen,
                        state={name: [] for name in tensors},
                    )
                bucket = buckets[key]
                targets.append((bucket, order))
                bucket.add(x, lying(grad, order), tensors)
                bucket.fans.append(p.numel() // p.shape[0] if p.ndim > 1 and p.numel() else 1)
            group["elra_idle"] = " ".join(absent)
        return list(buckets.values()), targets

    def _give_birth(
        self, p: Tensor, group: dict[str, Any], newborn: dict[tuple[Any, ...], dict[str, Tensor]], peers: tuple[Any, ...]
    ) -> None:
        """Create the state of a parameter; peers of one step share their counters."""
        state = self.state[p]
        dtype = torch.float64 if is_wide(p) else torch.float32
        fresh = {name: torch.zeros((), dtype=dtype, device=p.device) for name in self.direction.counters}
        state.update(newborn.setdefault(peers, fresh))
        if self.scope == "tensor":
            alpha: Tensor = group["elra_alpha"]
            # what it knows is its own
            state["elra"] = torch.stack([alpha, *(alpha.new_full((), value) for value in self._cell_names.values())])
        for name, dtype in self.direction.dtypes(p, group).items():
            state[name] = torch.zeros_like(p, dtype=dtype)

    def _require_all(self, params: list[Tensor]) -> None:
        """Refuse to share a rate between parameters that never meet in one step."""
        if self.scope == "global" and len(self.state) > len(params) and any(map(is_bare, params)):
            raise RuntimeError(
                f"step() sees {len(params)} of {len(self.state)} parameters: DeepSpeed ZeRO steps each parameter group by "
                "itself, and ZeRO-3 pieces of sub_group_size numbers, so that they cannot share a rate. Give the optimizer one "
                'parameter group, or scope="group" for a rate each; with ZeRO-3 also '
                "process_group=elra_hf.adapters.deepspeed.sharding_group(model, config), which checks sub_group_size. "
                "If you have taken parameters out of the optimizer yourself, del optimizer.state[parameter] of each"
            )

    def _cell(self, group: int, member: int) -> int:
        """Where the rate of a parameter stands in the vector of rates, under the scope."""
        return {"global": 0, "group": group, "tensor": member}[self.scope]
