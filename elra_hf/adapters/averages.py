"""The average in Lightning, as `ElraMonitor` validates with it and saves it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch import Tensor

from elra_hf.average import averaged, keeper, warn_of_statistics
from elra_hf.optimizer import inside
from elra_hf.reduce import local, slicer

# Lightning's own averages; not every version has all
AVERAGES = tuple(
    getattr(callbacks, name) for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)


class Averages(Callback):  # type: ignore[misc]
    """Holds the average in the model while it is validated and saved, if ``averaged``."""

    averaged: bool
    _swapped: ExitStack | None = None

    def _start_to_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be done, and have the average saved."""
        for _, each in ours(trainer.optimizers):
            keeper(each)
        if any(local(p) is not p or slicer(p) == "FSDP1" for p in pl_module.parameters()):
            raise ValueError(
                "ElraMonitor(averaged=True) does not go with a strategy that shards the weights: leave it out, and use "
                "elra_hf.averaged(optimizer) where you evaluate"
            )
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, AVERAGES):
                raise ValueError(
                    f"ElraMonitor(averaged=True) does not go with {type(each).__name__}, which puts an average of its own "
                    "into the model: leave one of them out"
                )
        warn_of_statistics("ElraMonitor(averaged=True)", pl_module)
        self._save_average(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the average in."""
        if self.averaged and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._swapped = self._swap(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap it out."""
        self._swap_out()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the model, and aside what training goes on from."""
        if not self.averaged or trainer.state.fn != "fit":
            return
        now = checkpoint["state_dict"]  # the parameters themselves
        mean = self._mean(trainer, now)
        if within := self._swapped is not None:
            self._swap_out()
        iterate = {
            name: value for name, value in now.items() if isinstance(value, Tensor) and not torch.equal(value, mean[name])
        }
        if within:  # somebody saves in a validation
            iterate = {name: value.detach().clone() for name, value in iterate.items()}
            self._swapped = self._swap(trainer)
        checkpoint |= {"state_dict": mean, "elra_iterate": iterate}

    def _save_average(self, trainer: Trainer) -> None:
        """Save the average where weights alone are saved, of which Lightning's callbacks do not hear."""
        vars(trainer.strategy).pop("save_checkpoint", None)  # of a run that failed
        save = trainer.strategy.save_checkpoint

        def save_average(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "optimizer_states" not in checkpoint and trainer.state.fn == "fit":
                checkpoint = {**checkpoint, "state_dict": self._mean(trainer, checkpoint["state_dict"])}
            save(checkpoint, *args, **kwargs)

        trainer.strategy.save_checkpoint = save_average  # type: ignore[method-assign]

    def _mean(self, trainer: Trainer, now: dict[str, Any]) -> dict[str, Any]:
        """The average in the place of the parameters in ``now``."""
        with nullcontext() if self._swapped else self._swap(trainer):
            return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in now.items()}

    def _swap_out(self) -> None:
        if self._swapped is not None:
            self._swapped.close()
            self._swapped = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from where the training was, not from the average."""
        if trainer.state.fn == "fit":
            pl_module.load_state_dict(checkpoint.get("elra_iterate", {}), strict=False)

    @staticmethod
    def _swap(trainer: Trainer) -> ExitStack:
        stack = ExitStack()
        for _, each in ours(trainer.optimizers):
            stack.enter_context(averaged(each))
        return stack


def ours(optimizers: Iterable[Any]) -> list[tuple[int, Any]]:
    """Those of ``optimizers`` that are ours, with their numbers."""
    return [(index, each) for index, each in enumerate(optimizers) if inside(each)]
