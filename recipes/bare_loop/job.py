"""What both loops train: a small GPT-2 on the characters of Python's own source."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import elra_hf
from elra_hf.adapters.deepspeed import sharding_group
from recipes.texts import python_modules

LENGTH = 64  # characters of a row


@dataclass
class Options:
    """The command line.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step in each process.
        layers: of the model.
        width: channels of the model, a multiple of 32.
        seed: of weights and order.
    """

    steps: int = 300
    batch_size: int = 32
    layers: int = 2
    width: int = 64
    seed: int = 0


def options() -> Options:
    """Read the command line; --help names the options."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in vars(Options()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    given = vars(parser.parse_args())
    for name, least in {"steps": 0, "batch_size": 1, "layers": 1, "width": 32, "seed": 0}.items():
        if given[name] < least:
            parser.error(f"argument --{name}: {given[name]} is too low: give {least} or more")
    return Options(**given)


def accelerator() -> Accelerator:
    """On the CPU where there is nothing else. ``Accelerator(cpu=True)`` would switch DeepSpeed off."""
    if not torch.accelerator.is_available():
        PartialState(cpu=True)
    made = Accelerator()
    made.print(f"{made.num_processes} processes, {made.distributed_type.value}")
    return made


def data(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Batches of rows of character ids, shape (batch_size, LENGTH), to train and to test on; the last 5 % are the test's."""
    text = "".join(python_modules().values()).encode("ascii", "ignore")[:1_000_000]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    count = len(rows) // 20
    order = torch.Generator().manual_seed(seed)  # the same for any number of processes
    train = DataLoader(TensorDataset(rows[:-count]), batch_size, shuffle=True, drop_last=True, generator=order)
    return train, DataLoader(TensorDataset(rows[-count:]), batch_size)


def build_model(layers: int, width: int) -> nn.Module:
    """The model, new; its loss is ``model(input_ids=rows, labels=rows).loss``."""
    shape = {"n_layer": layers, "n_embd": width, "n_head": width // 32, "n_positions": LENGTH}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, bos_token_id=None, eos_token_id=None, **shape, **dropout))


def process_group(accelerator: Accelerator, model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which DeepSpeed ZeRO cuts the parameters, which it does without a trace; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else sharding_group(model, plugin.deepspeed_config)


def applied_rate(optimizer: Optimizer) -> float:
    """The rate of the last step: ELRA's own, or another optimizer's learning rate."""
    try:
        return elra_hf.rate(optimizer)
    except TypeError:  # not one of ours
        return optimizer.param_groups[0]["lr"]


@torch.no_grad()
def test_loss(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Mean loss over the test rows of all processes."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(input_ids=x, labels=x).loss.repeat(len(x))) for (x,) in loader]
    model.train()
    return torch.cat(losses).mean().item()
