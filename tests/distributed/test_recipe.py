"""The recipe under torchrun and under `accelerate launch`, with 2 processes, against one with batches twice as large."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import rows_csv, tiny_model  # noqa: F401  fixtures

from .harness import ROOT, run

PYTHON = (sys.executable, "-m")
RECIPE = "recipes.text_classification.train"
LAUNCHERS = {
    "torchrun": (*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
    "accelerate": (
        *(*PYTHON, "accelerate.commands.launch", "--config_file", "recipes/configs/ddp.yaml"),
        *("--main_process_port", "0", "-m"),  # a free one: several tests run at a time
    ),
}
OTHERS = ("elra_p2min", "elra_c2min")
KEYS = ("loss", "learning_rate", "elra_alpha", "elra_cos", "elra_restarts", "grad_norm")


def finish(launcher, options, folder, batch):
    """Train with all three optimizers, 5 steps of the first epoch; the output folder of each."""
    given = (*options, "--output_dir", str(folder), "--per_device_train_batch_size", str(batch), "--compare", *OTHERS)
    fixed = ("--max_steps", "5", "--learning_rate", "1e-3", "--freeze_layers", "0", "--lr_scheduler_type", "constant")
    run([[*launcher, RECIPE, *given, *fixed]], timeout=150, env={"CUDA_VISIBLE_DEVICES": ""})
    return {"elra_adamw": folder, **{name: folder / f"compare_{name}" for name in OTHERS}}


@pytest.fixture(scope="module")
def options(tiny_model, rows_csv, tmp_path_factory):  # noqa: F811
    """The model without dropout, which differs from process to process."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("calm") / "model"))
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return "--model_name_or_path", str(folder), "--train_file", rows_csv


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    return finish(PYTHON, options, tmp_path_factory.mktemp("alone"), 8)


def steps(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[entry[key] for key in KEYS] for entry in log if "loss" in entry]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one(launcher, options, alone, tmp_path):
    for name, folder in finish(LAUNCHERS[launcher], options, tmp_path, 4).items():
        ours, truth = steps(folder), steps(alone[name])
        assert len(ours) == len(truth) == 5
        assert len({row[2] for row in truth}) >= 4, "the rate hardly moved: agreement would mean little"
        for mine, theirs in zip(ours, truth, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        mine, theirs = (json.loads((each / "all_results.json").read_text()) for each in (folder, alone[name]))
        for key in ("eval_accuracy", "test_accuracy", "train_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
        # the Trainer fills up the last batch of an evaluation with rows from the start, for ranks to get equally many
        for key in ("eval_loss", "test_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=0.01)
    assert "| rows a step | 8 |" in (tmp_path / "README.md").read_text()


def test_the_recipe_names_every_config():
    """And every config the recipe, whose files they are."""
    readme = (ROOT / "recipes/text_classification/README.md").read_text()
    for path in (ROOT / "recipes/configs").glob("*.yaml"):
        command = f"accelerate launch --config_file recipes/configs/{path.name} -m {RECIPE}"
        assert command in readme
        assert command in path.read_text()
