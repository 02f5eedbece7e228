"""The tokenizer and the model that are made from scratch, and the adapters put on a given one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from recipes.cli import InputError, require_positive
from recipes.trainer import CompareArguments, loading

END = "<|endoftext|>"
HEAD = 32  # channels of an attention head


@dataclass
class ModelArguments(CompareArguments):
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "model on the hub or its folder; default: a new one, with a tokenizer of its own"}
    )
    vocab_size: int = field(default=2048, metadata={"help": "of the new tokenizer"})
    layers: int = field(default=4, metadata={"help": "of the new model"})
    width: int = field(default=128, metadata={"help": f"channels of the new model, a multiple of {HEAD}"})
    use_peft: bool = field(default=False, metadata={"help": "train LoRA adapters of the model, not its weights"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the adapters' output is multiplied by this over the rank"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "names of the layers that get adapters, as c_attn c_proj"}
    )
    lora_plus_ratio: float = field(
        default=1.0,
        metadata={"help": "rate of the adapters' second matrix over that of the first (LoRA+), as 16"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "what the card's sample continues; default: a start from the test"}
    )

    def __post_init__(self) -> None:
        """Check what no library would refuse in a clear line."""
        for name in ("vocab_size", "layers", "width", "lora_rank", "lora_plus_ratio"):
            require_positive(f"--{name}", getattr(self, name))
        if self.width % HEAD:
            raise InputError(f"--width {self.width}: give a multiple of {HEAD}")
        if self.lora_plus_ratio != 1 and not self.use_peft:
            raise InputError(f"--lora_plus_ratio {self.lora_plus_ratio:g} goes with --use_peft only")


def load_tokenizer(options: ModelArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train a byte-level BPE on ``texts``."""
    if options.model_name_or_path is not None:
        with loading(options.model_name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
        if tokenizer.eos_token_id is None:
            raise InputError(f"--model_name_or_path {options.model_name_or_path}: its tokenizer has no end-of-text token")
        return tokenizer
    if options.vocab_size < 257:
        raise InputError(f"--vocab_size {options.vocab_size}: give 257 or more, a token for each byte and one for the end")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=options.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def load_model(options: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """Load or make the model, and put adapters on it if asked to.

    Raises:
        InputError: there is no such model, layer to adapt, or position for a token.
    """
    path = options.model_name_or_path
    if path is None:
        end = tokenizer.eos_token_id
        shape = {"n_layer": options.layers, "n_embd": options.width, "n_head": options.width // HEAD, "n_positions": block_size}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # a text is read once
        tokens = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        model = GPT2LMHeadModel(GPT2Config(**shape, **dropout, **tokens))
    else:
        with loading(path):
            model = AutoModelForCausalLM.from_pretrained(path)
    model.loss_type = model.loss_type or "ForCausalLM"  # GPT-2's is guessed otherwise, with a warning
    positions = getattr(model.config, "max_position_embeddings", block_size)
    if not 2 <= block_size <= positions:
        raise InputError(f"--block_size {block_size}: the model takes 2 to {positions} tokens")
    if not options.use_peft:
        return model
    targets = options.lora_target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora_target_modules {' '.join(targets)}: {error}") from error


def lora_plus(model: nn.Module, args: TrainingArguments, ratio: float) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and arguments for two groups: the adapters' second matrices move ``ratio`` times as fast.

    Source: LoRA+, arXiv 2402.12354. With ELRA too the groups' learning rates are a ratio: one rate is found for both.
    """
    optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    first, second = ([p for name, p in trained if ("lora_B" in name or "lora_embedding_B" in name) is b] for b in (False, True))
    lr, decay = args.learning_rate, args.weight_decay
    kwargs["params"] = [
        {"params": first, "lr": lr, "weight_decay": decay},
        {"params": second, "lr": ratio * lr, "weight_decay": decay},
    ]
    return optimizer, kwargs
