"""`configure_elra`: an optimizer with weight decay where it belongs, and its scheduler. Needs no framework.

In a plain loop: ``optimizer = configure_elra(model, "elra_adamw")["optimizer"]``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

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
        lr: what schedules and groups refer to; any value trains alike.
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
