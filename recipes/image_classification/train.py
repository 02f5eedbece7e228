"""Train an image classifier with LightningCLI and ``--optimizer ElraC2Min``: no learning rate to choose. See README.md."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root stands in for the file's folder
    sys.path[0] = str(Path(__file__).parents[2])

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import elra_hf  # makes --optimizer know ElraC2Min, ElraP2Min and ElraAdamW
from elra_hf.adapters.found import facts
from elra_hf.adapters.lightning import ElraMonitor
from elra_hf.cards import explained, write_card
from elra_hf.plots import plot_rates, series
from recipes.cli import InputError, nearest, require_seed, run, show
from recipes.image_classification.data import Images
from recipes.image_classification.model import ImageClassifier

CONFIG = Path(__file__).with_name("config.yaml")
OPTIMIZERS = ("ElraC2Min", "ElraP2Min", "ElraAdamW", "SGD", "Adam", "AdamW")  # the usual ones, to guess what was meant
SUBCOMMANDS = ("fit", "validate", "test")
# what Lightning calls a figure, and what the pictures call it
LOGGED = {
    "train/loss": "loss",
    "elra/rate": "learning_rate",
    "elra/alpha": "elra_alpha",
    "elra/cos": "elra_cos",
    "elra/restarts": "elra_restarts",
}


class History(Callback):
    """Keeps what the Trainer logs, for the picture."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            seen = {
                name: float(trainer.callback_metrics[key]) for key, name in LOGGED.items() if key in trainer.callback_metrics
            }
            self.entries.append({"step": trainer.global_step, **seen})

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.entries.append({"step": trainer.global_step, "eval_loss": float(trainer.callback_metrics["val/loss"])})


class CLI(LightningCLI):
    """`LightningCLI` with the linear schedule, and a test, pictures and a model card after the training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: options for name, options in LightningCLI.subcommands().items() if name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
        parser.link_arguments("data.channels", "model.channels", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool):  # True: by chance
            require_seed("--seed_everything", seed)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # of the optimizer or the Trainer
            raise InputError(str(error)) from error

    @staticmethod
    def configure_optimizers(lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Any = None) -> Any:
        """Let the rate fall linearly, step by step, unless a ``--lr_scheduler`` is given or the schedule is constant."""
        if lr_scheduler is not None or lightning_module.schedule == "constant":
            return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        steps = lightning_module.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def after_fit(self) -> None:
        """Measure on the test data, once, and write metrics, pictures and card next to the logs."""
        seconds, log = self._callback(Timer).time_elapsed("train"), self._callback(History).entries
        optimizer = self.trainer.optimizers[0]  # the test lets go of it
        (metrics,) = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        metrics = {name.replace("/", "_"): value for name, value in metrics.items()}
        folder = self.trainer.log_dir
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run or not folder:
            return
        if not series(log, "loss"):
            raise InputError(
                f"--trainer.log_every_n_steps {self.trainer.log_every_n_steps}: no loss was logged, and there is nothing to "
                f"draw: give a smaller number. Its checkpoints are in {folder}; test accuracy {metrics['test_accuracy']:.4f}"
            )
        metrics |= {"train_loss": statistics.mean(loss for _, loss in series(log, "loss")[-10:]), "train_runtime": seconds}
        name = type(optimizer).__name__
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        plot_rates({name: log}, Path(folder) / "rate.png")
        plot_confusion(self.model.matrix, self.datamodule.classes, Path(folder) / "confusion.png")
        self.describe(Path(folder), name, optimizer, metrics)
        show(results(name, optimizer, metrics, self.found()))
        print(f"card {folder}/README.md, pictures {folder}/rate.png and {folder}/confusion.png")

    def _callback(self, kind: type) -> Any:
        return next(each for each in self.trainer.callbacks if isinstance(each, kind))

    def describe(self, folder: Path, name: str, optimizer: Optimizer, metrics: Mapping[str, float]) -> None:
        """Write the model card."""
        data, hparams, trainer = self.datamodule, self.model.hparams, self.trainer
        data_id = Path(data.dataset).name
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or f"{folder}/checkpoints/model.ckpt"
        write_card(
            folder,
            model_name=f"{hparams.net} on {data_id}, {name}",
            summary=f"A small net, trained from scratch on images of {data_id} with the optimizer `{name}`.\n\n"
            "![which classes are taken for which](confusion.png)",
            task="image-classification",
            dataset=f"`{data.dataset}`: {len(data.classes)} classes. What did not come apart was cut "
            f"from the training images, each class in proportion (seed {data.seed}). The test images are read once.",
            dataset_id=data_id,
            splits={part: len(labels) for part, (_, labels) in data.parts.items()},
            found=self.found(),
            metrics={"accuracy": metrics["test_accuracy"], "loss": metrics["test_loss"]},
            settings={
                "optimizer": f"`{name}`",
                "`lr`": explained(
                    optimizer.defaults["lr"], optimizer.rule.horizon if isinstance(optimizer, elra_hf.Elra) else None
                ),
                "schedule": hparams.schedule,
                "epochs": trainer.current_epoch,
                "images a step": data.batch_size * trainer.accumulate_grad_batches,
                "processes": trainer.world_size,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "seed": self.config.fit.seed_everything,
                "seconds of training": round(metrics["train_runtime"]),
            },
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            usage=f"""import torch

