"""How many steps `elra_adamw` needs: the adapters of `sweep`, trained for 20 to 100 steps, next to AdamW at three rates.

One seed, linear schedule. Every run is one row of ``model_cards/language_modeling/steps.csv``; rows that are there are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.cli import show
from recipes.language_modeling.sweep import ADAPT, METRICS, RECIPE, make_base
from recipes.sweep import Row, complete, table, trained

RESULTS = Path("model_cards/language_modeling/steps.csv")
STEPS = ("20", "50", "100")
RATES = {"elra_adamw": ("",), "adamw_torch": ("5e-5", "1e-3", "1e-2")}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    make_base()
    runs: list[Row] = [
        {"max_steps": steps, "optim": optim, "learning_rate": rate, "seed": "0"}
        for steps in STEPS
        for optim, rates in RATES.items()
        for rate in rates
    ]
    rows = complete(RESULTS, runs, lambda run: trained(RECIPE, run, ADAPT, METRICS))
    show(table(rows, ["max_steps", "optim", "learning_rate"], METRICS))
