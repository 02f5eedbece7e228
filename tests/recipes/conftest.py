"""A tiny model and a tiny data set, so that the recipe's real runs take seconds."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {"number": "many count total sum few", "place": "city river road land sea", "person": "who king poet she he"}


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct texts of five words whose label three of the words give away."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = list(WORDS)[len(rows) % len(WORDS)]
        rows[" ".join(rng.choices(WORDS[label].split(), k=3) + rng.choices(["the", "a", "of", "in", "on", "is"], k=2))] = label
    return list(rows.items())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with 2 layers of width 16, random, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", *sorted({word for text, _ in sentences(60) for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows_csv(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", sentences(60))


def run_recipe(
    *options: str, launcher: tuple[str, ...] = (sys.executable, "-m"), recipe: str = "text_classification"
) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, f"recipes.{recipe}.train", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
