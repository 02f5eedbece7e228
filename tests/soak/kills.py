"""A real Trainer run that is killed at random moments and resumed: it must end as if nothing had happened, digit for digit."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from elra_hf.optimizer import unwrap
from tests.transformers.jobs import run  # here, for the processes to be forked with all that it imports

STEPS, SAVE = 30, 3
TIMEOUT = 30.0  # seconds that a rank waits for the other one
PATIENCE = 90.0  # seconds after which a rank that has lost the other one counts as hung


class Note(TrainerCallback):
    """Writes α and the rate of each step, and every loss, in full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, optimizer=None, **_) -> None:
        if "loss" in logs and state.is_world_process_zero:
            group = unwrap(optimizer).param_groups[0]
            numbers = [float(logs["loss"]), float(group["alpha"]), float(group["effective_lr"]), float(group["restarts"])]
            with self.path.open("a") as file:  # the line's end first, for what a kill cut off to stay apart
                file.write("\n" + json.dumps([state.global_step, *(number.hex() for number in numbers)]))


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
    """Train on from the last checkpoint that is whole, unless that is of the last step: the Trainer would take one more."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    last = [path for path in found if whole(path) and all((path / name).exists() for name in names)][-1:]
    if last and last[0].name == f"checkpoint-{STEPS}":
        return
    options = {}
    if ranks > 1:
        # on the CPU TrainingArguments keep ddp_timeout to themselves, and a rank would wait for 30 minutes for one that was
        # killed before it came to the meeting
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        options = {"ddp_backend": "gloo"}
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
                os.dup2(os.open(folder / f"errors{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
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


def said(folder: Path, rank: int) -> str:
    """The end of what a rank wrote to its stderr the last time."""
    return (folder / f"errors{rank}").read_text()[-2000:]


def soak(
    folder: Path, kills: int, ranks: int, seed: int = 0, optims: tuple[str, ...] = ("elra_c2min", "elra_p2min", "elra_adamw")
) -> int:
    """Kill ``kills`` times; return how many runs were brought to their end.

    Raises:
        AssertionError: a run ended otherwise than the one that was left alone, or the rank that was left hung or said nothing.
    """
    chance, done, killed = random.Random(seed), 0, 0
    straight = {}
    while killed < kills:
        optim = optims[done % len(optims)]
        if optim not in straight:
            begun, alone = time.monotonic(), folder / f"straight-{optim}"
            assert end(start(alone, optim, ranks), 300.0) == [0] * ranks, said(alone, 0)
            straight[optim] = notes(alone), time.monotonic() - begun
        expected, lasts = straight[optim]
        assert sorted(expected) == list(range(1, STEPS + 1))
        cut = folder / f"cut-{done}"
        while True:
            pids = start(cut, optim, ranks)
            early = end(pids, chance.uniform(0.05, 1.1) * lasts if killed < kills else 300.0)
            assert {*early} <= {0, None}, [said(cut, rank) for rank in range(ranks)]
            if None not in early:
                break
            running = {rank: pid for rank, pid in enumerate(pids) if early[rank] is None}
            victim = chance.choice(list(running))
            os.kill(running[victim], signal.SIGKILL)
            killed += 1
            for rank, status in zip(running, end(list(running.values()), PATIENCE), strict=True):
                if status is None:
                    os.kill(running[rank], signal.SIGKILL)
                assert status is not None, f"rank {rank} hung for {PATIENCE:g} s after the other one was killed"
                assert rank == victim or status == 0 or "Error" in said(cut, rank), f"rank {rank} ended without a word"
        assert notes(cut) == expected, f"{optim}, {ranks} ranks, seed {seed}, run {done}: not as the run that was left alone"
        done += 1
    return done