from recipes.image_classification.model import ImageClassifier

model = ImageClassifier.load_from_checkpoint({str(checkpoint)!r}, map_location="cpu").eval()
images = torch.zeros(1, {data.channels}, 28, 28, dtype=torch.uint8)
print([model.hparams.classes[i] for i in model(images).argmax(1)])""",
        )

    def found(self) -> dict[str, Any] | None:
        """What the card says of the rate that was found; None where nothing was looked for."""
        results = [found for each in self.trainer.callbacks if isinstance(each, ElraMonitor) for found in each.found]
        return facts(results[0].optimizer, results[0].adamw, results[0].rate, self.model.hparams.schedule) if results else None


def plot_confusion(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw how many images of each class (rows) were taken for which (columns)."""
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    ConfusionMatrixDisplay(matrix.cpu().numpy(), display_labels=classes).plot(
        ax=figure.subplots(), cmap="Blues", colorbar=False, xticks_rotation="vertical", values_format="d"
    )
    figure.savefig(path, dpi=80)


def results(name: str, optimizer: Optimizer, metrics: Mapping[str, float], found: Mapping[str, Any] | None) -> Table:
    """What the run reached."""
    table = Table(box=box.SIMPLE, title="measured on the test data")
    for column in ("optimizer", "lr", "rate found", "accuracy", "loss", "train loss", "seconds"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    figures = [metrics[key] for key in ("test_accuracy", "test_loss", "train_loss")]
    table.add_row(
        name,
        f"{optimizer.defaults['lr']:g}",
        f"{found['found_rate']:.2g}" if found else "–",
        *(f"{figure:.4f}" for figure in figures),
        f"{metrics['train_runtime']:.0f}",
    )
    return table


def explain(message: str) -> str:
    """Say in one line what is wrong with the command line, with the nearest name where a class or an option is unknown."""
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if unknown:
        key = re.search(r'Parser key "(\S+?)"', message)
        option = f"--{key.group(1)} " if key else ""
        return f"{option}{unknown.group(1)}: no such class{nearest(unknown.group(1), OPTIMIZERS)}"
    return message


def main(_: Sequence[str]) -> None:
    """Run the command line, which LightningCLI takes from ``sys.argv``."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory: workers would only copy
    parser = {"exit_on_error": False, "default_config_files": [str(CONFIG)]}
    try:
        CLI(
            ImageClassifier,
            Images,
            parser_kwargs={"exit_on_error": False, **dict.fromkeys(SUBCOMMANDS, parser)},
            # Images itself gives each process its share
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [Timer(), History()]},
            save_config_kwargs={"overwrite": True},
        )
    except ArgumentError as error:
        raise InputError(explain(str(error))) from error


if __name__ == "__main__":
    run(main)
