"""``--replace AdamW=elra_adamw``: ours in the place of ``torch.optim.AdamW``, for scripts that build their own AdamW."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import wrapt

NAMES = ("elra_c2min", "elra_p2min", "elra_adamw")
# what means the same in AdamW and in each of ours, and in ElraAdamW alone
SAME = ("params", "lr", "weight_decay", "maximize")
SAME_IN_ADAM = (*SAME, "betas", "eps")

_said: list[str] = []


def replace(text: str) -> None:
    """Put one of ours in the place of AdamW, now or once torch is imported.

    ``torch.optim.AdamW(...)`` then returns, say, an `ElraAdamW`, and ``isinstance(optimizer, torch.optim.AdamW)`` holds for it.
    Arguments that mean the same are handed over, AdamW's defaults included; others are ignored and named in one line on stderr.
    Classes derived from AdamW stay torch's.

    Args:
        text: "AdamW=elra_adamw", "AdamW=elra_c2min" or "AdamW=elra_p2min".

    Raises:
        ValueError: anything else.
    """
    old, _, name = text.partition("=")
    if old != "AdamW" or name not in NAMES:
        raise ValueError(f"--replace {text}: give AdamW=NAME with NAME one of {', '.join(NAMES)}")

    # after torch as a whole, since ours need more of it than torch.optim
    @wrapt.when_imported("torch")
    def _replace(torch: ModuleType) -> None:
        if not getattr(torch.optim.AdamW, "_elra_name", None):
            torch.optim.AdamW = _stand_in(torch.optim.AdamW, name)
            vars(sys.modules["torch.optim.adamw"])["AdamW"] = torch.optim.AdamW


def built() -> bool:
    """Whether this process built one of ours in the place of AdamW."""
    return bool(_said)


def _stand_in(original: Any, name: str) -> Any:
    """A class that looks like ``original`` and builds ours."""
    same = SAME_IN_ADAM if name == "elra_adamw" else SAME
    signature = inspect.signature(original)
    defaults = {key: each.default for key, each in signature.parameters.items()}

    class StandIn(type(original)):  # type: ignore[misc]
        def __new__(mcs, label: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any) -> Any:
            if any(isinstance(base, StandIn) for base in bases):
                true = tuple(original if isinstance(base, StandIn) else base for base in bases)
                return type(original)(label, true, body, **kwargs)
            return super().__new__(mcs, label, bases, body, **kwargs)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            from elra_hf.variants import VARIANTS

            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            ignored = {k: v for k, v in bound.arguments.items() if k not in same and v != defaults[k]}
            kept = {k: v for k, v in bound.arguments.items() if k in same}
            kept["params"] = list(_groups(kept["params"], ignored))
            _say(f"torch.optim.AdamW is replaced by {VARIANTS[name].__name__}", ignored)
            return VARIANTS[name](**kept)

        def __instancecheck__(cls, instance: Any) -> bool:
            from elra_hf.variants import VARIANTS

            return isinstance(instance, (original, VARIANTS[name]))

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, original)

    def _groups(params: Iterable[Any], ignored: dict[str, Any]) -> Iterable[Any]:
        for each in params:
            if isinstance(each, dict):
                drop = {key for key in each if key in defaults and key not in same}
                ignored |= {key: each[key] for key in drop if each[key] != defaults[key]}
                each = {key: value for key, value in each.items() if key not in drop}
            yield each

    body = {"__doc__": original.__doc__, "__module__": original.__module__, "_elra_name": name}
    stand_in: Any = StandIn(original.__name__, (original,), body)
    stand_in.__signature__ = signature
    return stand_in


def _say(what: str, ignored: dict[str, Any]) -> None:
    """Say it once, on the first rank."""
    options = ", ".join(f"{key}={value!r}" for key, value in sorted(ignored.items()))
    line = f"elra_hf.run: {what}" + (f"; ignored, since it has no such option: {options}" if options else "")
    if line not in _said and os.environ.get("RANK", "0") == "0":
        print(line.encode("ascii", "replace").decode(), file=sys.stderr, flush=True)
    _said.append(line)
