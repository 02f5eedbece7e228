"""Read ``--optim_args "gain=0.4,betas=(0.9,0.7),scope=tensor"`` into the arguments of an optimizer's constructor."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# what the trainer's own options set
ELSEWHERE = {"params": "", "lr": "--learning_rate", "weight_decay": "--weight_decay", "process_group": ""}


def parse_options(text: str | None, cls: type) -> dict[str, Any]:
    """Return the keyword arguments that ``text`` sets, in the types of ``cls.__init__``.

    Args:
        text: comma-separated ``key=value`` pairs; commas inside parentheses belong to the value.
        cls: an optimizer class with an annotated constructor.

    Raises:
        ValueError: an unknown key, or a value of the wrong type. Names both, the valid keys and the nearest one.
    """
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    valid = [name for name in inspect.signature(cls).parameters if name not in ELSEWHERE]
    options: dict[str, Any] = {}
    for pair in re.split(r",(?![^(]*\))", text.strip() if text else ""):
        if not pair.strip():
            continue
        key, sign, raw = (part.strip() for part in pair.partition("="))
        if ELSEWHERE.get(key):
            raise ValueError(f"optim_args: {pair.strip()!r} is set by {ELSEWHERE[key]}, not in --optim_args")
        if key not in valid or not sign:
            near = difflib.get_close_matches(key, valid, n=1)
            wrong = f"unknown key {key!r}" if key not in valid else f"{key!r} has no value"
            hint = f" (did you mean {near[0]!r}?)" if near and near[0] != key else ""
            raise ValueError(
                f"optim_args: {wrong} in {pair.strip()!r} for {cls.__name__}{hint}: "
                f"give key=value pairs; the valid keys are {', '.join(valid)}"
            )
        value = _value(raw)
        if not _fits(value, hints[key]):
            raise ValueError(
                f"optim_args: {key}={raw} for {cls.__name__} is of the wrong type: give {_describe(hints[key])}. "
                f"The valid keys are {', '.join(valid)}"
            )
        options[key] = value
    return options


def _value(raw: str) -> Any:
    """A Python literal where ``raw`` is one, in any capitalisation of true, false and none; else the string itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(raw.lower(), raw))
    except (ValueError, SyntaxError):
        return raw


def _fits(value: Any, hint: Any) -> bool:
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return value in members
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(members) and all(map(_fits, value, members))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """What to give, in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        return " or ".join(map(str, members))
    if origin is tuple:
        return f"({', '.join(_describe(member) for member in members)})"
    return {float: "a number", bool: "true or false", types.NoneType: "none"}.get(hint, str(hint))
