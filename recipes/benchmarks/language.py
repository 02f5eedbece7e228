"""Language models on sub-words: from scratch, all weights tuned on other text, LoRA adapters alone; and two small nets.

Tokenizer, ids and trained nets are made once and kept in the cache folder, ~/.cache/elra_hf.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .tasks import (
    Batch,
    Problem,
    Task,
    cache_folder,
    classify,
    cnn,
    half_way,
    hit,
    images,
    mlp,
    mnist,
    python_source,
    rows_problem,
    shakespeare_text,
)

SHARES = (0.8, 0.9)  # the text up to here is for training, from here on for the test
KEPT = f"py{platform.python_version()}"  # the standard library's source is the text that all of it comes from


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returned when it was first called under this name, from the cache; processes wait for each other."""
    path = cache_folder() / f"{KEPT}-{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            new = path.with_suffix(f".{os.getpid()}")
            torch.save(make(), new)
            new.replace(path)
    return torch.load(path, weights_only=True)


# ---- text ------------------------------------------------------------------------------------------------------------------


def library_files() -> list[str]:
    """Python's standard library without its tests: the files' text, in an order drawn once, so that any share is like any."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}
    paths = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    return [paths[i].read_text("utf-8", "replace") for i in np.random.default_rng(0).permutation(len(paths))]


@functools.cache
def tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE of that many tokens, trained on the standard library's source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def make() -> str:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(library_files(), trainer)
        return bpe.to_str()

    return Tokenizer.from_str(kept(f"bpe-{vocabulary}", make))


@functools.cache
def tokens(text: str, vocabulary: int) -> Tensor:
    """Ids of "python", the standard library's source, or of "shakespeare", with that library's tokenizer."""

    def make() -> Tensor:
        parts = library_files() if text == "python" else shakespeare_text().splitlines(keepends=True)
        return torch.tensor([i for line in tokenizer(vocabulary).encode_batch(parts) for i in line.ids], dtype=torch.int32)

    return kept(f"{text}-{vocabulary}", make).long()


def parts(text: Tensor) -> dict[str, Tensor]:
    """The text cut into "train", "validation" and "test"."""
    a, b = (int(share * len(text)) for share in SHARES)
    return {"train": text[:a], "validation": text[a:b], "test": text[b:]}


def windows(text: Tensor, starts: np.ndarray, length: int) -> Tensor:
    """Stretches of ``length`` tokens, shape (starts, length)."""
    return text[torch.from_numpy(starts)[:, None] + torch.arange(length)]


def stream(text: Tensor, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Endless batches of windows at random places, shape (rows, length)."""
    rng = np.random.default_rng(seed)
    while True:
        yield (windows(text, rng.integers(0, len(text) - length, rows), length),)


def fixed(text: Tensor, rows: int, length: int, batches: int = 8) -> list[Batch]:
    """The same windows in every run."""
    drawn = stream(text, rows, length, 0)
    return [next(drawn) for _ in range(batches)]


