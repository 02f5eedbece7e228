"""Model cards, as the hub reads them."""

import numpy as np
import pytest
from huggingface_hub import ModelCard

from elra_hf.cards import write_card

NAMES = ("model_name", "summary", "dataset", "dataset_id", "command", "usage")


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_a_card_is_read_back_whatever_kind_its_numbers_are(kind, tmp_path):
    given = dict.fromkeys(NAMES, "name")
    path = write_card(tmp_path, **given, task="text-classification", splits={}, metrics={"accuracy": kind(0.5)}, settings={})
    [result] = ModelCard.load(path).data.eval_results
    assert result.metric_value == 0.5


def test_a_setting_of_several_lines_or_with_a_bar_stays_in_its_cell(tmp_path):
    given = dict.fromkeys(NAMES, "name")
    settings = {"layers": "q|v", "optimizer": "Elra (\n  rule=C2Min()\n)"}
    path = write_card(tmp_path, **given, task="text-classification", splits={}, metrics={"loss": 0.5}, settings=settings)
    table = path.read_text().split("| setting | value |\n|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == [r"| layers | q\|v |", "| optimizer | Elra ( rule=C2Min() ) |"]
