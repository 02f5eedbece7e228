"""Callbacks of the Hugging Face Trainer, which are imported from `elra_hf.adapters.transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.trainer
import wrapt
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from elra_hf.average import averaged, keeper, settle, warn_of_statistics

from .found import Found, Search
from .transformers import say


class RateFinder(TrainerCallback):  # type: ignore[misc]
    """Train with ``optim="elra_adamw"`` for a while, report the rate found, and leave everything else as it was.

    ``trainer.train()`` returns after the last of the steps. Weights, buffers, optimizer state and random numbers are then those
    from before, bit for bit, also where it fails; nothing is evaluated or saved meanwhile, and the schedule is held at its full
    rate. ``found`` has the result, and ``found.rate`` is what AdamW wants as ``learning_rate``. Not under DeepSpeed.

    Args:
        steps: stop after so many; None: once the rate has settled, or at the end of the run.

    Raises:
        ValueError: ``steps`` is no positive number; at the start of the training: another optimizer, or DeepSpeed.
    """

    def __init__(self, steps: int | None = 200) -> None:
        self._search = Search(steps)

    @property
    def found(self) -> Found | None:
        """The result; None before the training has ended."""
        return self._search.found

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Remember how everything is."""
        self._search.start(model, optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Hold the schedule."""
        self._search.hold(optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Look at the rate, and stop in time."""
        control.should_evaluate = control.should_save = False
        if self._search.look(optimizer):
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Neither evaluate nor save."""
        control.should_evaluate = control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put everything back."""
        said = self._search.finish()
        if state.is_world_process_zero:
            say(said)


class AveragedWeights(TrainerCallback):  # type: ignore[misc]
    """Evaluate with the average of the iterates, and end the training with it: see `elra_hf.averaged`.

    Whatever is evaluated or saved after ``trainer.train()`` is the average, that of the best checkpoint under
    ``load_best_model_at_end``. The checkpoints of the run hold what training goes on from, so that a resumed run is the same as
    one that was never stopped.

    Raises:
        ValueError: at the start of the training: the optimizer keeps no average; or ``load_best_model_at_end`` with
            ``save_only_model`` or sharded weights, where the average of a checkpoint cannot be had.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Refuse at once what cannot be done."""
        try:
            keeper(optimizer)
        except TypeError as error:
            name = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ValueError(f"AveragedWeights: {name} keeps no average: train with optim=elra_adamw") from error
        if args.load_best_model_at_end and (args.save_only_model or args.fsdp):
            other = "save_only_model" if args.save_only_model else "fsdp"
            raise ValueError(
                f"AveragedWeights: load_best_model_at_end does not go with {other}, since the average of a checkpoint is in "
                "its optimizer.pt: leave one of them out"
            )
        warn_of_statistics("AveragedWeights", model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Make the average the model, that of the best checkpoint if the Trainer has just loaded this."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint, "optimizer.pt")
            optimizer.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))
        settle(optimizer)


def _evaluate(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    if not any(isinstance(each, AveragedWeights) for each in trainer.callback_handler.callbacks):
        return wrapped(*args, **kwargs)
    with averaged(trainer.optimizer):
        return wrapped(*args, **kwargs)


def _train(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
    try:
        return wrapped(*args, **kwargs)
    except BaseException:  # also one that makes the Trainer begin anew with smaller batches
        for each in trainer.callback_handler.callbacks:
            if isinstance(each, RateFinder):
                each._search.finish()
        raise


# callbacks do not hear of a training that fails
wrapt.wrap_function_wrapper(transformers.trainer, "Trainer._inner_training_loop", _train)
# what the training loop calls; callbacks hear of an evaluation only after it
wrapt.wrap_function_wrapper(transformers.trainer, "Trainer._evaluate", _evaluate)
