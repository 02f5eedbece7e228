"""Accuracy of each optimizer over several seeds: ELRA without a learning rate, AdamW at each of a list.

Every run is one row of ``model_cards/text_classification/results.csv``; rows that are there are not run again.
"""

from __future__ import annotations

from pathlib import Path

from recipes.sweep import trainer_sweep

RESULTS = Path("model_cards/text_classification/results.csv")
ELRA = ("elra_c2min", "elra_p2min", "elra_adamw")
ADAMW_RATES = ("5e-5", "2e-4", "5e-4", "1e-3", "2e-3")  # the first is the Trainer's default
METRICS = ("test_accuracy", "test_macro_f1", "test_loss", "train_loss", "train_runtime")

if __name__ == "__main__":
    trainer_sweep(__doc__, "recipes.text_classification.train", RESULTS, ELRA, ADAMW_RATES, METRICS)
