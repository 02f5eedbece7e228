"""Perplexity of LoRA adapters over several seeds: `elra_adamw` without a learning rate, AdamW at each of a list.

They adapt one small model of Python's source to Shakespeare, less than a minute a run on one core. That model is trained first
where it is not there yet, with AdamW, in 5 minutes. Every run is one row of ``model_cards/language_modeling/results.csv``; rows
that are there are not run again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipes.sweep import trainer_sweep

RECIPE = "recipes.language_modeling.train"
BASE = Path("outputs/language_modeling/sweep_base")
RESULTS = Path("model_cards/language_modeling/results.csv")
ADAMW_RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
METRICS = ("test_perplexity", "test_loss", "train_loss", "train_runtime")
ADAPT = (
    "--use_peft", "--model_name_or_path", str(BASE), "--per_device_train_batch_size", "8", "--eval_strategy", "no",
)  # fmt: skip


def make_base() -> None:
    """Train the model that is adapted, where it is not there yet."""
    if not (BASE / "model.safetensors").exists():
        base = ("--optim", "adamw_torch", "--learning_rate", "3e-3", "--output_dir", str(BASE))
        subprocess.run([sys.executable, "-m", RECIPE, *base], check=True)


if __name__ == "__main__":
    options = (*ADAPT, "--max_steps", "200")
    trainer_sweep(__doc__, RECIPE, RESULTS, ("elra_adamw",), ADAMW_RATES, METRICS, options, make_base)
