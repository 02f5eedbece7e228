"""A real Trainer run that is killed at random moments and resumed: it must end as if nothing had happened, digit for digit."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from elra_hf.optimizer import unwrap

STEPS, SAVE = 30, 3
PATIENCE = 60.0  # seconds after which a rank that has lost the other one counts as hung


class Note(TrainerCallback):
    """Writes α and the rate of each step, and every loss, in full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, optimizer=None, **_) -> None:
        if "loss" in logs and state.is_world_process_zero:
            group = unwrap(optimizer).param_groups[0]
            numbers = [float(logs["loss"]), float(group["alpha"]), float(group["effective_lr"]), float(group["restarts"])]
            with self.path.open("a") as file:
                file.write(json.dumps([state.global_step, *(number.hex() for number in numbers)]) + "\n")


def whole(checkpoint: Path) -> bool:
    """Whether everything in a checkpoint was written to its end; the Trainer writes trainer_state.json last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "model.safetensors")
        for path in checkpoint.glob("*.pt*"):
            torch.load(path, weights_only=path.name.startswith(("optimizer", "scheduler")))
    except Exception:
        return False
    return True


def job(folder: Path, optim: str) -> None:
    """Train on from the last checkpoint that is whole."""
    from tests.transformers.jobs import run

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    last = [path for path in found if whole(path) and all((path / name).exists() for name in names)][-1:]
    options = {"ddp_backend": "gloo", "ddp_timeout": 15} if ranks > 1 else {}
    run(
        folder,
        optim,
        resume=str(last[0]) if last else None,
        callbacks=[Note(folder / "notes")],
        max_steps=STEPS,
        per_device_train_batch_size=8 // ranks,
        save_strategy="steps",
        save_steps=SAVE,
        **options,
    )


def start(folder: Path, optim: str, ranks: int) -> list[int]:
    """Fork the ranks of a job, which saves them the imports."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(os.open(folder / f"errors{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                job(folder, optim)
                status = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def end(pids: list[int], limit: float) -> list[int | None]:
    """The statuses of all, or None for one that still runs after ``limit`` seconds."""
    until, statuses = time.monotonic() + limit, dict.fromkeys(pids)
    while time.monotonic() < until and None in statuses.values():
        for pid in (each for each, status in statuses.items() if status is None):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return list(statuses.values())


def notes(folder: Path) -> dict[int, list[str]]:
    """What was noted last of each step; a line that a kill cut off is none."""
    seen = {}
    for line in (folder / "notes").read_text().splitlines():
        try:
            step, *numbers = json.loads(line)
        except ValueError:
            continue
        seen[step] = numbers
    return seen


def soak(
    folder: Path, kills: int, ranks: int, seed: int = 0, optims: tuple[str, ...] = ("elra_c2min", "elra_p2min", "elra_adamw")
):
    """Kill ``kills`` times; return how many runs were brought to their end.

    Raises:
        AssertionError: a run ended otherwise than the one that was left alone, or the rank that was left hung.
    """
    chance, done, killed = random.Random(seed), 0, 0
    straight = {}
    while killed < kills:
        optim = optims[done % len(optims)]
        if optim not in straight:
            begun = time.monotonic()
            assert end(start(folder / f"straight-{optim}", optim, ranks), 300.0) == [0] * ranks
            straight[optim] = notes(folder / f"straight-{optim}"), time.monotonic() - begun
        expected, lasts = straight[optim]
        cut = folder / f"cut-{done}"
        while True:
            pids = start(cut, optim, ranks)
            early = end(pids, chance.uniform(0.05, 1.1) * lasts if killed < kills else 300.0)
            if None not in early:
                assert early == [0] * ranks, (cut / "errors0").read_text()[-2000:]
                break
            victim = chance.randrange(ranks)
            if early[victim] is None:
                os.kill(pids[victim], signal.SIGKILL)
                killed += 1
            left = end([pid for pid, status in zip(pids, early, strict=True) if status is None], PATIENCE)
            for pid, status in zip(pids, left, strict=False):
                if status is None:
                    os.kill(pid, signal.SIGKILL)
            assert None not in left, f"a rank hung for {PATIENCE:g} s after the other one was killed"
        assert notes(cut) == expected, f"{optim}, {ranks} ranks, seed {seed}, run {done}: not as the run that was left alone"
        assert sorted(expected) == list(range(1, STEPS + 1))
        done += 1
    return done
