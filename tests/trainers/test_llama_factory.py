"""LLaMA-Factory's own command, unmodified, with the optimizer's name in its configuration: `make test-trainers`."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import TEXTS, history, launch

FOLDER = Path(sys.prefix) / "llamafactory"
ADAPTERS = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "loraplus_lr_ratio": 16}


@pytest.mark.skipif(not FOLDER.exists(), reason="LLaMA-Factory is not installed: make test-trainers")
@pytest.mark.parametrize("kind", [{"finetuning_type": "full"}, ADAPTERS], ids=["full", "LoRA+"])
def test_sft(kind, language_model, tmp_path, monkeypatch):
    rows = [{"instruction": text, "input": "", "output": "sings loudly"} for text in TEXTS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
    config = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(language_model), "dataset": "mine",
        "dataset_dir": str(tmp_path), "template": "default", "cutoff_len": 32, "output_dir": str(tmp_path / "out"),
        "optim": "elra_adamw", "max_steps": 20, "logging_steps": 5, "use_cpu": True, "report_to": "none", **kind,
        "disable_gradient_checkpointing": True,  # its own does not know transformers 5.23
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # it was made for transformers up to 5.6
    done = launch(FOLDER / "bin/llamafactory-cli", "train", tmp_path / "config.yaml")
    logs = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert len({entry["elra_alpha"] for entry in logs}) > 1
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert "ElraAdamW found the rate" in done.stdout
