"""Cut parameters, gradients and state into flat pieces that fit the cache, and pack small tensors into one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# (entries of a piece that has to be copied, entries of a tensor that is packed with others). On the CPU a piece and its
# temporaries stay in the cache; elsewhere a launch costs more than a copy.
CPU_SIZES = (2**16, 2**12)
DEVICE_SIZES = (2**27, 2**20)
MOST_ON_CPU = 2**20  # bytes of a piece that lies ready, and so of each temporary

SIZES = ("logs", "count", "fans", "entries", "size")  # see `Bucket.sizes`

MOST_OF_SIZES = 2**22  # entries whose size is taken at once: an embedding and its logarithms may not fit the device
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
        lasting: what they keep for as long as the tensors lie where they do.
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
    lasting: dict[str, Any] = field(default_factory=dict)

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

    def read(self, *values: Any) -> list[Any]:
        """0-dim tensors as floats on the CPU, where that waits for nothing, else on the device and in the dtype of the work."""
        device = self.params[0].device
        readable = type(values[-1]) is Tensor and values[-1].device.type == "cpu"  # a tensor of FakeTensorMode has no value
        if readable and device.type == "cpu" and not torch.compiler.is_compiling():
            return [float(value) for value in values]
        return [value.to(device, self.dtype) for value in values]

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic runs in float32 at least: an update in bfloat16 would be rounded three times."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def sizes(self) -> Tensor:
        """How large the weights are, shape (len(`SIZES`),), in the first step; else 0.

        Σ log|x| and the number of its terms, finite entries that are not 0; Σ log(1/√fan-in) and the number of all entries;
        Σ x² of what is finite.
        """
        result = torch.zeros(len(SIZES), dtype=self.dtype, device=self.params[0].device)
        if not self.new:
            return result
        for p, g, fan in zip(self.params, self.grads, self.fans, strict=True):
            small = p.numel() <= MOST_OF_SIZES
            for at in [...] if small else [at for _, at in blocks(p.shape, MOST_OF_SIZES)]:
                x = torch.where(g[at] != 0, p[at], 0.0) if self.padded else p[at]
                x = x.nan_to_num(0.0, 0.0, 0.0)  # what is forbidden by -inf has no size
                used, entries = x != 0, (g[at] != 0).sum() if self.padded else x.new_full((), x.numel(), dtype=torch.int64)
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
            n = p.numel()
            ready = n > small and all(self._ready([p, *(column[i] for column in self.state.values())]))
            if n > size or ready:
                yield from self._cut(i, max(size, MOST_ON_CPU // p.element_size()) if on_cpu and ready else size)
                continue
            if packed and held + n > size:
                yield self._pack(packed)
                packed, held = [], 0
            packed.append(i)
            held += n
        if packed:
            yield self._pack(packed)

    def _ready(self, tensors: list[Tensor]) -> list[bool]:
        """Which tensors can be worked on where they lie."""
        dtype = self.dtype
        return [t.dtype == dtype and t.is_contiguous() for t in tensors]

    def _cut(self, i: int, size: int) -> Iterator[Piece]:
        """One tensor in parts; those that do not lie ready are copied, part by part."""
        tensors = [self.params[i], self.grads[i], *(column[i] for column in self.state.values())]
        dtype, ready = self.dtype, [False] * len(tensors)
        if all(t.is_contiguous() for t in tensors):
            tensors = [t.view(-1) for t in tensors]
            ready = self._ready(tensors)
        for start, at in blocks(tensors[0].shape, size):
            parts = [t[at] for t in tensors]
            p, g, *state = (t if r else t.reshape(-1).to(dtype) for t, r in zip(parts, ready, strict=True))
            copied = [[] if r else [t] for t, r in zip(parts, ready, strict=True)]
            yield self._opened(p, g, state, [copied[0], *copied[2:]], [range(start, start + p.numel())])

    def _pack(self, rows: list[int]) -> Piece:
        """Several tensors, copied one behind the other."""

        def flat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([t.reshape(-1) for t in tensors]).to(self.dtype)

        own = [[column[i] for i in rows] for column in (self.params, *self.state.values())]
        p, *state = map(flat, own)
        g = flat([self.grads[i] for i in rows])
        return self._opened(p, g, state, own, [range(t.numel()) for t in own[0]])

    def _opened(self, p: Tensor, g: Tensor, state: list[Tensor], own: list[list[Tensor]], entries: list[range]) -> Piece:
        return Piece(self, p, -g if self.group["maximize"] else g, dict(zip(self.state, state, strict=True)), own, entries)


def blocks(shape: Sequence[int], size: int) -> Iterator[tuple[int, tuple[int | slice, ...]]]:
    """Cut a tensor into parts of at most ``size`` consecutive entries: the number of the first, and an index."""
    row = math.prod(shape[1:])
    if row <= size:
        step = size // row
        yield from ((i * row, (slice(i, i + step),)) for i in range(0, shape[0], step))
        return
    for i in range(shape[0]):
        yield from ((i * row + start, (i, *at)) for start, at in blocks(shape[1:], size))


@dataclass(frozen=True)
class Piece:
    """Flat tensors of one length in the working dtype: x, descending G and the direction's state.

    Attributes:
        own: for x and each state, the tensors that it was copied from, to be written back; none where it lies in its place.
        entries: the numbers that the entries have in their tensors.
    """

    bucket: Bucket
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    own: list[list[Tensor]]
    entries: list[range]

    def close(self) -> None:
        """Write back what had to be copied. What is in bfloat16 is rounded up or down by chance, right in the mean."""
        chance, seed = self.bucket.group["stochastic_rounding"], self.bucket.counts["step"]
        numbered: Tensor | None = None
        for salt, (worked, own) in enumerate(zip((self.p, *self.state.values()), self.own, strict=True)):
            if not own:
                continue
            if own[0].dtype == torch.bfloat16 and chance:
                if numbered is None:
                    ranges = [torch.arange(r.start, r.stop, device=worked.device) for r in self.entries]
                    numbered = torch.cat(ranges).to(torch.int32)
                worked = rounded(worked, seed, salt, numbered)
            split = worked.split([t.numel() for t in own])  # type: ignore[no-untyped-call]
            parts = [part.view(t.shape) for part, t in zip(split, own, strict=True)]
            if any(map(is_negated, own)):  # torch copies to such in no list
                for t, part in zip(own, parts, strict=True):
                    t.copy_(part)
            else:
                torch._foreach_copy_(own, parts)


# Of the noise that rounds: the same on all ranks, in a run that is resumed, and in every kernel. Source: Fibonacci hashing, and
# the last steps of MurmurHash3.
INFINITE = 0x7F800000  # the bits of ∞ in float32
SPREAD, SEED, SALT, MIX = -1640531535, 668265263, 374761393, (-2048144789, -1028477387)


def noise(entries: int | Tensor, seed: Tensor, salt: int) -> Tensor:
    """Whole numbers below 2^16, as if by chance, from the number of the step; int32.

    Args:
        entries: the numbers of the entries, int32, or how many there are.
        seed: the number of the step, 0-dim.
        salt: which of the tensors of a parameter is meant.
    """
    i = entries if isinstance(entries, Tensor) else torch.arange(entries, dtype=torch.int32, device=seed.device)
    h = (i * SPREAD).add_(seed.to(i.device, torch.int32) * SEED + salt * SALT)
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(MIX[0])
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(MIX[1])
    return h.bitwise_xor_(h >> 16).bitwise_and_(0xFFFF)


def rounded(x: Tensor, seed: Tensor, salt: int, entries: Tensor | None = None) -> Tensor:
    """float32 to bfloat16, up with the probability that makes the mean right; what is not finite stays as it is.

    Args:
        x: flat.
        seed: the number of the step, 0-dim.
        salt: which of the tensors of a parameter it is.
        entries: the numbers of the entries, int32; default: from 0 on.
    """
    chance, bits = noise(x.numel() if entries is None else entries, seed.to(x.device), salt), x.view(torch.int32)
    # the digits that bfloat16 lacks; none where x is not finite or would not stay so. A comparison takes the CPU ten passes
    low = (bits & 0x7FFFFFFF).sub_(INFINITE).add_(chance).bitwise_right_shift_(31).bitwise_and_(0xFFFF)
    return chance.bitwise_and_(low).add_(bits).bitwise_and_(low.bitwise_not_()).view(torch.float32).to(torch.bfloat16)


def is_negated(x: Tensor) -> bool:
    """Whether ``x`` is the negative of what lies in memory, of which torch only takes a note; it cannot trace the question."""
    return not torch.compiler.is_compiling() and x.is_neg()


def is_captured() -> bool:
    """Whether a CUDA graph is recorded, which will repeat what is launched now and nothing else."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of flat or equally shaped tensors, 0-dim; in pieces where there are more than `MOST_OF_DOT` numbers."""
    if a.is_contiguous() and b.is_contiguous():
        if a.dim() != 1:
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
