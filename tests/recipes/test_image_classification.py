"""The recipe, run as a user runs it: what it writes, and what it says to wrong input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.cli import run
from recipes.image_classification import data
from recipes.image_classification.data import Batches, Images, cut, load
from recipes.image_classification.model import NETS
from recipes.image_classification.train import main
from recipes.sweep import complete, read
from tests.distributed.harness import run as run_processes

COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
SMALL = ("--data.batch_size", "8", "--trainer.log_every_n_steps", "1", "--model.width", "4", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """60 noisy pictures of 12 x 16 pixels in three colours, one folder a colour."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir()
        for i in range(20):
            pixels = np.clip(rng.normal(color, 40, (12, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def command(folder: Path, out: Path, *options: str) -> list[str]:
    return ["fit", "--data.dataset", str(folder), "--trainer.logger.save_dir", str(out), *SMALL, *options]


def in_process(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    run(main)


class WriteAlpha(Callback):
    """Leaves the last α of each process in a file."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        alpha = trainer.optimizers[0].param_groups[0]["alpha"]
        Path(self.folder, f"alpha{trainer.global_rank}").write_text(repr(float(alpha)))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """One run of the script by its path: its output folder and what it printed."""
    out = tmp_path_factory.mktemp("out")
    recipe = "recipes/image_classification"
    options = [*command(pictures, out), "--trainer.max_epochs", "3"]
    options[1:1] = ["--config", f"{recipe}/config.yaml"]  # what stands later wins
    (said,) = run_processes([[sys.executable, f"{recipe}/train.py", *options]], timeout=100)
    return out / "image_classification/version_0", said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ElraAdamW"], "1e-05 (only what the schedule refers to)"),
        (["ElraP2Min", "--optimizer.horizon", ".inf"], "1e-05 (the first rate)"),
        (["SGD", "--optimizer.lr", "0.1"], "0.1"),
    ],
    ids=["default", "paper's", "other"],
)
def test_the_card_says_what_lr_was(given, said, pictures, tmp_path, monkeypatch):
    in_process(monkeypatch, *command(pictures, tmp_path, "--optimizer", *given, "--trainer.max_epochs", "1"))
    (card,) = tmp_path.rglob("README.md")
    assert f"| `lr` | {said} |" in card.read_text()


def test_pictures_metrics_logs_and_checkpoint_are_written(finished):
    folder, said = finished
    for name in ("rate.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"test_accuracy", "test_loss", "train_loss", "train_runtime"}
    assert (folder / "checkpoints/model.ckpt").is_file()
    assert "ElraC2Min" in said
    assert f"{metrics['test_accuracy']:.4f}" in said


def test_every_step_is_in_the_tensorboard_file(finished):
    folder, _ = finished
    steps = {}
    for file in folder.glob("events*"):
        events = EventAccumulator(str(file)).Reload()
        steps |= {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert len(steps["train/loss"]) == len(steps["elra/rate"]) == 3 * 5  # 42 images by 8, three times
    assert len(set(steps["elra/alpha"])) > 8
    assert len(steps["val/accuracy"]) == 3
    assert steps["elra/rate"][-1] == pytest.approx(steps["elra/alpha"][-1] / 15, rel=1e-3)  # the linear schedule


def test_card_has_metadata_command_and_a_snippet_that_runs(finished):
    folder, _ = finished
    card = ModelCard.load(folder / "README.md")
    metrics = json.loads((folder / "metrics.json").read_text())
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == pytest.approx(metrics["test_accuracy"], abs=1e-4)
    assert results["accuracy"].dataset_split == "test"
    assert "python recipes/image_classification/train.py fit --config recipes" in card.text
    assert "| train | 42 |\n| validation | 6 |\n| test | 12 |" in card.text
    exec(card.text.split("```python\n")[1].split("```")[0], {})


def test_two_processes_started_as_a_module_have_one_rate(pictures, tmp_path):
    callback = "tests.recipes.test_image_classification.WriteAlpha"
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_epochs", "2", "--optimizer", "ElraP2Min")
    spy = ("--trainer.callbacks+", callback, "--trainer.callbacks.folder", str(tmp_path))
    start = [sys.executable, "-m", "recipes.image_classification.train"]
    (said,) = run_processes([[*start, *command(pictures, tmp_path, *ddp, *spy)]], timeout=100)
    first, second = (Path(tmp_path, f"alpha{rank}").read_text() for rank in (0, 1))
    assert first == second != "1e-05"
    assert said.count("card ") == 1
    assert "| processes | 2 |" in (tmp_path / "image_classification/version_0/README.md").read_text()


def test_any_other_optimizer_with_its_rate(pictures, tmp_path, monkeypatch):
    options = ("--optimizer", "AdamW", "--optimizer.lr", "1e-3", "--trainer.max_epochs", "1", "--model.schedule", "constant")
    in_process(monkeypatch, *command(pictures, tmp_path, *options, "--model.net", "cnn"))
    card = (tmp_path / "image_classification/version_0/README.md").read_text()
    assert "| optimizer | `AdamW` |" in card
    assert "| schedule | constant |" in card


def test_mnist_5k_learns_in_two_epochs(tmp_path, monkeypatch):
    options = ("fit", "--data.dataset", "mnist_5k", "--trainer.max_epochs", "2", "--model.net", "cnn", "--model.width", "8")
    in_process(monkeypatch, *options, "--trainer.logger.save_dir", str(tmp_path), "--trainer.accelerator", "cpu")
    metrics = json.loads((tmp_path / "image_classification/version_0/metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.85


@pytest.mark.parametrize("net", NETS)
def test_nets_are_small_and_take_any_size(net):
    model = NETS[net](3, 10, 16)
    assert sum(p.numel() for p in NETS[net](3, 10, 32).parameters()) < 1_000_000
    assert model(torch.rand(2, 3, 8, 11)).shape == model(torch.rand(2, 3, 40, 32)).shape == (2, 10)


def test_the_parts_share_no_image_and_keep_the_classes_in_proportion():
    _, parts = load("mnist_5k", None)
    pieces = cut(parts, 0)
    assert {name: len(labels) for name, (_, labels) in pieces.items()} == {"train": 3500, "validation": 500, "test": 1000}
    assert all(labels.bincount().unique().numel() == 1 for _, labels in pieces.values())
    assert torch.equal(torch.cat([images for images, _ in pieces.values()]).sum(0), parts["train"][0].sum(0))
    assert not torch.equal(pieces["test"][0], cut(parts, 1)["test"][0])


def test_given_test_images_stay_apart():
    images, labels = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(100) % 2
    pieces = cut({"train": (images, labels), "test": (images[:7], labels[:7])}, 0)
    assert torch.equal(pieces["test"][0], images[:7])
    assert (len(pieces["train"][0]), len(pieces["validation"][0])) == (90, 10)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_every_batch(world):
    def batches(shuffle, epoch=0):
        ranks = [Batches(101, 6, shuffle, seed=0, rank=rank, world=world) for rank in range(world)]
        for each in ranks:
            each.set_epoch(epoch)
        return list(zip(*ranks, strict=True))

    training = batches(shuffle=True)
    assert len(training) == 16
    assert all(len(share) == 6 // world for step in training for share in step)
    seen = torch.cat([share for step in training for share in step])
    assert len(seen.unique()) == 96
    assert not torch.equal(seen, torch.cat([share for step in batches(shuffle=True, epoch=1) for share in step]))
    in_order = torch.cat([share for step in batches(shuffle=False) for share in step])
    assert torch.equal(in_order.sort().values, torch.arange(101))


def test_folder_of_pictures_becomes_tensors(pictures):
    classes, parts = load(str(pictures), None)
    images, labels = parts["train"]
    assert classes == sorted(COLORS)
    assert (images.shape, images.dtype) == ((60, 3, 12, 16), torch.uint8)
    means = {classes[label]: images[labels == label].float().mean((0, 2, 3)) for label in labels.unique()}
    assert all(means[name].argmax() == np.argmax(color) for name, color in COLORS.items())
    assert load(str(pictures), 9)[1]["train"][0].shape == (60, 3, 9, 9)


def test_idx_files_are_read(tmp_path):
    for part, count in (("train", 30), ("t10k", 4)):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 8, 9))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(head + bytes(i % 256 for i in range(count * 72)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes([0, 1] * (count // 2)))
    classes, parts = load(str(tmp_path), None)
    assert classes == ["0", "1"]
    assert parts["test"][0].shape == (4, 1, 8, 9)
    assert parts["train"][0][1, 0, 0].tolist() == list(range(72, 81))
    assert Images(str(tmp_path), batch_size=4).channels == 1


WRONG = {
    "data set": (["--data.dataset", "fashion_mnst"], "fashion_mnst: no such data set; did you mean fashion_mnist?"),
    "folder": (["--data.dataset", "./nowhere"], "./nowhere: no such folder"),
    "no hub": (["--data.dataset", "some/data"], "--data.dataset some/data cannot be loaded"),
    "not installed": (["--data.dataset", "fashion_mnist"], "apt-get install dataset-fashion-mnist"),
    "empty folder": (["--data.dataset", "{tmp}/empty"], "cannot be loaded"),
    "no classes": (["--data.dataset", "{tmp}/flat"], "one sub-folder a class"),
    "no picture": (["--data.dataset", "{tmp}/broken"], "cannot identify image"),
    "too few": (["--data.dataset", "{tmp}/few"], "too few images"),
    "tiny pictures": (["--data.image_size", "4"], "smaller than 8x8"),
    "batch size": (["--data.batch_size", "0"], "--data.batch_size 0"),
    "seed": (["--seed_everything", "-1"], "--seed_everything -1: give a whole number from 0 to 4294967295"),
    "seed of the cut": (["--data.split_seed", "-1"], "--data.split_seed -1: give a whole number from 0 to 4294967295"),
    "large batch": (["--data.batch_size", "1000"], "there are only 42 training images"),
    "option": (["--data.batchsize", "3"], "batchsize"),
    "number": (["--trainer.max_epochs", "many"], "max_epochs"),
    "net": (["--model.net", "vgg"], "vgg"),
    "config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "optimizer": (["--optimizer", "ElraC2Mni"], "--optimizer ElraC2Mni: no such class; did you mean ElraC2Min?"),
    "optimizer's option": (["--optimizer", "ElraC2Min", "--optimizer.gian", "0.4"], "'gian' is not accepted"),
    "optimizer's value": (["--optimizer.gain", "7"], "gain=7"),
    "no logs": (
        ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "9"],
        "steps 9: no loss was logged",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_ends_with_one_line_and_status_2(options, message, pictures, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(data, "FASHION", tmp_path / "nowhere")
    for name, files in {
        "empty": [],
        "flat": ["a.png"],
        "few": ["a/1.png", "b/1.png"],
        "broken": ["a/1.png", "b/1.png"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (9, 9)).save(path)
            if name == "broken":
                path.write_bytes(b"no picture")
    options = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, *command(pictures, tmp_path / "out"), *options)
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    measured = []

    def measure(given):
        measured.append(given["seed"])
        return {"test_accuracy": "0.9"}

    path = tmp_path / "new/results.csv"
    complete(path, [{"optimizer": "a", "seed": "0"}], measure)
    rows = complete(path, [{"optimizer": "a", "seed": seed} for seed in "01"], measure)
    assert measured == ["0", "1"]
    assert rows == read(path) == [{"optimizer": "a", "seed": seed, "test_accuracy": "0.9"} for seed in "01"]
