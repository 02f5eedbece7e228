"""The doors of trainers that are not installed here, as their sources use them."""

import ast
import importlib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import elra_hf

ROOT = Path(__file__).parents[2]


def train(net, optimizer, scheduler=None):
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(torch.ones(8, 4)) - 3.0).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["elra_hf.ElraAdamW", "elra_hf.ElraC2Min", "elra_hf.ElraP2Min"])
def test_kohya_and_musubi(name):
    """--optimizer_type is imported by its dots, --optimizer_args go through literal_eval; each part has an lr of its own."""
    arguments = ["weight_decay=0.01", "betas=(0.9, 0.99)", "scope='group'"]
    options = {key: ast.literal_eval(value) for key, value in (pair.split("=") for pair in arguments)}
    *module, cls = name.split(".")
    cls = getattr(importlib.import_module(".".join(module)), cls)
    model = net()
    rates = (5e-5, 1e-4, 1e-3)
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model[::2], rates, strict=True)]
    optimizer = cls(groups, lr=1e-4, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 60)
    losses = train(model, optimizer, scheduler)
    assert losses[-1] < 0.2 * losses[0]
    # what their displays read
    assert all(float(group["effective_lr"]) > 0 for group in optimizer.param_groups)


def test_llm_foundry():
    """``optimizer: {name: elra_adamw, …}``, by way of entry points."""
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["llmfoundry_optimizers"]
    assert set(declared) == {"elra_c2min", "elra_p2min", "elra_adamw"}
    for name, value in declared.items():
        model = net()
        cls = EntryPoint(name, value, "llmfoundry_optimizers").load()
        losses = train(model, cls(params=[{"params": list(model.parameters())}], lr=1e-4, weight_decay=0.0))
        assert losses[-1] < losses[0]


def test_litgpt_and_lightning_cli():
    """A class path with arguments."""
    declared = {"class_path": "elra_hf.ElraAdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.1}}
    module, cls = declared["class_path"].rsplit(".", 1)
    optimizer = getattr(importlib.import_module(module), cls)(net().parameters(), **declared["init_args"])
    assert isinstance(optimizer, elra_hf.ElraAdamW)


def test_timm():
    pytest.importorskip("timm", reason="timm is not installed: it needs torchvision")
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(OptimInfo(name="elra_adamw", opt_class=elra_hf.ElraAdamW))
    optimizer = create_optimizer_v2(net(), opt="elra_adamw", lr=1e-4, weight_decay=0.05)
    assert isinstance(optimizer, elra_hf.ElraAdamW)
