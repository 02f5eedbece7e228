"""sentence-transformers and setfit, unmodified: `make test-trainers`."""

from pathlib import Path

import pytest

from .conftest import history, launch

HERE = Path(__file__).parent
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: make test-trainers")
REPLACE = ("--replace", "AdamW=elra_adamw")


def test_the_scripts_do_not_know_us():
    assert not any("elra" in (HERE / name).read_text() for name in ("sentences.py", "few_shots.py"))


@pytest.mark.parametrize("ours", [(REPLACE, ()), ((), ("optim=elra_adamw",))], ids=["AdamW replaced", "by name"])
def test_sentence_transformers(ours, encoder, tmp_path):
    before, after = ours
    done = launch(*before, HERE / "sentences.py", encoder, tmp_path / "out", *after)
    logs = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert len({entry["elra_alpha"] for entry in logs}) > 1
    assert "ElraAdamW found the rate" in done.stdout


def test_the_rate_for_sentence_transformers(encoder, tmp_path):
    done = launch("--find-rate=10", HERE / "sentences.py", encoder, tmp_path / "out")
    assert "ElraAdamW found the rate" in done.stdout
    assert not list((tmp_path / "out").glob("*"))


def test_setfit(encoder, tmp_path):
    pytest.importorskip("setfit", reason="setfit is not installed: make test-trainers")
    done = launch(*REPLACE, HERE / "few_shots.py", encoder, tmp_path / "out")
    assert "torch.optim.AdamW is replaced by ElraAdamW" in done.stderr
    assert "ElraAdamW found the rate" in done.stdout
    assert "predicted" in done.stdout
