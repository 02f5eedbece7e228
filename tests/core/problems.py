"""Small real problems and drivers for the core tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from elra_hf import Adam, C2Min, Elra, ElraAdamW, ElraC2Min, ElraP2Min, Momentum, P2Min, SuccessiveGradients, Tracking

VARIANTS = {"c2min": ElraC2Min, "p2min": ElraP2Min, "adamw": ElraAdamW}


def momentum_tracking(params, lr=1e-5, **options):
    """A fourth optimizer, from pieces."""
    return Elra(params, Momentum(), Tracking(), lr=lr, **options)


PIECES = [
    (Momentum(), C2Min()),
    (Momentum(), P2Min()),
    (Momentum((0.0, 0.0)), P2Min()),
    (SuccessiveGradients(), C2Min(horizon=math.inf)),
    (SuccessiveGradients((0.0, 0.0)), P2Min(horizon=math.inf)),
    (Momentum(), Tracking()),
    (Adam(), Tracking()),
]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 6, generator=generator)
    return x.to(dtype), (x[:, :3].abs() + x[:, 3:]).argmax(1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    p = next(model.parameters())
    x, y = batch(step, p.dtype)
    return nn.functional.cross_entropy(model(x.to(p.device)), y.to(p.device))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps, **step_options) -> list[float]:
    """Train on the numbered batches; the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(**step_options)
        losses.append(loss.item())
    return losses


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that the optimizer carries, in a fixed order."""
    tensors = [
        value.clone()
        for group in optimizer.param_groups
        for name, value in sorted(group.items())
        if isinstance(value, Tensor) and name != "lr"
    ]
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [value.clone() for _, value in sorted(optimizer.state.get(p, {}).items())]
    return tensors


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
