"""Read ``--optim_args "gain=0.4,betas=(0.9,0.7),scope=tensor"`` into the arguments of an optimizer's constructor.

What a text means follows from the constructor's annotation, not from its looks: ``1`` is 1.0 for a float.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# what the Trainer sets, and by which of its options
ELSEWHERE = {"lr": "--learning_rate", "weight_decay": "--weight_decay", "params": "the Trainer", "process_group": "the Trainer"}

# (opening, closing): a comma between them belongs to the value
BRACKETS = {"(": ")", "[": "]"}
QUOTES = "\"'"


def parse_options(given: str | Mapping[str, Any] | None, cls: Callable[..., Any]) -> dict[str, Any]:
    """Return the keyword arguments that ``given`` sets, in the types of ``cls.__init__``.

    Numbers may be written as ``3``, ``0.5``, ``1e-6``, ``1/3``, ``inf`` or ``math.inf``; true, false and none in any case;
    tuples in parentheses or brackets, also one in the other; strings with or without quotes; spaces anywhere between these.

    Args:
        given: comma-separated ``key=value`` pairs; commas inside brackets and quotes belong to the value. Or a mapping, as a
            configuration in YAML or JSON holds it.
        cls: an optimizer class with an annotated constructor.

    Raises:
        ValueError: an unknown key, one given twice, or a value of the wrong type. Names key and value, and what to give.
    """
    if not isinstance(given, str | Mapping | None):
        raise ValueError(f"optim_args={given!r} is invalid: give a text of key=value pairs, or a mapping")
    text = ",".join(f"{key}={value}" for key, value in given.items()) if isinstance(given, Mapping) else given or ""
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    valid = [name for name in inspect.signature(cls).parameters if name not in ELSEWHERE]
    options: dict[str, Any] = {}
    for pair in _split(text, text):
        key, sign, raw = (part.strip() for part in pair.partition("="))
        if key in ELSEWHERE:
            raise ValueError(f"optim_args: {pair!r} is set by {ELSEWHERE[key]}, not in --optim_args: leave it out there")
        if key not in valid or not (sign and raw):
            raise ValueError(f"optim_args: {_unknown(pair, key, valid, cls)}; the valid keys are {', '.join(valid)}")
        if key in options:
            raise ValueError(f"optim_args: {key!r} is given twice, the second time as {pair!r}: give it once")
        try:
            options[key] = _read(raw, hints[key])
        except ValueError:
            raise ValueError(
                f"optim_args: {key}={raw} for {cls.__name__} is of the wrong type: give {_describe(hints[key])}. "
                f"The valid keys are {', '.join(valid)}"
            ) from None
    return options


def _unknown(pair: str, key: str, valid: list[str], cls: Callable[..., Any]) -> str:
    """What is wrong with a pair that has no known key, or no value."""
    if key in valid:
        return f"{key!r} has no value in {pair!r} for {cls.__name__}: give {key}=value"
    if "=" not in pair and not key.isidentifier():
        return f"{pair!r} for {cls.__name__} is no key=value pair: write a tuple in parentheses, as betas=(0.9,0.99)"
    near = difflib.get_close_matches(key, valid, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown key {key!r} in {pair!r} for {cls.__name__}{hint}: give key=value pairs"


def _split(text: str, whole: str) -> list[str]:
    """The parts of ``text`` between the commas that stand in no brackets and no quotes; a comma at the end adds none.

    Raises:
        ValueError: a bracket or quote is not closed. Shows ``whole``.
    """
    parts, start, open_ = [], 0, ""
    for position, char in enumerate(text):
        if open_ and open_[-1] in QUOTES:
            open_ = open_[:-1] if char == open_[-1] else open_
        elif char in QUOTES or char in BRACKETS:
            open_ += BRACKETS.get(char, char)
        elif open_ and char == open_[-1]:
            open_ = open_[:-1]
        elif char in BRACKETS.values():
            raise ValueError(f"optim_args: {char!r} in {whole!r} closes what was not opened: take it out")
        elif char == "," and not open_:
            parts.append(text[start:position])
            start = position + 1
    if open_:
        raise ValueError(f"optim_args: {open_[-1]!r} is missing in {whole!r}: add it")
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _read(raw: str, hint: Any) -> Any:
    """The value of type ``hint`` that ``raw`` writes.

    Raises:
        ValueError: there is none.
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # none before the string "none"
        for member in sorted(members, key=lambda member: (member is not types.NoneType, member is str)):
            try:
                return _read(raw, member)
            except ValueError:
                continue
    elif origin is Literal:
        for member in members:
            if member in (raw, _unquoted(raw)) or (not isinstance(member, str) and raw == str(member)):
                return member
    elif origin is tuple:
        if raw[0] in BRACKETS:
            parts = _split(raw[1:-1], raw)
            kinds = members[:1] * len(parts) if members[-1] is ... else members
            if len(parts) == len(kinds):
                return tuple(_read(part, kind) for part, kind in zip(parts, kinds, strict=True))
    elif hint is float:
        return _number(raw)
    elif hint is int:
        return int(raw)
    elif hint is str:
        return _unquoted(raw)
    else:
        known: dict[Any, dict[str, bool | None]] = {bool: {"true": True, "false": False}, types.NoneType: {"none": None}}
        words = known.get(hint, {})
        if raw.lower() in words:
            return words[raw.lower()]
    raise ValueError


def _number(raw: str) -> float:
    """A float, or the quotient of two; not nan, which no argument means."""
    above, slash, below = re.sub(r"\b(math|np|numpy|torch)\.inf\b", "inf", raw).partition("/")
    divisor = float(below) if slash else 1.0
    if divisor == 0.0 or math.isnan(value := float(above) / divisor):
        raise ValueError
    return value


def _unquoted(raw: str) -> str:
    return raw[1:-1] if len(raw) > 1 and raw[0] in QUOTES and raw[0] == raw[-1] else raw


def _describe(hint: Any) -> str:
    """What to give, in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in members)
    if origin is Literal:
        return " or ".join(map(str, members))
    if origin is tuple:
        return f"({', '.join('...' if member is ... else _describe(member) for member in members)})"
    known = {float: "a number", int: "a whole number", str: "a word", bool: "true or false", types.NoneType: "none"}
    return known.get(hint, str(hint))
