"""`ElraMonitor`, the callback of `elra_hf.adapters.lightning`, which is where to import it from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from elra_hf.optimizer import Elra, rate, unwrap


class ElraMonitor(Callback):  # type: ignore[misc]
    """Log the rate really applied, α, the cosine and the restarts, whenever the Trainer logs.

    ``LearningRateMonitor`` would show the scheduler's ``lr`` only. The keys are ``elra/rate``, ``elra/alpha``, ``elra/cos`` and
    ``elra/restarts``; with several ELRA optimizers ``elra/0/rate`` and so on, numbered as ``configure_optimizers`` returns
    them. The values are those of the first parameter group.

    Args:
        prog_bar: show the rate in the progress bar, too.
        loss_restarts: hand the loss, averaged over the micro-batches of the step and over all ranks, to the optimizer, which
            then undoes a step after which the loss exploded. Costs one more small all-reduce a step. Without it the optimizer
            goes by the gradient alone. Automatic optimization only; under manual optimization call
            ``optimizer.step(loss=...)``.
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