# ---- nets ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A GPT-2 with a tied head and without dropout, and the batches it is trained with.

    Attributes:
        vocabulary: sub-words.
        layers: transformer blocks.
        width: of the hidden state.
        rows: sequences of a batch.
        length: tokens of a sequence.
        kept_steps: steps of AdamW that the net to be tuned has been trained for.
    """

    vocabulary: int = 2048
    layers: int = 4
    width: int = 256
    rows: int = 8
    length: int = 64
    kept_steps: int = 1000

    def net(self, seed: int) -> nn.Module:
        """From scratch."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.length, n_embd=self.width, n_layer=self.layers,
            n_head=max(2, self.width // 64), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)

    def trained(self) -> nn.Module:
        """Trained on Python by AdamW, 1e-3 falling linearly, with a seed that no run has; kept."""

        def make() -> dict[str, Tensor]:
            seed = 1_000_000
            net, text = self.net(seed), parts(tokens("python", self.vocabulary))["train"]
            batches = stream(text, self.rows, self.length, seed)
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
            for step in range(self.kept_steps):
                optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 50, 1 - step / self.kept_steps)
                optimizer.zero_grad()
                next_token(net, next(batches)).backward()
                optimizer.step()
            return net.state_dict()

        net = self.net(0)
        name = f"gpt-{self.layers}x{self.width}-{self.vocabulary}-{self.rows}x{self.length}-{self.kept_steps}"
        net.load_state_dict(kept(name, make))
        return net


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token."""
    return model(batch[0], labels=batch[0]).loss


def lora(net: nn.Module, rank: int) -> nn.Module:
    """Adapters of all linear layers, whose sum is not scaled; embeddings and head stay as they are."""
    from peft import LoraConfig, get_peft_model

    adapters = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear", "fan_in_fan_out": True}  # GPT-2's Conv1D
    return get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", **adapters))


def problem(net: nn.Module, text: Tensor, size: Size, seed: int) -> Problem:
    """Predict the next sub-word of the text."""
    cut = parts(text)
    splits = {name: fixed(part, size.rows, size.length) for name, part in cut.items()}
    return Problem(net, stream(cut["train"], size.rows, size.length, seed), next_token, splits)


def from_scratch(size: Size) -> Callable[[int], Problem]:
    """On Python's source."""

    def build(seed: int) -> Problem:
        return problem(size.net(seed), tokens("python", size.vocabulary), size, seed)

    return build


def fine_tuned(size: Size, rank: int | None = None) -> Callable[[int], Problem]:
    """The net that has been trained on Python's source, on Shakespeare: all weights, or adapters of a rank alone."""

    def build(seed: int) -> Problem:
        net = size.trained()
        torch.manual_seed(seed)
        return problem(lora(net, rank) if rank else net, tokens("shakespeare", size.vocabulary), size, seed)

    return build


class Ngram(nn.Module):
    """The next character from the 8 before it: embeddings and an MLP, as in Bengio et al. (2003)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.net = mlp(8 * 16, 128, characters)

    def forward(self, before: Tensor) -> Tensor:
        return self.net(self.embedding(before).flatten(1))


def ngram(seed: int) -> Problem:
    """Characters of Python's source, of which no step sees the same."""
    torch.manual_seed(seed)
    text = python_source()

    def split_last(batches: Iterator[Batch] | list[Batch]) -> Iterator[Batch]:
        return ((rows[:, :-1], rows[:, -1]) for (rows,) in batches)

    cut = parts(text)
    splits = {name: list(split_last(fixed(part, 500, 9, 4))) for name, part in cut.items()}
    return Problem(Ngram(int(text.max()) + 1), split_last(stream(cut["train"], 32, 9, seed)), classify, splits, hit)


def probe(seed: int) -> Problem:
    """A linear classifier that starts at zero, on the mean of MiniLM's last hidden states."""
    hidden, mask, labels = half_way("questions", 24, 6)
    features = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return rows_problem(head, (features, labels), seed, classify, hit)


SMALL, BASE = Size(layers=2, width=128), Size()
LANGUAGE: dict[str, Task] = {
    "gpt-small": Task(from_scratch(SMALL), 150, 3e-3, quick=True, sweeps=False),
    "gpt-small-lora": Task(fine_tuned(SMALL, 8), 100, 3e-3, quick=True, sweeps=False),
    "gpt-scratch": Task(from_scratch(BASE), 300, 1e-3, sweeps=False),
    "gpt-tune": Task(fine_tuned(BASE), 150, 3e-4, sweeps=False),
    "gpt-lora-r8": Task(fine_tuned(BASE, 8), 150, 3e-3, sweeps=False),
    "gpt-lora-r64": Task(fine_tuned(BASE, 64), 150, 3e-3, sweeps=False),
    "minilm-probe": Task(probe, 300, 1e-2),
    "mnist-cnn-4": Task(images(mnist, lambda: cnn(28, 8), 4), 2000, 1e-3),  # batches of 4
    "python-ngram": Task(ngram, 10_000, 1e-3),
}
