"""What the recipes with the Hugging Face Trainer share: the runs of a command line, one training, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from rich import box
from rich.table import Table
from torch import nn
from transformers import ProgressCallback, Trainer, TrainingArguments

import elra_hf  # noqa: F401  makes --optim know elra_c2min, elra_p2min and elra_adamw
from elra_hf.adapters.found import facts
from elra_hf.adapters.options import parse_options
from elra_hf.adapters.transformers import schedule
from elra_hf.cards import explained
from elra_hf.plots import plot_rates, series
from elra_hf.variants import VARIANTS
from recipes.cli import InputError, parse, require_positive, require_seed, show
from recipes.sweep import append

PARTS = {"eval": "validation", "test": "test"}  # the Trainer's prefixes of metrics, and the split that each is measured on


@dataclass
class CompareArguments:
    """What else is trained, for comparison."""

    compare: list[str] = field(default_factory=list, metadata={"help": "train with these optimizers too, as adamw_torch"})


@dataclass
class Run:
    """A finished training."""

    args: TrainingArguments
    log: list[dict[str, Any]]
    metrics: dict[str, float]

    @property
    def part(self) -> str:
        """Prefix of the metrics to report: of the test data where there are any."""
        return "test" if "test_loss" in self.metrics else "eval"


class Progress(ProgressCallback):
    """The Trainer's progress bar, with loss and rate in the bar instead of on a line for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show training logs in the bar, and leave the others to the Trainer."""
        if logs and "loss" in logs and self.training_bar is not None:
            shown = {"loss": logs["loss"], "rate": logs.get("learning_rate", 0.0)}
            self.training_bar.set_postfix({name: f"{float(value):.3g}" for name, value in shown.items()}, refresh=False)
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


def parse_runs(types: Sequence[type], defaults: Sequence[Path], argv: Sequence[str]) -> tuple[list[TrainingArguments], Any]:
    """Parse the command line once for each optimizer that it trains with: a typo must not wait for the first to finish.

    Args:
        types: the dataclasses to fill; one has the field ``compare`` of `CompareArguments`, the last is ``TrainingArguments``.
        defaults: the recipe's own YAML files, later ones over earlier ones.
        argv: the command line without the program's name.

    Returns:
        The ``TrainingArguments`` of the run and of those that it is compared with, and the other dataclasses.

    Raises:
        InputError: what the parser, the optimizer or the Trainer would refuse.
    """
    *options, args = parse(types, defaults, argv)
    if args.logging_strategy.value == "no":
        raise InputError("--logging_strategy no: there would be no rate to draw; give --logging_steps N for fewer logs")
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint, "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there")
    runs = [args]
    for name in next(each.compare for each in options if isinstance(each, CompareArguments)):
        folder = str(Path(args.output_dir) / f"compare_{name}")
        runs.append(parse(types, defaults, [*argv, "--optim", name, "--optim_args", "", "--output_dir", folder])[-1])
        runs[-1].resume_from_checkpoint = None  # which is one of another optimizer
    for each in runs:
        check_numbers(each)
        check_optimizer(each)
    return runs, options


def check_numbers(args: TrainingArguments) -> None:
    """Refuse what the Trainer would only meet after model and data are loaded, or trained."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require_positive(f"--{name}", getattr(args, name))
    if args.max_steps <= 0:  # which outweighs the epochs
        require_positive("--num_train_epochs", args.num_train_epochs)
    for name in ("seed", "data_seed"):
        require_seed(f"--{name}", getattr(args, name))


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse what the optimizer would refuse, before model and data are loaded."""
    if not args.optim_args and args.optim.value not in VARIANTS:
        return
    given = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    try:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer([{"params": nn.Linear(1, 1).parameters(), "weight_decay": args.weight_decay}], **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"{given}: {error}") from error


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Load what ``--model_name_or_path path`` names: errors in one line, and no news of a head that is new."""
    if (Path(path).is_absolute() or path.count("/") > 1) and not Path(path).is_dir():
        raise InputError(f"--model_name_or_path {path}: no such folder")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path {path}: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def fit(trainer: Trainer, splits: Mapping[str, Dataset]) -> Run:
    """Train, measure on "validation" and "test" where ``splits`` has them, and write all but the card to the output folder."""
    args = trainer.args
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    log = trainer.state.log_history
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trained.metrics)
    metrics = dict(trained.metrics)
    for part, split in PARTS.items():
        if split in splits:
            measured = trainer.evaluate(splits[split], metric_key_prefix=part)
            trainer.save_metrics(part, measured)
            metrics |= measured
    if trainer.is_world_process_zero():
        plot_rates({args.optim.value: log}, Path(args.output_dir) / "rate.png")
    return Run(args, log, metrics)


def settings(run: Run) -> dict[str, object]:
    """What a card says of every run."""
    args = run.args
    return {
        "optimizer": f"`{args.optim.value}`" + (f" ({args.optim_args})" if args.optim_args else ""),
        "`learning_rate`": explained(args.learning_rate, horizon(args)),
        "schedule": args.lr_scheduler_type.value,
        "clipping": args.max_grad_norm,
        "epochs": args.num_train_epochs,
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "seconds of training": round(run.metrics["train_runtime"]),
    }


def horizon(args: TrainingArguments) -> float | None:
    """That of the rate rule; None where the optimizer is none of ours."""
    cls: Any = VARIANTS.get(args.optim.value)
    return cls and float(cls(nn.Linear(1, 1).parameters(), **parse_options(args.optim_args, cls)).rule.horizon)


def found(run: Run) -> dict[str, Any] | None:
    """What a card says of the rate that was found; None where the optimizer is none of ours."""
    rates = series(run.log, "elra_found_rate")
    if not rates:
        return None
    (steps, rate), optim = rates[-1], run.args.optim.value
    return facts(optim, optim == "elra_adamw", rate, schedule(run.args, steps))


def row_of(run: Run, part: str, metrics: Sequence[str]) -> dict[str, str]:
    """What a run reached, column by column; ``part`` is the prefix of the metrics."""
    return {
        "optimizer": run.args.optim.value,
        "lr": f"{run.args.learning_rate:g}",
        "rate found": f"{rate['found_rate']:.2g}" if (rate := found(run)) else "–",
        **{name: f"{run.metrics[f'{part}_{name}']:.4f}" for name in metrics},
        "train loss": f"{run.metrics['train_loss']:.4f}",
        "seconds": f"{run.metrics['train_runtime']:.0f}",
    }


def results(rows: Sequence[Mapping[str, str]], title: str) -> Table:
    """The rows as a table to show."""
    table = Table(box=box.SIMPLE, title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=column == "optimizer")
    for row in rows:
        table.add_row(*row.values())
    return table


def report(runs: Sequence[Run], metrics: Sequence[str]) -> None:
    """Print what each run reached side by side, and write the same rows to ``results.csv`` in the first one's folder."""
    first = runs[0]
    folder = Path(first.args.output_dir)
    if len(runs) > 1:
        plot_rates({each.args.optim.value: each.log for each in runs}, folder / "compare.png")
    (folder / "results.csv").unlink(missing_ok=True)
    rows = [row_of(each, first.part, metrics) for each in runs]
    for row in rows:
        append(folder / "results.csv", row)
    show(results(rows, f"measured on the {PARTS[first.part]} data"))
    for each in runs:
        print(f"{each.args.optim.value}: card {each.args.output_dir}/README.md, picture {each.args.output_dir}/rate.png")
