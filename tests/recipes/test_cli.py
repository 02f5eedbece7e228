"""Result tables are whole in any terminal, and in a pipe."""

import io
from functools import partial

import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainingArguments

import recipes.cli
from elra_hf import ElraAdamW
from recipes.cli import show
from recipes.image_classification.train import results as images
from recipes.sweep import table
from recipes.trainer import Run, row_of
from recipes.trainer import results as texts

LOG = [{"step": 1, "learning_rate": 1.25e-4}, {"step": 2, "elra_found_rate": 1.25e-4}]


def text_table():
    metrics = {
        "test_accuracy": 0.91234,
        "test_macro_f1": 0.81234,
        "test_loss": 0.71234,
        "train_loss": 0.61234,
        "train_runtime": 51,
    }
    names = ("elra_adamw", "adamw_torch_fused", "schedule_free_adamw")
    runs = [Run(TrainingArguments("out", optim=name, use_cpu=True), LOG, metrics) for name in names]
    return texts([row_of(run, "test", ("accuracy", "macro_f1")) for run in runs], "measured on the test data")


def image_table():
    metrics = {"test_accuracy": 0.91234, "test_loss": 0.71234, "train_loss": 0.61234, "train_runtime": 51}
    return images("ElraAdamW", ElraAdamW([torch.nn.Parameter(torch.ones(1))]), metrics, {"found_rate": 1.25e-4})


def sweep_table():
    names = ("test_accuracy", "test_macro_f1", "test_loss", "train_loss", "train_runtime")
    rows = [{"optim": "elra_adamw", "learning_rate": "", **dict.fromkeys(names, f"0.{seed}1")} for seed in (1, 2)]
    return table(rows, ["optim", "learning_rate"], names)


WORDS = {
    text_table: "optimizer/lr/rate found/accuracy/macro_f1/train loss/seconds/0.00013/adamw_torch_fused/0.9123/0.6123",
    image_table: "optimizer/lr/rate found/accuracy/train loss/seconds/0.00013/ElraAdamW/0.9123/0.7123/0.6123",
    sweep_table: "optim/learning_rate/test_accuracy/test_macro_f1/train_runtime/elra_adamw/none given/0.160 ± 0.071",
}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", [200, 80, 60, 40])
@pytest.mark.parametrize("build", WORDS, ids=lambda build: build.__name__)
def test_nothing_of_a_table_is_cut(build, width, terminal, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(recipes.cli, "Console", partial(Console, file=shown, force_terminal=terminal, width=width))
    show(build())
    lines = Text.from_ansi(shown.getvalue()).plain.splitlines()
    for words in WORDS[build].split("/"):
        assert any(words in line for line in lines), (words, shown.getvalue())
    assert "…" not in shown.getvalue()
    if terminal:
        assert max(map(len, lines)) <= width
    else:
        assert sum("0.9123" in line or "none given" in line for line in lines) in (1, 3)  # one line a row
