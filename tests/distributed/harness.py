"""Run one function as several real processes over gloo; where none says anything for long, kill them and print what they said.

``launch("tests.distributed.workers:rows", world=2)`` returns what each rank's call returned. Starting processes costs seconds
(each imports torch), so a launch does many things, and `shared` hands its results to all tests, also across pytest-xdist.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[2]


def run(commands: Sequence[Sequence[str]], timeout: float, env: dict[str, str] | None = None, cwd: Path = ROOT) -> list[str]:
    """Run ``commands`` side by side until all are done; return the output of each.

    Raises:
        AssertionError: one failed, or none printed anything for ``timeout`` seconds: a slow machine is no failure, a hang is.
            All are killed then; shows their output.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{i}.log") for i in range(len(commands))]
        processes = []
        for i, (command, log) in enumerate(zip(commands, logs, strict=True)):
            own = {**environment, "ELRA_TEST_RANK": str(i)}
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(command, cwd=cwd, env=own, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                )
        heard, said = time.monotonic(), 0
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            size = sum(log.stat().st_size for log in logs)
            if size > said:
                heard, said = time.monotonic(), size
            if time.monotonic() > heard + timeout:
                break
            time.sleep(0.05)
        verdict = ["killed" if p.poll() is None else f"exit code {p.returncode}" for p in processes]
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)  # with the children that torchrun and accelerate start
                p.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    if any(p.returncode for p in processes):
        shown = "".join(f"\n---- rank {i}: {v}\n{o[-6000:]}" for i, (v, o) in enumerate(zip(verdict, outputs, strict=True)))
        raise AssertionError(f"ranks failed, or were silent for more than {timeout:g} s{shown}")
    return outputs


def launch(worker: str, world: int, timeout: float = 150.0, **kwargs: Any) -> list[Any]:
    """Call ``worker`` ("module:function") as ``world`` ranks of a process group; return the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((worker, world, kwargs)))
        run([[sys.executable, "-m", "tests.distributed.harness", folder]] * world, timeout)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world)]


def shared_folder(factory: Any) -> Path:
    """A temporary folder that the processes of pytest-xdist have in common; ``factory`` is tmp_path_factory."""
    base = Path(factory.getbasetemp())
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def shared(factory: Any, name: str, **kwargs: Any) -> list[Any]:
    """`launch` once per test session, whichever process of pytest-xdist asks first."""
    path = shared_folder(factory) / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            try:
                outcome: Any = launch(**kwargs)
            except AssertionError as error:
                outcome = str(error)  # the next test need not wait for the time limit again
            path.write_bytes(pickle.dumps(outcome))
    outcome = pickle.loads(path.read_bytes())
    if isinstance(outcome, str):
        raise AssertionError(outcome)
    return outcome


def main() -> None:
    """Be one rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["ELRA_TEST_RANK"])
    worker, world, kwargs = pickle.loads((folder / "call").read_bytes())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")  # for accelerate
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    module, function = worker.split(":")
    result = getattr(importlib.import_module(module), function)(**kwargs)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is done and written; taking the process group apart may make gloo abort


if __name__ == "__main__":
    main()
