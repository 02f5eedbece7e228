"""A tiny language model and a tiny text encoder with tokenizers of their own, and rows for them. No hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHOSE, WHO, WHAT = ("red", "green", "blue", "one", "two", "three"), ("cat", "dog", "bird"), ("runs", "sleeps", "sings")
TEXTS = [f"{a} {b} {c}" for a in WHOSE for b in WHO for c in WHAT]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def launch(*command):
    """Run ``python -m elra_hf.run …`` as a user would."""
    line = [sys.executable, "-m", "elra_hf.run", *map(str, command)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def history(folder):
    """The logs of a run, from its trainer_state.json, that of the last checkpoint if need be."""
    states = sorted(Path(folder).rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(states[-1].read_text())["log_history"]


def tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        [*TEXTS, "fast loudly user assistant :"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<end>"])
    )
    result = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", **special)
    result.chat_template = CHAT
    return result


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder, words = tmp_path_factory.mktemp("language_model"), tokenizer(eos_token="<end>")
    set_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(words), **shape, max_position_embeddings=64, pad_token_id=1, eos_token_id=2, bos_token_id=None
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    from transformers import BertConfig, BertModel, set_seed

    folder, words = tmp_path_factory.mktemp("encoder"), tokenizer()
    set_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **shape, max_position_embeddings=64, pad_token_id=1)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(folder, rows):
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
