"""Other people's trainers, unmodified, with our optimizers. `make test-trainers` installs them; what is missing is skipped."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.recipes.conftest import ROOT, sentences

needs = {
    name: pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed: make test-trainers")
    for name in ("catalogue", "litgpt", "sentence_transformers", "setfit", "trl")
}


def python(*command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def moved(log):
    """The rates of a finished run, which have left the first one."""
    rates = [entry["learning_rate"] for entry in log if "elra_alpha" in entry]
    assert len(set(rates)) > 3
    return rates


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[EOS]", *sorted({word for text, _ in sentences(60) for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


@pytest.fixture(scope="module")
def gpt(words, tmp_path_factory):
    """A small causal model with its tokenizer, and a folder of data."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    folder = tmp_path_factory.mktemp("gpt")
    set_seed(0)
    shape = {"vocab_size": len(words), "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=2, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    texts = [text for text, _ in sentences(60)]
    (folder / "sft").mkdir()
    (folder / "sft/train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "dpo").mkdir()
    rows = [{"prompt": text, "chosen": " who king", "rejected": " sea land"} for text in texts]
    (folder / "dpo/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def sentence_model(words, tmp_path_factory):
    """A small BERT as a sentence-transformers model."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, set_seed

    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)
    words.save_pretrained(folder)
    SentenceTransformer(str(folder), device="cpu").save(str(folder / "sentences"))
    return folder / "sentences"


@needs["trl"]
@pytest.mark.parametrize("job", ["sft", "dpo"])
@pytest.mark.parametrize("lora", [(), ("--use_peft", "--lora_target_modules", "c_attn", "c_proj")], ids=["all weights", "lora"])
def test_trl(job, lora, gpt, tmp_path):
    options = ["--model_name_or_path", gpt / "model", "--dataset_name", gpt / job, "--output_dir", tmp_path / "out", *lora]
    options += shlex.split(
        "--optim elra_adamw --max_steps 12 --logging_steps 1 --save_strategy no --use_cpu --report_to none "
        "--per_device_train_batch_size 8 --max_length 16 --bf16 False --gradient_checkpointing False"
    )
    spy = tmp_path / "spy.py"
    spy.write_text(SPY.format(module=f"trl.scripts.{job}"))
    python("-m", "elra_hf.run", spy, *options, folder=tmp_path)
    moved(json.loads((tmp_path / "log.json").read_text()))


SPY = """
import json, runpy, transformers
train = transformers.Trainer.train
def keep(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    json.dump(self.state.log_history, open("log.json", "w"))
    return result
transformers.Trainer.train = keep
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


@needs["sentence_transformers"]
def test_sentence_transformers(sentence_model, tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    import elra_hf  # noqa: F401

    model = SentenceTransformer(str(sentence_model), device="cpu")
    texts = [text for text, _ in sentences(60)]
    rows = Dataset.from_dict({"anchor": texts[:-3], "positive": texts[3:]})
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), optim="elra_adamw", max_steps=12, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none"
    )
    trainer = SentenceTransformerTrainer(model, args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    moved(trainer.state.log_history)


@needs["setfit"]
def test_setfit(sentence_model, tmp_path):
    """Its arguments know no optimizer: ours takes the place of its AdamW."""
    (tmp_path / "job.py").write_text(SETFIT.format(model=str(sentence_model), rows=sentences(60)))
    done = python("-m", "elra_hf.run", "--replace", "AdamW=elra_adamw", "job.py", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "ElraAdamW"


SETFIT = """
from datasets import Dataset
from elra_hf.optimizer import unwrap
from setfit import SetFitModel, Trainer, TrainingArguments

rows, kinds = {rows!r}, ["number", "place", "person"]
data = Dataset.from_dict(dict(text=[t for t, _ in rows], label=[kinds.index(k) for _, k in rows]))
args = TrainingArguments("out", max_steps=12, save_strategy="no", report_to="none")
trainer = Trainer(SetFitModel.from_pretrained({model!r}, device="cpu"), args, train_dataset=data)
trainer.train()
print(type(unwrap(trainer.st_trainer.optimizer)).__name__)
"""


@needs["catalogue"]
def test_llm_foundry_s_registry():
    import catalogue

    from elra_hf import ElraAdamW

    assert catalogue.create("llmfoundry", "optimizers", entry_points=True).get("elra_adamw") is ElraAdamW


def test_kohya_s_way_to_an_optimizer():
    """A name with a dot is imported, arguments are literals, and every part of a model has its own lr."""
    import ast
    import importlib

    import torch

    path, pairs = "elra_hf.ElraAdamW", ["weight_decay=0.01", "betas=(0.9,0.99)"]
    module, name = path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    options = {key: ast.literal_eval(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    parts = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-4, 5e-5, 5e-5)]
    optimizer = cls(parts, lr=1e-4, **options)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    optimizer.step()
    steps = [1.0 - float(group["params"][0].detach()[0]) for group in optimizer.param_groups]
    assert steps[0] == pytest.approx(2 * steps[1], rel=0.05)
    assert all(float(group["effective_lr"]) > 0 for group in optimizer.param_groups)


@needs["litgpt"]
def test_litgpt_s_way_to_an_optimizer():
    import torch
    from litgpt.utils import instantiate_torch_optimizer

    from elra_hf import ElraAdamW

    params = [torch.nn.Parameter(torch.ones(2))]
    given = {"class_path": "elra_hf.ElraAdamW", "init_args": {"weight_decay": 0.1}}
    assert type(instantiate_torch_optimizer(given, params)) is ElraAdamW
    assert type(instantiate_torch_optimizer("elra_hf.ElraAdamW", params)) is ElraAdamW
