"""What a step costs next to torch's fused AdamW's: time, extra memory, launches, state; on the CPU or on CUDA.

Each optimizer takes turns with fused AdamW in one process, step by step, so that what else the machine does hits both; a ratio
is the median over the turns. Writes FOLDER/speed-CARD.jsonl, a row as soon as it is measured, and a table beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min

from .cells import markdown
from .run import OWN_VERSION, RESULTS, state_bytes

Shapes = list[tuple[int, ...]]
Make = Callable[[list[Tensor]], Optimizer]

BASELINE = "AdamW fused"
OPTIMIZERS: dict[str, Make] = {
    BASELINE: lambda params: AdamW(params, lr=1e-5, fused=True),
    "AdamW foreach": lambda params: AdamW(params, lr=1e-5, foreach=True),
    "ElraC2Min": ElraC2Min,
    "ElraP2Min, betas 0": lambda params: ElraP2Min(params, betas=(0.0, 0.0)),
    "ElraP2Min": ElraP2Min,
    "ElraAdamW": ElraAdamW,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUSY = 10_000_000  # clock cycles of a GPU, some 5 ms
COPIES = 12  # of the weights, at most: two sets of weights, gradients, two states, temporaries


def gpt2() -> Shapes:
    """GPT-2 small: 124 M parameters, 148 tensors."""
    layer = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def minilm() -> Shapes:
    """all-MiniLM-L6-v2: 22.7 M parameters, 103 tensors."""
    attention = [(384, 384), (384,)] * 4 + [(384,), (384,)]
    mlp = [(1536, 384), (1536,), (384, 1536), (384,), (384,), (384,)]
    return [(30522, 384), (512, 384), (2, 384), (384,), (384,), *(attention + mlp) * 6, (384, 384), (384,)]


def llama() -> Shapes:
    """TinyLlama: 1.1 G parameters, 201 tensors."""
    attention = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048)]
    layer = [*attention, (5632, 2048), (5632, 2048), (2048, 5632), (2048,), (2048,)]
    return [(32000, 2048), *layer * 22, (2048,), (32000, 2048)]


NETS: dict[str, Shapes] = {
    "20 M": [(400, 512)] * 100,
    "tiny": [(16, 16)] * 200,
    "MiniLM": minilm(),
    "GPT-2 small": gpt2(),
    "1.1 G": llama(),
}
QUICK = ("20 M", "tiny")


def card(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def free_memory(device: torch.device) -> int:
    """Bytes that may be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- one step --------------------------------------------------------------------------------------------------------------


class Contestant:
    """An optimizer with weights of its own; gradients are shared."""

    def __init__(self, make: Make, shapes: Shapes, dtype: torch.dtype, device: torch.device, gradients: list[Tensor]) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params = [torch.randn(s, generator=generator, dtype=dtype, device=device).mul_(0.02) for s in shapes]
        for p, g in zip(self.params, gradients, strict=True):
            p.requires_grad_(True).grad = g
        self.optimizer = make(self.params)
        self.device = device

    def step(self) -> tuple[float, float]:
        """Milliseconds of the host and of the device; on the CPU the two are one.

        The device is kept busy until the step is queued, as it is in training, so that its time is not that of the host.
        """
        if self.device.type != "cuda":
            before = time.perf_counter()
            self.optimizer.step()
            host = 1e3 * (time.perf_counter() - before)
            return host, host
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(BUSY)
        begin.record()
        before = time.perf_counter()
        self.optimizer.step()
        host = 1e3 * (time.perf_counter() - before)
        end.record()
        torch.cuda.synchronize(self.device)
        return host, begin.elapsed_time(end)


class Launches(TorchDispatchMode):
    """Counts the operations that reach a backend; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def memory(step: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    """Bytes that a step holds for a while beyond what it began with, and its largest allocation (CPU only)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return peak, largest


