"""Train a causal language model with ``--optim elra_adamw``: no learning rate to choose. See README.md for the commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from elra_hf.cards import write_card
from recipes.cli import InputError, parse, run
from recipes.language_modeling.data import TextArguments, load_texts, pack
from recipes.language_modeling.model import ModelArguments, load_model, load_tokenizer, lora_plus
from recipes.trainer import PARTS, Run, fit, found, loading, parse_runs, report, settings

CONFIG, LORA = (Path(__file__).with_name(name) for name in ("config.yaml", "lora.yaml"))
TYPES = (ModelArguments, TextArguments, TrainingArguments)
METRICS = ("perplexity", "loss")
PROMPT, SAMPLE = 12, 80  # tokens of the card's sample: given, and written by the model


class LanguageModelTrainer(Trainer):
    """`Trainer` that adds the perplexity, exp(loss), to what it measures."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with np.errstate(over="ignore"):  # of a run that diverged
            output.metrics[f"{metric_key_prefix}_perplexity"] = float(np.exp(output.metrics[f"{metric_key_prefix}_loss"]))
        return output


def main(argv: Sequence[str]) -> None:
    """Train, evaluate, and write model, metrics, picture and card to the output folder."""
    defaults = [CONFIG, LORA] if parse(TYPES, [CONFIG], argv)[0].use_peft else [CONFIG]
    each, (options, text_options) = parse_runs(TYPES, defaults, argv)
    check_base(options, each[0])
    if options.use_peft and not (text_options.train_file or text_options.dataset_name):
        text_options.dataset_name = "shakespeare"  # another text than the base's
    datasets.disable_progress_bars()
    with each[0].main_process_first(desc="data"):
        texts = load_texts(text_options)
        tokenizer = load_tokenizer(options, texts["train"])
        check_prompt(options.prompt, tokenizer, text_options.block_size)
        blocks = {name: pack(documents, tokenizer, text_options.block_size, name) for name, documents in texts.items()}
    runs = [train(args, options, text_options, tokenizer, blocks) for args in each]
    if each[0].process_index == 0:
        report(runs, METRICS)


def check_base(options: ModelArguments, args: TrainingArguments) -> None:
    """Refuse to adapt a model that is not there, or to write over it."""
    path = options.model_name_or_path
    if not options.use_peft:
        return
    if not path:
        raise InputError("--use_peft needs a trained model to adapt: give --model_name_or_path")
    if path == parse(TYPES, [LORA], [])[0].model_name_or_path and not Path(path).is_dir():
        raise InputError(f"--use_peft: no model in {path} yet; train it: python -m recipes.language_modeling.train")
    if Path(path).resolve() == Path(args.output_dir).resolve():
        raise InputError(f"--output_dir {args.output_dir} holds the model that is adapted: give another folder")


def check_prompt(prompt: str | None, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
    """Refuse a prompt that leaves no room for a sample."""
    count = 1 if prompt is None else len(tokenizer(prompt).input_ids)
    if not 0 < count < room:
        raise InputError(f"--prompt has {count} tokens: give 1 to {room - 1}, fewer than --block_size")


def train(
    args: TrainingArguments,
    options: ModelArguments,
    text_options: TextArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Mapping[str, Dataset],
) -> Run:
    """Train once and write everything about it to ``args.output_dir``."""
    set_seed(args.seed)  # the new weights
    model = load_model(options, tokenizer, text_options.block_size)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=collate,
        optimizer_cls_and_kwargs=None if options.lora_plus_ratio == 1 else lora_plus(model, args, options.lora_plus_ratio),
    )
    finished = fit(trainer, blocks)
    if trainer.is_world_process_zero():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        describe(finished, options, text_options, tokenizer, blocks, trained)
    return finished


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows of the same length; every token is to be predicted, the end of a text too."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100  # nothing stands before it; the Trainer's mean is over the labels that are left
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}  # nothing is padded


def sample(folder: str, prompt: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """What the saved model writes after ``prompt``, as far as its positions go."""
    with loading(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = getattr(model.config, "max_position_embeddings", ids.shape[1] + SAMPLE) - ids.shape[1]
    set_seed(seed)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.8,
        max_new_tokens=min(SAMPLE, room),
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def describe(
    finished: Run,
    options: ModelArguments,
    text_options: TextArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Mapping[str, Dataset],
    trained: int,
) -> None:
    """Write the model card, with a sample."""
    folder, optim, split = finished.args.output_dir, finished.args.optim.value, PARTS[finished.part]
    start = min(PROMPT, text_options.block_size // 2)
    prompt = options.prompt or tokenizer.decode(blocks[split][0]["input_ids"][:start], skip_special_tokens=True)
    room = max(1, min(40, text_options.block_size - len(tokenizer(prompt).input_ids)))
    shown = ""
    if not is_deepspeed_zero3_enabled():  # one rank alone cannot load a model then
        written = sample(folder, prompt, tokenizer, finished.args.seed)
        shown = f"\n\nIt continues\n\n{fenced(prompt)}\n\nwith\n\n{fenced(written)}"
    path = options.model_name_or_path
    name = Path(path).name if path else f"GPT-2, {options.layers} layers of width {options.width}"
    if text_options.train_file:
        data_id, source = Path(text_options.train_file).stem, f"Local file `{text_options.train_file}`"
    else:
        data_id = text_options.dataset_name or "python"
        source = f"`{data_id}`"
    how = "trained from scratch" if path is None else "adapted with LoRA" if options.use_peft else "fine-tuned"
    own: dict[str, object] = {"parameters trained": f"{trained:,}"}
    if options.use_peft:
        own |= {"LoRA rank": options.lora_rank, "LoRA targets": " ".join(options.lora_target_modules)}
        own |= {"LoRA+ ratio": f"{options.lora_plus_ratio:g}"}
    write_card(
        folder,
        model_name=f"{name} on {data_id}, {optim}",
        summary=f"A language model ({name}), {how} on the text of {data_id} with the optimizer `{optim}`.{shown}",
        task="text-generation",
        base_model=path if path and not Path(path).is_dir() else None,
        dataset=f"{source}. Documents are joined and cut into rows of {text_options.block_size} tokens. Where a split did not "
        f"come with the data it was cut from the training text, whose documents were put into random order (seed "
        f"{text_options.split_seed}). The perplexity is per token, of which the tokenizer has {len(tokenizer)}.",
        dataset_id=data_id,
        splits={name: len(rows) for name, rows in blocks.items()},
        split=split,
        found=found(finished),
        metrics={name: finished.metrics[f"{finished.part}_{name}"] for name in METRICS},
        settings={**settings(finished), **own},
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        usage=f"""from transformers import pipeline

write = pipeline("text-generation", model={str(folder)!r})
print(write({prompt!r}, max_new_tokens={room})[0]["generated_text"])""",
    )


def fenced(text: str) -> str:
    """A block of code in Markdown, whatever is in it."""
    fence = "~" * max(3, 1 + max(map(len, re.findall("~*", text))))
    return f"{fence}text\n{text}\n{fence}"


if __name__ == "__main__":
    run(main)
