"""The recipe for language models, run as a user runs it: what it writes, and what it says to wrong input."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from recipes.cli import parse, run
from recipes.language_modeling.data import cut, pack
from recipes.language_modeling.model import ModelArguments, load_model, load_tokenizer, lora_plus
from recipes.language_modeling.train import CONFIG, TYPES, fenced, main
from recipes.sweep import trained
from tests.recipes.conftest import ROOT, run_recipe, sentences

SMALL = ("--layers", "1", "--width", "32", "--vocab_size", "300", "--block_size", "16", "--max_steps", "6")
QUIET = ("--eval_strategy", "no", "--disable_tqdm", "true", "--report_to", "none", "--per_device_train_batch_size", "8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(line for line, _ in sentences(300)))
    return str(path)


@pytest.fixture(scope="module")
def base(text: str, tmp_path_factory: pytest.TempPathFactory):
    """A model from scratch, made by the real process: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("base")
    given = ("--train_file", text, "--output_dir", str(folder), *SMALL, "--compare", "adamw_torch")
    done = run_recipe(*given, recipe="language_modeling")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def test_from_scratch_writes_model_card_picture_logs_and_rows(base):
    folder, printed = base
    assert (folder / "rate.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("runs/*/events*"))
    metrics = json.loads((folder / "all_results.json").read_text())
    card = ModelCard.load(folder / "README.md")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for part in ("eval", "test"):
        assert metrics[f"{part}_perplexity"] == pytest.approx(math.exp(metrics[f"{part}_loss"]))
    assert measured == {name: pytest.approx(metrics[f"test_{name}"], abs=1e-4) for name in ("loss", "perplexity")}
    assert "It continues\n\n~~~text" in card.text
    assert "-m recipes.language_modeling.train --train_file" in card.text
    header, *rows = (folder / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["elra_adamw", "adamw_torch"]
    assert header.startswith("optimizer,lr,rate found,perplexity,loss")
    assert "measured on the test data" in printed
    losses = [entry["loss"] for entry in state(folder)["log_history"] if "loss" in entry]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)  # a new model knows nothing


def test_lora_adapts_the_base_and_leaves_it_as_it_was(base, text, tmp_path):
    folder, _ = base
    before = load_file(folder / "model.safetensors")
    given = ("--use_peft", "--model_name_or_path", str(folder), "--train_file", text, "--output_dir", str(tmp_path))
    run(main, [*given, "--lora_rank", "2", "--lora_plus_ratio", "16", "--prompt", "many count", *SMALL, *QUIET])
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in adapters.values()} == {2}
    assert all(tensor.abs().sum() > 0 for tensor in adapters.values())  # the second matrices started at 0
    card = (tmp_path / "README.md").read_text()
    assert "| LoRA+ ratio | 16 |" in card
    assert "~~~text\nmany count\n~~~" in card
    exec(card.split("```python\n")[1].split("```")[0], {})


def test_the_second_matrices_of_lora_plus_move_as_many_times_further():
    """By Adam's first step, whose length is the rate: with any rate found, the ratio holds."""
    options = ModelArguments(use_peft=True, layers=1, width=32, vocab_size=300)
    tokenizer = load_tokenizer(options, ["some text"])
    model = load_model(options, tokenizer, 16)
    (args,) = parse(TYPES[-1:], [CONFIG], ["--learning_rate", "1e-3"])
    optimizer, kwargs = lora_plus(model, args, 16.0)
    optimizer = optimizer(**kwargs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    before = {name: p.detach().clone() for name, p in named.items()}
    generator = torch.Generator().manual_seed(0)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    moved = {"lora_A": [], "lora_B": []}
    for name, p in named.items():
        moved["lora_B" if "lora_B" in name else "lora_A"].append((p - before[name]).abs().mean().item())
    assert sum(moved["lora_B"]) / sum(moved["lora_A"]) == pytest.approx(16, rel=0.05)


def test_resumed_equals_not_stopped(text, tmp_path):
    given = ("--train_file", text, *SMALL, *QUIET)
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run(main, [*given, "--output_dir", str(whole), "--save_strategy", "steps", "--save_steps", "3"])
    run(main, [*given, "--output_dir", str(rest), "--resume_from_checkpoint", str(whole / "checkpoint-3")])
    truth, resumed = (load_file(folder / "model.safetensors") for folder in (whole, rest))
    assert all(torch.equal(truth[name], resumed[name]) for name in truth)
    seen = [[(e["loss"], e["learning_rate"]) for e in state(f)["log_history"] if "loss" in e] for f in (whole, rest)]
    assert seen[0] == seen[1]


def test_the_cut_loses_nothing_and_repeats_nothing():
    documents = [f"{i:02d}" * (i + 1) for i in range(30)]
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    parts = cut(documents, shares, 0)
    joined = "".join("".join(texts) for texts in parts.values())
    assert sorted(joined) == sorted("".join(documents))
    for name, share in shares.items():
        assert sum(map(len, parts[name])) == pytest.approx(share * len(joined), abs=1)
    assert cut(documents, shares, 0) == parts != cut(documents, shares, 1)


def test_rows_are_the_joined_documents():
    tokenizer = load_tokenizer(ModelArguments(vocab_size=260), ["abcabc"])
    texts = ["abc abc", "cab"]
    tokens = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = pack(texts, tokenizer, 4, "train")["input_ids"]
    assert [i for row in rows for i in row] == tokens[: len(tokens) // 4 * 4]
    assert tokenizer.decode(tokenizer("čaj\n\t x").input_ids) == "čaj\n\t x"  # bytes: no text is unknown


def test_a_sample_may_hold_fences():
    assert fenced("a\n~~~\nb").splitlines()[0] == "~~~~text"


WRONG = {
    "missing file": (["--train_file", "nowhere.txt"], "nowhere.txt: no such file"),
    "empty file": (["--train_file", "{tmp}/empty.txt"], "empty.txt is empty"),
    "ending": (["--train_file", "{tmp}/book.doc"], "its name must end in .txt"),
    "too short": (["--train_file", "{tmp}/short.txt"], "--block_size 128: the"),
    "no hub": (["--dataset_name", "some/data"], "--dataset_name some/data cannot be loaded"),
    "no model": (["--model_name_or_path", "some/model"], "--model_name_or_path some/model"),
    "no model folder": (["--model_name_or_path", "./no/such/folder"], "no such folder"),
    "no base": (["--use_peft"], "no model in outputs/language_modeling/base yet; train it"),
    "over the base": (["--use_peft", "--model_name_or_path", "{base}", "--output_dir", "{base}"], "give another folder"),
    "layers to adapt": (["--use_peft", "--model_name_or_path", "{base}", *SMALL, "--lora_target_modules", "q"], "modules q:"),
    "ratio without LoRA": (["--lora_plus_ratio", "4"], "--lora_plus_ratio 4 goes with --use_peft only"),
    "ratio": (["--use_peft", "--lora_plus_ratio", "-1"], "--lora_plus_ratio -1.0: give a number above 0"),
    "rank": (["--use_peft", "--lora_rank", "0"], "--lora_rank 0: give a number above 0"),
    "width": (["--width", "100"], "--width 100: give a multiple of 32"),
    "vocabulary": (["--vocab_size", "100"], "--vocab_size 100: give 257 or more"),
    "block": (["--model_name_or_path", "{base}", "--block_size", "64"], "--block_size 64: the model takes 2 to 16 tokens"),
    "no block": (["--block_size", "1"], "--block_size 1: give 2 or more"),
    "seed": (["--seed", "-1"], "--seed -1: give a whole number from 0 to 4294967295"),
    "prompt": (["--prompt", "x " * 200], "fewer than --block_size"),
    "checkpoint": (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no checkpoint there"),
    "optimizer": (["--optim", "elra_adamv"], "did you mean elra_adamw?"),
    "option": (["--lora_rnk", "2"], "did you mean --lora_rank?"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_ends_with_one_line_and_status_2(options, message, base, text, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "book.doc").write_text("text")
    options = [option.format(tmp=tmp_path, base=base[0]) for option in options]
    source = [] if {"--train_file", "--dataset_name"} & set(options) else ["--train_file", text]
    folder = [] if "--output_dir" in options else ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run(main, [*options, *source, *folder])
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("Loading weights")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_the_readme_is_short():
    assert len((ROOT / "recipes/language_modeling/README.md").read_text().splitlines()) <= 60


def test_a_sweep_keeps_what_a_run_measured(text):
    run = {"optim": "elra_adamw", "learning_rate": "", "seed": "1"}
    measured = trained("recipes.language_modeling.train", run, ("--train_file", text, *SMALL, *QUIET), ("test_loss",))
    assert list(measured) == ["test_loss"]
    assert 0 < float(measured["test_loss"]) < math.log(300)
