"""trl's own scripts, unmodified: `make test-trainers`."""

import sys
from pathlib import Path

import pytest

from .conftest import TEXTS, history, launch, write_rows

pytest.importorskip("trl", reason="trl is not installed: make test-trainers")
COMMON = {"max_steps": 20, "logging_steps": 5, "report_to": "none", "use_cpu": True, "bf16": False, "optim": "elra_adamw"}


def options(model, data, folder, **more):
    pairs = {"model_name_or_path": model, "dataset_name": data, "output_dir": folder, **COMMON, **more}
    return [f"--{key}={value}" for key, value in pairs.items()]


@pytest.fixture
def sentences(tmp_path):
    folder = tmp_path / "sentences"
    folder.mkdir()
    return write_rows(folder, [{"text": text} for text in TEXTS])


@pytest.fixture
def preferences(tmp_path):
    folder = tmp_path / "preferences"
    folder.mkdir()
    rows = [{"prompt": text, "chosen": " sings loudly", "rejected": " runs fast"} for text in TEXTS]
    return write_rows(folder, rows)


def check(folder, out):
    logs = [entry for entry in history(folder) if "loss" in entry]
    assert len({entry["elra_alpha"] for entry in logs}) > 1
    assert all(entry["learning_rate"] >= 0 for entry in logs)
    assert "ElraAdamW found the rate" in out


@pytest.mark.parametrize(
    "peft", [[], ["--use_peft", "--lora_r=4", "--lora_target_modules", "q_proj", "v_proj"]], ids=["full", "lora"]
)
def test_sft(peft, language_model, sentences, tmp_path):
    done = launch("-m", "trl.scripts.sft", *options(language_model, sentences, tmp_path / "out"), *peft)
    check(tmp_path / "out", done.stdout)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == bool(peft)


def test_dpo(language_model, preferences, tmp_path):
    done = launch("-m", "trl.scripts.dpo", *options(language_model, preferences, tmp_path / "out"))
    check(tmp_path / "out", done.stdout)


def test_the_command_trl_with_all_that_it_starts(language_model, sentences, tmp_path):
    """trl sft → accelerate launch → trl/scripts/sft.py, each a Python of its own."""
    command = Path(sys.executable).with_name("trl")
    done = launch(command, "sft", *options(language_model, sentences, tmp_path / "out"))
    check(tmp_path / "out", done.stdout)


def test_the_rate_for_a_script_of_trls(language_model, sentences, tmp_path):
    arguments = options(language_model, sentences, tmp_path / "out", optim="adamw_torch", max_steps=100)
    done = launch("--find-rate", "10", "-m", "trl.scripts.sft", *arguments)
    assert "ElraAdamW found the rate" in done.stdout
    assert not list((tmp_path / "out").glob("*"))
