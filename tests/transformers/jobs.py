"""A tiny model and data for real Trainer runs. Also run as a script, to be killed and resumed: see `main`."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import elra_hf  # noqa: F401


class Rows(torch.utils.data.Dataset):
    """64 sequences of 8 tokens; those of one class come from the upper half of the vocabulary."""

    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(n) % 2
        self.ids = torch.randint(0, 20, (n, 8), generator=generator) + 20 * self.labels[:, None]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": self.labels[i]}


def bert() -> nn.Module:
    """Weights ten times as large as BERT's own, which a model this narrow needs to see its input at all."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=2, initializer_range=0.2, **shape))


def arguments(folder, optim: str = "elra_c2min", **options) -> TrainingArguments:
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    return TrainingArguments(str(folder), optim=optim, use_cpu=True, disable_tqdm=True, **{**defaults, **options})


def run(folder, optim: str = "elra_c2min", model: nn.Module | None = None, resume=None, callbacks=None, **options) -> Trainer:
    trainer = Trainer(
        model or bert(), arguments(folder, optim, **options), train_dataset=Rows(), eval_dataset=Rows(16), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer: Trainer, *names: str) -> list[tuple]:
    """The training logs: step and the named entries."""
    return [tuple(entry[n] for n in ("step", *names)) for entry in trainer.state.log_history if "loss" in entry]


class Kill(TrainerCallback):
    """End the process at step 9, without a farewell."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 9:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], callbacks=[Kill()], save_strategy="steps", save_steps=4)
