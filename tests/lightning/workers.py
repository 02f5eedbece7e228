"""What each of two ranks does: Lightning's strategies and Fabric, on half of every batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from elra_hf.adapters.lightning import ElraMonitor
from elra_hf.witness import LOSSES

from .modules import BATCH, NAMES, STEPS, Classifier, flat, loader, lowering, net, optimizer_of, trainer

WORLD = 2
DOUBLE = torch.float64


def share(rank: int) -> DataLoader:
    """This rank's half of every batch, in the batches' order."""
    x, y = (t.view(STEPS, BATCH, *t.shape[1:])[:, rank::WORLD].flatten(0, 1) for t in loader(dtype=DOUBLE).dataset.tensors)
    return DataLoader(TensorDataset(x, y), BATCH // WORLD)


def scheduled(name: str, module: nn.Module) -> dict[str, Any]:
    optimizer = optimizer_of(name, module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lowering(optimizer), "interval": "step"}}


def fit(module: Classifier, strategy: Any, **options: Any) -> Any:
    run = trainer(devices=WORLD, strategy=strategy, use_distributed_sampler=False, **options)
    run.fit(module, share(dist.get_rank()))
    return run


class Sharded(Classifier):
    """``fully_shard`` in ``configure_model``, as ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Spike(Classifier):
    """One rank's loss is a thousand times the others' at the twelfth step, and so explodes for all."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        factor = 1000.0 if batch_idx == LOSSES + 1 and self.global_rank == 1 else 1.0
        # the gradient stays as it is, so that only the loss can tell
        loss = super().training_step(batch, batch_idx)
        return loss + (factor - 1) * loss.detach()


def whole(module: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def fabric_run(name: str, fabric: Fabric, data: DataLoader) -> tuple[Tensor, list[float]]:
    model = net(DOUBLE)
    model, optimizer = fabric.setup(model, optimizer_of(name, model))
    alphas = []
    for x, y in data:
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        alphas.append(float(optimizer.param_groups[0]["alpha"]))
    return flat(model), alphas


def everything() -> dict[str, Any]:
    """Parameters and α of every set-up, by name."""
    results: dict[str, Any] = {}
    for name in NAMES:
        module = Classifier(lambda module, name=name: scheduled(name, module), DOUBLE)
        fit(module, DDPStrategy(), callbacks=[ElraMonitor(loss_restarts=True)])
        results[f"ddp {name}"] = flat(module), module.alphas

        module = Sharded(lambda module, name=name: scheduled(name, module), DOUBLE)
        strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
        run = fit(module, strategy, callbacks=[ElraMonitor(loss_restarts=True)])
        assert all(isinstance(p, DTensor) for p in module.parameters())
        assert run.callback_metrics["elra/alpha"].item() == torch.tensor(module.alphas[-1]).item()
        results[f"fully_shard {name}"] = whole(module), module.alphas

        fabric = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp")
        fabric.launch()
        results[f"fabric {name}"] = fabric_run(name, fabric, share(dist.get_rank()))
    for flag in (False, True):
        module = Spike(lambda module: optimizer_of("elra_c2min", module), DOUBLE)
        run = fit(module, DDPStrategy(), callbacks=[ElraMonitor(loss_restarts=flag)])
        group = run.optimizers[0].param_groups[0]
        results[f"spike {flag}"] = float(group["restarts"]), float(group["alpha"]), flat(module), float(group["elra_losses"])
    return results
