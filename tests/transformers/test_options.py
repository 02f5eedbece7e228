"""`--optim_args`: whatever a constructor's annotation allows can be written, in any usual spelling; nothing else is taken."""

from __future__ import annotations

import inspect
import math
import types
from fractions import Fraction
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elra_hf import ElraAdamW, ElraC2Min, ElraP2Min
from elra_hf.adapters.options import ELSEWHERE, parse_options

CONSTRUCTORS = (ElraC2Min, ElraP2Min, ElraAdamW)
KEYS = [(cls, key) for cls in CONSTRUCTORS for key in inspect.signature(cls).parameters if key not in ELSEWHERE]
SPACE = st.sampled_from(["", " ", "  "])
CASES = st.sampled_from([str.lower, str.upper, str.title, str])


class Rich:
    """Annotations that no constructor has yet."""

    def __init__(
        self,
        nested: tuple[tuple[float, float], tuple[bool, Literal["a", "b"]]] = ((0.0, 0.0), (True, "a")),
        many: tuple[float, ...] = (),
        count: int | None = None,
        word: str | None = None,
        level: Literal[1, 2, "auto"] = 1,
    ) -> None: ...


KEYS += [(Rich, key) for key in inspect.signature(Rich).parameters]


def spelled(hint) -> st.SearchStrategy[tuple[str, object]]:
    """A text and the value of type ``hint`` that it writes."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(spelled, members))
    if origin is Literal:
        return st.sampled_from(members).flatmap(lambda m: quoted(m) if isinstance(m, str) else st.just((str(m), m)))
    if origin is tuple:
        parts = st.lists(spelled(members[0]), max_size=4) if members[-1] is ... else st.tuples(*map(spelled, members))
        return st.builds(in_brackets, parts, st.sampled_from(["()", "[]"]), SPACE, st.sampled_from(["", ","]))
    if hint is float:
        return st.one_of(
            st.floats(allow_nan=False).flatmap(
                lambda x: st.sampled_from([(t, float(t)) for t in (repr(x), f"{x:e}", f"{x:G}")])
            ),
            st.integers(-(10**6), 10**6).map(lambda i: (str(i), float(i))),
            st.sampled_from(["inf", "Inf", "INF", "math.inf", "infinity", "+inf"]).map(lambda t: (t, math.inf)),
            st.sampled_from(["-inf", "-INF", "-math.inf"]).map(lambda t: (t, -math.inf)),
            st.sampled_from([("1e6", 1e6), ("1E+6", 1e6), (".5", 0.5), ("5.", 5.0), ("+3", 3.0)]),
            st.fractions(-99, 99, max_denominator=99).map(
                lambda f: (f"{f.numerator}/{f.denominator}", f.numerator / f.denominator)
            ),
        )
    if hint is int:
        return st.integers().map(lambda i: (str(i), i))
    if hint is str:
        return st.from_regex(r"[a-z]{5,9}", fullmatch=True).flatmap(quoted)
    if hint is bool:
        return st.builds(lambda value, case: (case(str(value)), value), st.booleans(), CASES)
    assert hint is types.NoneType, f"say how {hint} is written"
    return CASES.map(lambda case: (case("none"), None))


def quoted(word: str) -> st.SearchStrategy[tuple[str, object]]:
    return st.sampled_from([word, f"'{word}'", f'"{word}"']).map(lambda text: (text, word))


def in_brackets(parts, brackets, space, end):
    inner = f"{space},{space}".join(text for text, _ in parts) + (end if parts else "")
    return f"{brackets[0]}{space}{inner}{space}{brackets[1]}", tuple(value for _, value in parts)


def same(got, want) -> bool:
    """Equal, of the same type, also inside."""
    if isinstance(want, tuple):
        return isinstance(got, tuple) and len(got) == len(want) and all(map(same, got, want))
    return type(got) is type(want) and got == want


@pytest.mark.parametrize(("cls", "key"), KEYS, ids=lambda each: getattr(each, "__name__", each))
@given(data=st.data())
def test_every_value_that_an_annotation_allows_comes_back(cls, key, data):
    text, value = data.draw(spelled(get_type_hints(cls.__init__)[key]))
    space = data.draw(SPACE)
    got = parse_options(f"{space}{key}{space}={space}{text}{space}", cls)
    assert list(got) == [key]
    assert same(got[key], value), (text, got)


@given(data=st.data())
def test_several_come_back_together(data):
    cls = data.draw(st.sampled_from((*CONSTRUCTORS, Rich)))
    hints = get_type_hints(cls.__init__)
    keys = data.draw(st.lists(st.sampled_from([key for each, key in KEYS if each is cls]), unique=True))
    pairs = {key: data.draw(spelled(hints[key])) for key in keys}
    got = parse_options(",".join(f"{key}={text}" for key, (text, _) in pairs.items()), cls)
    assert list(got) == keys
    assert all(same(got[key], value) for key, (_, value) in pairs.items())


def fits(value, hint) -> bool:
    """Whether the annotation allows ``value``; a whole number is a float, too."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in members)
    if origin is Literal:
        return value in members and type(value) in map(type, members)
    if origin is tuple:
        kinds = members[:1] * len(value) if members[-1] is ... and isinstance(value, tuple) else members
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) is hint or (hint is float and type(value) is int)