def kernels(step: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that a step launches on the GPU; None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


# ---- many steps ------------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile, with four digits."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [float(f"{value:.4g}") for value in found]


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least ``fewest`` turns, then until ``seconds`` or ``most`` are reached."""

    seconds: float = 8.0
    fewest: int = 5
    most: int = 100


def compare(name: str, shapes: Shapes, dtype: torch.dtype, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Let an optimizer and the baseline take turns."""
    generator = torch.Generator(device).manual_seed(1)
    gradients = [torch.randn(s, generator=generator, dtype=dtype, device=device).mul_(1e-3) for s in shapes]
    base, other = (Contestant(OPTIMIZERS[n], shapes, dtype, device, gradients) for n in (BASELINE, name))
    turns: list[tuple[float, ...]] = []
    began = time.perf_counter()
    for turn in range(4 + effort.most):
        if turn % 2:  # every second step turns back: ones that always agree would drive a rate to its bound
            torch._foreach_neg_(gradients)
        first, second = (base, other) if turn % 4 < 2 else (other, base)
        times = {id(c): c.step() for c in (first, second)}
        if turn == 3:  # warm
            turns.clear()
            began = time.perf_counter()
        else:
            turns.append((*times[id(base)], *times[id(other)]))
        if len(turns) >= effort.fewest and turn > 3 and time.perf_counter() - began > effort.seconds:
            break
    base_host, base_device, host, on_device = (list(column) for column in zip(*turns, strict=True))
    extra, largest = memory(other.optimizer.step, device)
    launched = kernels(other.optimizer.step, device)
    with Launches() as launches:
        other.optimizer.step()
    count = sum(math.prod(shape) for shape in shapes)
    return {
        "turns": len(turns),
        "ratio": quartiles([b / a for a, b in zip(base_device, on_device, strict=True)]),
        "device_ms": quartiles(on_device),
        "host_ms": quartiles(host),
        "baseline_device_ms": quartiles(base_device),
        "baseline_host_ms": quartiles(base_host),
        "extra_bytes": extra,
        "largest_bytes": largest,
        "operations": launches.count,
        "kernels": launched,
        "state_bytes_per_parameter": round(state_bytes(other.optimizer) / count, 3),
    }


def measure(
    nets: Sequence[str], dtypes: Sequence[str], names: Sequence[str], device: torch.device, effort: Effort
) -> Iterator[dict[str, Any]]:
    """A row for each; one that does not fit into memory says so."""
    about = {
        "card": card(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "elra_hf": OWN_VERSION,
    }
    for net in nets:
        shapes = NETS[net]
        count = sum(math.prod(shape) for shape in shapes)
        for dtype in dtypes:
            for name in names:
                row = {**about, "net": net, "tensors": len(shapes), "parameters": count, "dtype": dtype, "optimizer": name}
                needed = COPIES * count * DTYPES[dtype].itemsize
                if needed > free_memory(device):
                    yield {**row, "error": f"needs up to {needed / 2**30:.0f} GiB, free are {free_memory(device) / 2**30:.0f}"}
                    continue
                try:
                    yield {**row, **compare(name, shapes, DTYPES[dtype], device, effort)}
                except Exception as error:  # a row, too: the others go on
                    yield {**row, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for readers."""

    def spread(values: Sequence[float], digits: int = 3) -> str:
        low, middle, high = (f"{value:.{digits}g}" for value in values)
        return f"{middle} ({low} … {high})"

    def mib(value: int | None) -> str:
        return "" if value is None else f"{value / 2**20:.3g}"

    first = rows[0]
    lines = []
    for row in rows:
        net = f"{row['net']}, {row['tensors']} tensors, {row['dtype']}"
        if "error" in row:
            lines.append([net, row["optimizer"], row["error"], *[""] * 7])
            continue
        launched = "" if row["kernels"] is None else str(row["kernels"])
        lines.append(
            [net, row["optimizer"], spread(row["ratio"]), f"{row['device_ms'][1]:.3g}", f"{row['host_ms'][1]:.3g}",
             mib(row["extra_bytes"]), mib(row["largest_bytes"]), str(row["operations"]), launched,
             f"{row['state_bytes_per_parameter']:g}"]
        )  # fmt: skip
    header = ["weights", "optimizer", "× fused AdamW (quartiles)", "device ms", "host ms", "extra MiB", "largest MiB"]
    header += ["operations", "kernels", "state bytes per parameter"]
    return (
        f"# A step on {first['card']}\n\n"
        f"torch {first['torch']}, elra_hf {first['elra_hf']}, {first['threads']} threads. Written by "
        "`python -m recipes.benchmarks speed`: each optimizer takes turns with fused AdamW, medians over the turns; the ratio "
        "is that of the device's times, on a GPU with a queue that is full, as in training. Extra: the most that a step holds "
        "beyond what it began with; largest: its largest allocation; operations: calls that reach a backend.\n\n"
        + markdown(header, lines)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.benchmarks speed", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"a minute: {' and '.join(QUICK)}, fp32")
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), help="whose shapes; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="of weights and gradients; default: all")
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=[*OPTIMIZERS], help="whose steps")
    parser.add_argument("--seconds", type=float, help="to measure each for; default: 8, with --quick 2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the rows and the table go")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    path = args.folder / f"speed-{slug(card(device))}{'-quick' if args.quick else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    nets, dtypes = args.nets or (QUICK if args.quick else [*NETS]), args.dtypes or (["fp32"] if args.quick else [*DTYPES])
    effort = Effort(seconds=args.seconds if args.seconds is not None else 2.0 if args.quick else Effort.seconds)
    rows = []
    with path.open("w") as file:
        for row in measure(nets, dtypes, args.optimizers, device, effort):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            told = row.get("error") or f"{row['ratio'][1]:.3g} × fused AdamW"
            print(f"{row['net']}, {row['dtype']}, {row['optimizer']}: {told}", flush=True)
    path.with_suffix(".md").write_text(table(rows))
    print(f"{len(rows)} rows in {path}, their table in {path.with_suffix('.md')}")
