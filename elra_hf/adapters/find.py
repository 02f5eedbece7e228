"""``--find-rate N``: the Trainer of a script that never heard of us looks for a learning rate, and the script ends there."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import wrapt

_searched: list[Any] = []


def read_steps(text: str) -> int:
    """The number of steps.

    Raises:
        ValueError: ``text`` is no positive whole number.
    """
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"--find-rate {text}: give the number of steps, e.g. --find-rate 200")
    return int(text)


def find(steps: int) -> None:
    """Let ``Trainer.train()`` run ``steps`` steps with elra_adamw, say which rate was found, and end the process.

    A script that asks for another optimizer of ours is not overruled. What it would do with the trained model, such as to save
    it or to put it on the hub, never happens.
    """

    @wrapt.when_imported("transformers.trainer")
    def _wrap(trainer: ModuleType) -> None:
        def search(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
            from elra_hf.adapters.transformers import NAMES, RateFinder

            _searched.append(instance)
            if instance.args.optim not in NAMES:
                instance.args.optim, instance.args.optim_args = type(instance.args.optim)("elra_adamw"), None
            if hasattr(instance, "optimizer_cls_and_kwargs"):
                instance.optimizer_cls_and_kwargs = None
            _require_ours(instance.optimizer)
            instance.add_callback(RateFinder(steps))
            wrapped()  # from the weights that it has, whatever checkpoint there is
            sys.exit(0)

        wrapt.wrap_function_wrapper(trainer, "Trainer.train", search)


def searched() -> bool:
    """Whether this process looked for a rate."""
    return bool(_searched)


def _require_ours(optimizer: Any) -> None:
    from elra_hf.optimizer import unwrap

    try:
        _ = optimizer is None or unwrap(optimizer)
    except TypeError:
        if os.environ.get("RANK", "0") == "0":
            name = type(optimizer).__name__
            hint = (
                "put --replace AdamW=elra_adamw before SCRIPT, too" if name == "AdamW" else "let it leave that to the Trainer"
            )
            print(f"elra_hf.run: --find-rate: the script hands the Trainer its own {name}: {hint}", file=sys.stderr)
        sys.exit(1)
