"""The kernels for the CPU, in C: built once for a machine by its C compiler, without which plain torch does the work."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..directions import PRODUCTS, Adam, Direction, Momentum, Move, Numbers
from ..pieces import PLAIN_TENSORS, Bucket

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-std=c11", "-fPIC", "-shared")
TUNED = ("-march=native", "-mcpu=native", "-O3")  # for this processor, for this one of ARM's as Apple says it, for any
COMPILERS = ("cc", "gcc", "clang")
PIECE = 65536  # as in native.c
OPS: dict[type, tuple[int, int]] = {Adam: (0, 1), Momentum: (2, 3)}  # (to measure, to update)
TYPES = (torch.float32, torch.bfloat16)  # of weights and gradients
WORTH_A_THREAD = 8  # pieces


class Tensors(ctypes.Structure):
    """The tensors of a bucket as native.c sees them."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", "p", "g", "way", "mean", "variance")),
        *((name, ctypes.c_int) for name in ("bf16", "bf16_grads", "bf16_way", "chance")),
        ("seed", ctypes.c_uint32),
    ]


class CNumbers(ctypes.Structure):
    """`Numbers` as native.c sees them."""

    _fields_ = [(n, ctypes.c_float) for n in ("sign", "beta1", "beta2", "eps", "fresh", "first", "rate", "decay", "share")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built in the user's cache folder on first use; None where that cannot be done."""
    compiler = _compiler()
    if not compiler:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # of Path.home(), where a user has none
        log.debug("elra_hf: no kernels for the CPU, plain torch does the work: %s", error)
        return None


def _compiler() -> list[str]:
    """The command of the C compiler, which CC may name with arguments; empty where there is none."""
    try:
        given = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:  # a quote that is not closed
        log.debug("elra_hf: CC is passed over: %s", error)
        given = []
    for command in (given, *([name] for name in COMPILERS)):
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    return []


def _build(compiler: list[str]) -> Path:
    """Compile native.c unless this machine has; a home folder may be shared by machines with other processors."""
    info = Path("/proc/cpuinfo")
    processor = (
        next((x for x in info.read_text().splitlines() if x.startswith(("flags", "Features"))), "") if info.exists() else ""
    )
    key = "\0".join(
        (SOURCE.read_text("utf-8"), *FLAGS, *TUNED, *compiler, platform.platform(), platform.processor(), processor)
    )
    name = f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"

    def compile_to(path: Path) -> None:
        for tuned in TUNED:
            command = [*compiler, *FLAGS, tuned, str(SOURCE), "-o", str(path), "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=120)
            if not done.returncode:
                return
        done.check_returncode()

    return cached(name, compile_to)


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The file of that name in the user's cache folder; what is not there is made, at once, for others may be at it."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "elra_hf"
    path = folder / name
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / name
            make(fresh)
            fresh.replace(path)
    return path


def fits(direction: Direction, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether a kernel is written for the parameter ``p`` with this state: layout and dtypes are those that it knows."""
    dtypes = direction.dtypes(p, group)
    return (
        type(direction) in OPS
        and p.dtype in TYPES
        and all(
            t.dtype == dtypes.get(name, p.dtype) and t.is_contiguous() and type(t) in PLAIN_TENSORS
            for name, t in {"p": p, **state}.items()
        )
    )


def takes(direction: Direction, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether the kernels can work on the parameter ``p`` with this state."""
    return fits(direction, p, state, group) and library() is not None


def measure(direction: Direction, bucket: Bucket) -> Tensor:
    """`PRODUCTS`, of Adam ‖G_t‖² alone and zeros."""
    return _run(OPS[type(direction)][0], bucket, Numbers(*[0.0] * len(Numbers._fields)), 0.0)


def update(direction: Direction, bucket: Bucket, numbers: Numbers, move: Move) -> Tensor:
    """Take a step that neither undoes another nor is refused; `PRODUCTS` where they are taken in passing."""
    found = _run(OPS[type(direction)][1], bucket, numbers, 0.0 if move.decay is None else float(move.decay))
    torch.autograd.graph.increment_version(bucket.params)
    return found if direction.passing else found[:0]


def _run(op: int, bucket: Bucket, numbers: Numbers, decay: float) -> Tensor:
    lib = library()
    assert lib is not None
    dtype = bucket.params[0].dtype
    grad = dtype if all(g.dtype == dtype for g in bucket.grads) else torch.float32
    grads = [g if g.dtype == grad and g.is_contiguous() else g.to(grad).contiguous() for g in bucket.grads]
    sizes = [p.numel() for p in bucket.params]
    pieces = sum(-(-n // PIECE) for n in sizes)
    columns = [
        bucket.params,
        grads,
        bucket.state["way"],
        bucket.state.get("mean") or bucket.state.get("momentum"),
        bucket.state.get("variance"),
    ]
    count = len(sizes)
    arrays = [(ctypes.c_int64 * count)(*sizes)]
    arrays += [(ctypes.c_int64 * count)(*([t.data_ptr() for t in column] if column else ())) for column in columns]
    chance, seed = bucket.group["stochastic_rounding"], int(bucket.counts["step"])
    half = [d == torch.bfloat16 for d in (dtype, grad, bucket.state["way"][0].dtype)]
    tensors = Tensors(count, *map(ctypes.addressof, arrays), *half, chance, seed)
    sign = -1.0 if bucket.group["maximize"] else 1.0
    c = CNumbers(sign, *map(float, numbers[:6]), decay, float(numbers.share))
    sums = torch.zeros(pieces, len(PRODUCTS), dtype=torch.float64, device="cpu")  # whatever the default device is
    out = ctypes.c_void_p(sums.data_ptr())

    def work(begin: int, end: int) -> Any:
        return lib.run(op, ctypes.byref(tensors), ctypes.byref(c), ctypes.c_int64(begin), ctypes.c_int64(end), out)

    threads = min(torch.get_num_threads(), pieces // WORTH_A_THREAD)
    if threads < 2:
        work(0, pieces)
    else:
        edges = [pieces * i // threads for i in range(threads + 1)]
        list(_pool(threads, os.getpid()).map(work, edges[:-1], edges[1:]))
    return sums.sum(0)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="elra_hf")
