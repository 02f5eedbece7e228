"""Lightning: ``configure_elra`` for a module's ``configure_optimizers``, and ``ElraMonitor``, which logs the adapted rate.

Neither is needed: an ELRA optimizer may be returned from ``configure_optimizers`` like any other, and `LightningCLI` and
Fabric take it as it is.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from elra_hf.optimizer import Elra, rate, unwrap
from elra_hf.variants import VARIANTS


def configure_elra(
    module: nn.Module,
    name: str = "elra_c2min",
    *,
    lr: float = 1e-5,
    weight_decay: float = 0.0,
    scheduler: Callable[[Optimizer], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns.

    Only parameters with ``requires_grad`` are trained. Weight decay spares those with fewer than two dimensions: biases
    and the weights of norms.

    Args:
        module: holds the parameters, e.g. the LightningModule.
        name: "elra_c2min", "elra_p2min" or "elra_adamw".
        lr: the first rate α_0; there is no need to tune it.
        weight_decay: decoupled weight decay, >= 0.
        scheduler: builds a learning-rate scheduler for the optimizer. It is stepped after every step, and multiplies.
        **options: further arguments of the optimizer, as ``gain`` or ``scope``.

    Raises:
        ValueError: an unknown name or option, with the nearest one; a value that the optimizer refuses; nothing to train.
    """
    _check("name", name, VARIANTS)
    cls = VARIANTS[name]
    for option in options:
        _check(f"option of {name}", option, [each for each in inspect.signature(cls).parameters if each != "params"])
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"module={type(module).__name__} has no parameter that requires a gradient: nothing to train")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = cls([group for group in groups if group["params"]], lr=lr, **options)
    configured: dict[str, Any] = {"optimizer": optimizer}
    if scheduler is not None:
        configured["lr_scheduler"] = {"scheduler": scheduler(optimizer), "interval": "step"}
    return configured


def _check(what: str, word: str, known: Iterable[str]) -> None:
    known = list(known)
    if word not in known:
        near = difflib.get_close_matches(str(word), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {what}: {word!r}; {hint}give one of {', '.join(known)}")


class ElraMonitor(Callback):  # type: ignore[misc]
    """Log the rate really applied, α, the cosine and the restarts, whenever the Trainer logs.

    ``LearningRateMonitor`` would show the scheduler's ``lr`` only. The keys are ``elra/rate``, ``elra/alpha``, ``elra/cos`` and
    ``elra/restarts``; with several ELRA optimizers ``elra/0/rate`` and so on, numbered as ``configure_optimizers`` returns
    them. The values are those of the first parameter group.

    Args:
        prog_bar: show the rate in the progress bar, too.
        loss_restarts: hand the loss, averaged over the micro-batches of the step and over all ranks, to the optimizer, which
            then undoes a step after which the loss exploded. Costs one more small all-reduce a step. Without it the optimizer
            does so in single-process training with automatic optimization, where Lightning shows it the loss. Automatic
            optimization only; under manual optimization call ``optimizer.step(loss=...)``.
    """

    def __init__(self, prog_bar: bool = False, loss_restarts: bool = False) -> None:
        self.prog_bar = prog_bar
        self.loss_restarts = loss_restarts
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to listen to the losses."""
        if not self.loss_restarts:
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "ElraMonitor(loss_restarts=True) needs automatic optimization, since it cannot tell which loss is whose: "
                "leave it out, and call optimizer.step(loss=...) with the mean loss over all ranks"
            )

        def give_loss(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            if closure := kwargs.get("closure"):
                result = closure()  # here, because the loss has to be known before the step
                kwargs = {**kwargs, "closure": lambda: result}
            if self._losses:
                loss = sum(self._losses[1:], self._losses[0])
                kwargs = {**kwargs, "loss": trainer.strategy.reduce(loss, reduce_op="mean")}
            return args, kwargs

        self._handles = [unwrap(each).register_step_pre_hook(give_loss) for _, each in _elra(trainer.optimizers)]

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the losses of the last step, taken or not."""
        self._losses.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-batch, which Lightning has divided by their number."""
        if self.loss_restarts:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._losses.append(loss.detach() / scaler.get_scale() if scaler else loss.detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log. Reading the values waits for the device, hence only when they are going to be written."""
        if not trainer._logger_connector.should_update_logs:
            return
        found = _elra(trainer.optimizers)
        for index, optimizer in found:
            prefix = "elra" if len(found) == 1 else f"elra/{index}"
            group = unwrap(optimizer).param_groups[0]
            pl_module.log(f"{prefix}/rate", rate(optimizer), prog_bar=self.prog_bar)
            pl_module.log_dict({f"{prefix}/{key}": float(group[key]) for key in ("alpha", "cos", "restarts")})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _elra(optimizers: Iterable[Any]) -> list[tuple[int, Any]]:
    """Those of ``optimizers`` that are ours, with their numbers."""
    return [(index, each) for index, each in enumerate(optimizers) if isinstance(getattr(each, "optimizer", each), Elra)]