ANY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.just("layer"))


@pytest.mark.parametrize(
    ("cls", "key"), [pair for pair in KEYS if pair != (Rich, "word")], ids=lambda e: getattr(e, "__name__", e)
)
@given(value=st.recursive(ANY, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5))
def test_what_an_annotation_does_not_allow_is_refused(cls, key, value):
    if fits(value, get_type_hints(cls.__init__)[key]):
        return
    with pytest.raises(ValueError, match="of the wrong type: give ") as refused:
        parse_options(f"{key}={value}", cls)
    assert f"optim_args: {key}={value} for {cls.__name__}" in str(refused.value)


@given(st.text(max_size=30))
def test_any_other_text_is_refused_with_a_message_of_ours(text):
    with pytest.raises(ValueError, match=r"^optim_args: "):
        parse_options(f"gain=0.4,{text},unknown", ElraC2Min)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("horizon=nan", r"horizon=nan .*wrong type: give a number"),
        ("horizon=1/0", r"horizon=1/0 .*give a number"),
        ("betas=(0.9,nan)", r"betas=\(0.9,nan\) .*give \(a number, a number\)"),
        ("betas=0.9,0.99", r"betas=0.9 .*give \(a number, a number\)"),
        ("gain=0.4,0.99", r"'0.99' .*write a tuple in parentheses"),
        ("betas=(0.9,0.99", r"'\)' is missing in 'betas=\(0.9,0.99': add it"),
        ("betas=0.9)", r"'\)' in 'betas=0.9\)' closes what was not opened"),
        ("scope='group", r"\"'\" is missing"),
        ("gain=0.4 horizon=2", r"gain=0.4 horizon=2 .*give a number"),
        ("gain=0.4,gain=0.5", r"'gain' is given twice"),
        ("gain=", r"'gain' has no value.*give gain=value"),
        ("process_group=none", r"'process_group=none' is set by the Trainer"),
        ("=3", r"valid keys are betas, gain"),
    ],
)
def test_messages_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options(text, ElraC2Min)


def test_nothing_is_no_option():
    assert parse_options(None, ElraC2Min) == parse_options(" , ", ElraC2Min) == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"scope": "group", "gain": 0.4}, {"scope": "group", "gain": 0.4}),
        ({"betas": [0.9, 0.99], "check_sync": True}, {"betas": (0.9, 0.99), "check_sync": True}),
        ({"horizon": float("inf"), "gain": "(1/4, 0.5)"}, {"horizon": float("inf"), "gain": (0.25, 0.5)}),
        ({"horizon": "1e3"}, {"horizon": 1000.0}),  # which YAML reads as a text
    ],
    ids=str,
)
def test_a_mapping_as_yaml_and_json_hold_it(given, expected):
    assert parse_options(given, ElraC2Min) == expected


@pytest.mark.parametrize("given", [["scope=group"], 3, {"scopes": "group"}, {"scope": ["group"]}], ids=str)
def test_what_is_neither_text_nor_a_right_mapping_is_refused(given):
    with pytest.raises(ValueError, match="optim_args"):
        parse_options(given, ElraC2Min)


def test_a_third_is_a_third():
    assert parse_options("restart_factor=1/3", ElraC2Min) == {"restart_factor": float(Fraction(1, 3))}
