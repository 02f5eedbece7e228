"""What every ``Trainer`` of transformers has once `elra_hf` is imported: the rate in its logs, where the optimizer is ours."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from elra_hf.optimizer import inside, rate

from .found import Trace
from .transformers import say, schedule


class ElraLogs(TrainerCallback):  # type: ignore[misc]
    """Puts the rate really applied, α, the cosine and the restarts into every training log.

    At the end of a run it adds the rate that was found, as ``elra_found_rate``, and prints what that is worth to AdamW.
    """

    def __init__(self) -> None:
        self._trace = Trace()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the run before."""
        self._trace = Trace()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Look at the rate."""
        if inner := inside(optimizer):
            self._trace.add(inner)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any) -> None:
        """Add ours."""
        inner = inside(optimizer)
        if not logs or inner is None:
            return
        seen = {}
        if "learning_rate" in logs:  # a training log
            group = inner.param_groups[0]
            seen = {name: float(group[name]) for name in ("elra_alpha", "elra_cos", "elra_restarts")}
            seen["learning_rate"] = rate(inner)
        elif "train_runtime" in logs and (found := self._trace.found()):  # the summary at the end
            seen["elra_found_rate"] = found.rate
        logs.update(seen)
        for kept in state.log_history[-1:]:
            if logs.keys() - seen.keys() <= kept.keys():  # a subclass may not keep its logs
                kept.update(seen)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was found."""
        found = self._trace.found()
        if found and state.is_world_process_zero:
            say(found.line(schedule(args, state.max_steps)))
