"""Cut parameters, gradients and state into flat pieces that fit the cache, and pack small tensors into one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# (entries of a piece, entries of a tensor that is packed with others). On the CPU a piece and its temporaries stay in the
# cache; elsewhere a launch costs more than a copy.
CPU_SIZES = (2**16, 2**12)
DEVICE_SIZES = (2**27, 2**20)

SIZES = ("logs", "count", "fans", "entries", "size")  # see `Bucket.sizes`

MOST_OF_DOT = 2**30  # numbers that torch.dot is given at once; on CUDA it refuses 2**31

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # no subclass, whose memory may be something else

Scalar = float | Tensor  # a float on the CPU, a 0-dim tensor where reading it would wait for the device


@dataclass(frozen=True)
class Bucket:
    """Tensors of one group, dtype, device, age and sharding. All lists are parallel; tensors are real and local.

    Attributes:
        index: position of the parameter group.
        cell: which rate is theirs.
        group: the parameter group, for hyperparameters (``betas``, ``eps``).
        counts: numbers that all tensors of one age share, by name: ``step``, the gradients taken in so far, and what else the
            direction counts; 0-dim float32 on the bucket's device.
        ranks: the groups of ranks that hold the rest of them.
        idle: the tensors had no gradient in the last step, so it did not move them.
        new: this is their first step, or of slices one of their first two, of which one may have no gradient.
        padded: slices of FSDP1 or ZeRO, which may hold anything where there is no gradient.
        kernels: which can work on them, see `kernels.choose`.
        state: the direction's tensors by name.
        params: x_t.
        grads: G_t as autograd left it.
        fans: fan-in of each, 1 for vectors.
        tables: what kernels keep from the measurement for the update.
    """

    index: int
    cell: int
    group: dict[str, Any]
    counts: dict[str, Tensor]
    ranks: tuple[Any, ...]
    idle: bool
    new: bool
    padded: bool
    kernels: str
    state: dict[str, list[Tensor]]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    fans: list[int] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)

    def add(self, p: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put a parameter in."""
        self.params.append(p)
        self.grads.append(grad)
        for name, tensors in self.state.items():
            tensors.append(state[name])

    def clear(self) -> None:
        """Let go of all tensors, for a wrapper may want their memory between the steps."""
        for tensors in (self.params, self.grads, *self.state.values()):
            tensors.clear()
        self.tables.clear()

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic runs in float32 at least: an update in bfloat16 would be rounded three times."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def sizes(self) -> Tensor:
        """How large the weights are, shape (len(`SIZES`),), in the first step; else 0.

        Σ log|x| and the number of its terms, entries that are not 0; Σ log(1/√fan-in) and the number of all entries; Σ x².
        """
        result = torch.zeros(len(SIZES), dtype=self.dtype, device=self.params[0].device)
        if not self.new:
            return result
        for p, g, fan in zip(self.params, self.grads, self.fans, strict=True):
            x = torch.where(g != 0, p, 0.0) if self.padded else p
            used, entries = x != 0, (g != 0).sum() if self.padded else x.new_ones((), dtype=torch.int64) * x.numel()
            logs = torch.where(used, x.abs().to(self.dtype), 1.0).log().sum()
            fans = -0.5 * math.log(fan) * entries.to(self.dtype)  # a whole number would become one of the default dtype
            numbers = (logs, used.sum(), fans, entries, x.to(self.dtype).square().sum())
            result += torch.stack([number.to(self.dtype) for number in numbers])
        return result

    def pieces(self) -> Iterator[Piece]:
        """The tensors as flat pieces in the working dtype, small ones packed, large ones cut."""
        on_cpu = self.params[0].device.type == "cpu"
        size, small = CPU_SIZES if on_cpu else DEVICE_SIZES
        packed: list[int] = []
        held = 0
        for i, p in enumerate(self.params):
            if p.numel() > small and self._direct(i):
                yield from self._cut(i, size)
                continue
            if packed and held + p.numel() > size:
                yield self._pack(packed)
                packed, held = [], 0
            packed.append(i)
            held += p.numel()
        if packed:
            yield self._pack(packed)

    def _direct(self, i: int) -> bool:
        """Whether tensor ``i`` can be worked on where it lies."""
        own = (self.params[i], *(tensors[i] for tensors in self.state.values()))
        return all(t.dtype == self.dtype and t.is_contiguous() for t in own)

    def _cut(self, i: int, size: int) -> Iterator[Piece]:
        p, g = self.params[i].view(-1), self.grads[i].reshape(-1).to(self.dtype)
        state = {name: tensors[i].view(-1) for name, tensors in self.state.items()}
        for start in range(0, p.numel(), size):
            part = slice(start, start + size)
            yield self._opened(p[part], g[part], {name: t[part] for name, t in state.items()}, [])

    def _pack(self, rows: list[int]) -> Piece:
        def flat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensors[i].reshape(-1) for i in rows]).to(self.dtype)

        return self._opened(
            flat(self.params), flat(self.grads), {name: flat(tensors) for name, tensors in self.state.items()}, rows
        )

    def _opened(self, p: Tensor, g: Tensor, state: dict[str, Tensor], rows: list[int]) -> Piece:
        return Piece(self, p, -g if self.group["maximize"] else g, state, rows)


