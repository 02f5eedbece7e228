"""A small classifier as a LightningModule, its data, the same training as a plain loop, and quiet Trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from elra_hf import Elra, rate
from elra_hf.adapters.lightning import configure_elra
from tests.core.problems import VARIANTS

NAMES = [f"elra_{name}" for name in VARIANTS]
BATCH, STEPS = 16, 12  # of one epoch


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def rows(dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(BATCH * STEPS, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return TensorDataset(x.to(dtype), (x[:, :3].abs() + x[:, 3:]).argmax(1))


def loader(batch_size: int = BATCH, dtype: torch.dtype = torch.float32) -> DataLoader:
    return DataLoader(rows(dtype), batch_size)


def optimizer_of(name: str, module: nn.Module) -> Elra:
    return configure_elra(module, name, lr=1e-2, weight_decay=0.01)["optimizer"]


def lowering(optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler that takes a fifth off the multiplier at every fourth step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.8)


class Classifier(LightningModule):
    """Automatic optimization; ``configure`` is the body of ``configure_optimizers``."""

    def __init__(self, configure: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = net(dtype)
        self.configure = configure
        self.alphas: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self.net(x), y))

    def on_train_batch_end(self, *_: Any) -> None:
        self.alphas.append(float(self.trainer.optimizers[0].param_groups[0].get("alpha", 0.0)))


def trainer(folder: Any = None, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**quiet, **options})


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def plain(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    clip: float | None = None,
    autocast: bool = False,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    epochs: int = 1,
) -> tuple[Tensor, list[float], list[float]]:
    """The same training without Lightning: the parameters, α after each step, and the rate of each step."""
    model = net(dtype)
    optimizer = optimizer_of(name, model)
    scheduler = schedule(optimizer) if schedule else None
    alphas, rates = [], []
    for _ in range(epochs):
        for x, y in loader(dtype=dtype):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = cross_entropy(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            alphas.append(float(optimizer.param_groups[0]["alpha"]))
            rates.append(rate(optimizer))
            if scheduler:
                scheduler.step()
    return flat(model), alphas, rates
