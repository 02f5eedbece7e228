"""The callbacks of `elra_hf.adapters.lightning`, which is where to import them from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from elra_hf.average import settle
from elra_hf.optimizer import rate, unwrap

from .averages import Averages, ours
from .found import Found, Search, Trace


class ElraMonitor(Averages):
    """Log the rate really applied, α, the cosine and the restarts, whenever the Trainer logs.

    ``LearningRateMonitor`` would show the scheduler's ``lr`` only. The keys are ``elra/rate``, ``elra/alpha``, ``elra/cos`` and
    ``elra/restarts``; with several ELRA optimizers ``elra/0/rate`` and so on, numbered as ``configure_optimizers`` returns
    them. The values are those of the first parameter group.
    At the end of the training ``elra/found_rate`` is logged, the rate that was found, and a line says what that is worth to
    AdamW; ``found`` has it for each of the optimizers.

    Args:
        prog_bar: show the rate in the progress bar, too.
        loss_restarts: hand the loss, averaged over the micro-batches of the step and over all ranks, to the optimizer, which
            then undoes a step after which the loss exploded. Costs one more small all-reduce a step. Without it the optimizer
            goes by the gradient alone. Automatic optimization only; under manual optimization call
            ``optimizer.step(loss=...)``.
        averaged: validate with the average of the iterates (see `elra_hf.averaged`), save it, and end the training with it.
            Checkpoints, unless of weights alone, also hold what training goes on from, so that a resumed run is the same as
            one that was never stopped. Not where a strategy shards the weights, nor beside another average, such as Lightning's
            ``WeightAveraging`` and ``StochasticWeightAveraging``.
    """

    def __init__(self, prog_bar: bool = False, loss_restarts: bool = False, averaged: bool = False) -> None:
        self.prog_bar = prog_bar
        self.loss_restarts = loss_restarts
        self.averaged = averaged
        self.found: list[Found] = []
        self._losses: list[Tensor] = []
        self._handles: list[Any] = []
        self._traces: dict[int, Trace] = {}
        self._unseen: set[int] = set()  # those that have taken a step since they were last looked at

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to listen to the losses."""
        if self.averaged:
            self._start_to_average(trainer, pl_module)
        self._traces, self._unseen = {index: Trace() for index, _ in ours(trainer.optimizers)}, set()
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

        self._handles = [unwrap(each).register_step_pre_hook(give_loss) for _, each in ours(trainer.optimizers)]

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget the losses of the last step, taken or not."""
        self._losses.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-batch, which Lightning has divided by their number."""
        if self.loss_restarts:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._losses.append(loss.detach() / scaler.get_scale() if scaler else loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the step before, of the same batch, and remember that this one is taken."""
        for index, each in ours(trainer.optimizers):
            if each is optimizer:
                self._look(index, each)
                self._unseen.add(index)

    def _look(self, index: int, optimizer: Any) -> None:
        trace = self._traces.setdefault(index, Trace())  # a module may take an optimizer of ours in mid-run
        if index in self._unseen:
            self._unseen.discard(index)
            trace.add(unwrap(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log. Reading the values waits for the device, hence only when they are going to be written."""
        for index, optimizer in ours(trainer.optimizers):
            self._look(index, optimizer)
        if not trainer._logger_connector.should_update_logs:
            return
        for index, optimizer in ours(trainer.optimizers):
            prefix = self._prefix(index)
            group = unwrap(optimizer).param_groups[0]
            pl_module.log(f"{prefix}/rate", rate(optimizer), prog_bar=self.prog_bar)
            pl_module.log_dict({f"{prefix}/{key}": float(group[f"elra_{key}"]) for key in ("alpha", "cos", "restarts")})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was found."""
        results = {index: found for index, trace in self._traces.items() if (found := trace.found())}
        self.found = list(results.values())
        for index, found in results.items():
            for logger in trainer.loggers:
                # as all that Lightning logs; global_step counts the steps of all optimizers
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics({f"{self._prefix(index)}/found_rate": found.rate}, step=step)
            trainer.print(found.line(_schedule(trainer)))
        if self._ends_with_average(trainer):  # for those who save at the end, after us
            self._swapped = self._swap(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the average, also where a finished run was resumed, and nothing was trained."""
        if self._ends_with_average(trainer):
            self._swap_out()
            for _, each in ours(trainer.optimizers):
                settle(each)

    def _ends_with_average(self, trainer: Trainer) -> bool:
        finds = any(isinstance(each, RateFinder) for each in trainer.callbacks)  # type: ignore[attr-defined]
        return self.averaged and not finds  # which puts everything back

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swap it out, whatever happened, and stop listening; others may still save the weights."""
        self._swap_out()
        self._stop_listening()

    def _prefix(self, index: int) -> str:
        return "elra" if len(self._traces) == 1 else f"elra/{index}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if self.averaged:
            vars(trainer.strategy).pop("save_checkpoint", None)
        self._stop_listening()

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class RateFinder(Callback):  # type: ignore[misc]
    """Train with `ElraAdamW` for a while, report the rate found, and leave everything else as it was.

    ``trainer.fit()`` returns after the last of the steps. Weights, buffers, optimizer state and random numbers are then those
    from before, bit for bit; no checkpoint is written meanwhile, and the schedule is held at its full rate. ``found`` has the
    result, and ``found.rate`` is what AdamW wants as ``lr``. One optimizer; not under DeepSpeed.

    Args:
        steps: stop after so many; None: once the rate has settled, or at the end of the run.

    Raises:
        ValueError: ``steps`` is no positive number; at the start of the training: another optimizer or several, or DeepSpeed.
    """

    def __init__(self, steps: int | None = 200) -> None:
        self._search = Search(steps)
        self._unseen, self._enough = False, False
        self._callbacks: list[Any] = []
        self._least: tuple[Any, Any] = (None, None)

    @property
    def found(self) -> Found | None:
        """The result; None before the training has ended."""
        return self._search.found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set those aside that write checkpoints, and ``min_epochs`` and ``min_steps``, before which nothing may stop."""
        loop = trainer.fit_loop
        self._least = loop.min_epochs, loop.epoch_loop.min_steps
        loop.min_epochs = loop.epoch_loop.min_steps = None
        self._callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in self._callbacks if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how everything is."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"RateFinder finds the rate of one optimizer, and this module has {len(trainer.optimizers)}")
        self._search.start(pl_module, trainer.optimizers[0])
        self._unseen, self._enough = False, False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the step before, of the same batch, and hold the schedule."""
        self._look(optimizer)
        self._search.hold(optimizer)
        self._unseen = True

    def _look(self, optimizer: Any) -> None:
        if self._unseen:
            self._unseen = False
            self._enough = self._search.look(optimizer) or self._enough

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the rate, and stop in time."""
        self._look(trainer.optimizers[0])
        if self._enough:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, and say what was found."""
        said = self._search.finish()
        if self.found and not any(isinstance(each, ElraMonitor) for each in self._callbacks):
            trainer.print(self.found.line(_schedule(trainer)))
        trainer.print(said)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back, whatever happened; after an exception Lightning tears no callback down."""
        self._search.finish()
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bring them back, once: another Trainer has its own."""
        if self._callbacks:
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._least
            trainer.callbacks, self._callbacks = self._callbacks, []  # type: ignore[attr-defined]


def _schedule(trainer: Trainer) -> str:
    """The schedule of the run, in words."""
    return ", ".join(type(each.scheduler).__name__ for each in trainer.lr_scheduler_configs) or "constant"