@dataclass(frozen=True)
class Piece:
    """Flat tensors of one length in the working dtype: x, descending G and the direction's state."""

    bucket: Bucket
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    rows: list[int]

    def close(self) -> None:
        """Write back what had to be copied. What is in bfloat16 is rounded up or down by chance, right in the mean."""
        if not self.rows:
            return
        worked = {"": self.p, **self.state}
        chance, seed = self.bucket.group["stochastic_rounding"], self.bucket.counts["step"]
        for salt, (name, tensor) in enumerate(worked.items()):
            own = [(self.bucket.state[name] if name else self.bucket.params)[i] for i in self.rows]
            if own[0].dtype == torch.bfloat16 and chance:
                tensor = rounded(tensor, seed, salt)
            parts = tensor.split([t.numel() for t in own])  # type: ignore[no-untyped-call]
            torch._foreach_copy_(own, [part.view(t.shape) for part, t in zip(parts, own, strict=True)])


# Of the noise that rounds: the same on all ranks, in a run that is resumed, and in every kernel. Source: Fibonacci hashing, and
# the last steps of MurmurHash3.
SPREAD, SEED, SALT, MIX = -1640531535, 668265263, 374761393, (-2048144789, -1028477387)


def noise(count: int, seed: Tensor, salt: int) -> Tensor:
    """``count`` whole numbers below 2^16, as if by chance, from the number of the step; shape (count,), int32."""
    i = torch.arange(count, dtype=torch.int32, device=seed.device)
    h = i * SPREAD + (seed.to(torch.int32) * SEED + salt * SALT)
    h = (h ^ ((h >> 16) & 0xFFFF)) * MIX[0]
    h = (h ^ ((h >> 13) & 0x7FFFF)) * MIX[1]
    return (h ^ (h >> 16)) & 0xFFFF


def rounded(x: Tensor, seed: Tensor, salt: int) -> Tensor:
    """float32 to bfloat16, up with the probability that makes the mean right; what is not finite stays as it is."""
    up = ((x.view(torch.int32) + noise(x.numel(), seed.to(x.device), salt)) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x) & torch.isfinite(up), up, x).to(torch.bfloat16)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of flat or equally shaped tensors, 0-dim; in pieces where there are more than `MOST_OF_DOT` numbers."""
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
        if a.numel() <= MOST_OF_DOT:
            return torch.dot(a, b)
        pairs = zip(a.split(MOST_OF_DOT), b.split(MOST_OF_DOT), strict=True)  # type: ignore[no-untyped-call]
        return torch.stack([torch.dot(x, y) for x, y in pairs]).sum().to(a.dtype)
    return (a * b).sum()


def add_scaled(y: Tensor, x: Tensor, a: Scalar) -> None:
    """Y += a·x, in one pass."""
    if isinstance(a, float):
        y.add_(x, alpha=a)
    else:
        y.addcmul_(x, a)
