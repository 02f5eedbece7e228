"""A training script of the usual kind, which knows nothing of the optimizer that it will be given."""

from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class DataArguments:
    rows: int = field(default=64, metadata={"help": "number of training rows"})


class Counting(torch.utils.data.Dataset):
    def __init__(self, rows: int) -> None:
        self.rows = (torch.arange(rows)[:, None] + torch.arange(12)) % 20

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def main() -> None:
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    config = GPT2Config(vocab_size=20, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=Counting(data.rows))
    trainer.train()
    trainer.save_state()


if __name__ == "__main__":
    main()
