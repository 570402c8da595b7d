"""Strict JSON against the standard reader, and the texts that it must refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.errors import AdapterConfigError, InputError
from lorafold.files.strictjson import canonical, load, parse

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES, st.booleans())
@settings(max_examples=100)
def test_reads_what_the_standard_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse(text, "x") == value
    assert parse(text.encode("utf-8"), "x") == value


@given(_VALUES)
@settings(max_examples=50)
def test_canonical_does_not_depend_on_the_order_of_keys(value: object) -> None:
    def reversed_keys(v: object) -> object:
        if isinstance(v, dict):
            return {key: reversed_keys(v[key]) for key in reversed(v)}
        return [reversed_keys(each) for each in v] if isinstance(v, list) else v

    assert canonical(value) == canonical(reversed_keys(value))
    assert parse(canonical(value), "x") == value


@given(st.binary(max_size=40) | st.text('{}[]",:0123456789eE+-.truefalsn \\uNaIity', max_size=30).map(str.encode))
@settings(max_examples=200)
def test_any_bytes_give_a_value_or_the_typed_error(data: bytes) -> None:
    value, refusal = None, None
    try:
        value = parse(data, "x")
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith("x: ") if refusal is not None else value == json.loads(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"x": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
        ('{"\\u0061": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"r": 8, "lora_alpha": NaN}', "'lora_alpha' is NaN"),
        ('{"lora_alpha": -Infinity}', "'lora_alpha' is -Infinity"),
        ('{"lora_alpha": 1e400}', "'lora_alpha' is 1e400"),
        ('{"a": [[1, [NaN]]]}', "'a' is NaN"),
        ('{"b": {"a": [{"c": -1e999}]}}', "'c' is -1e999"),
        ("[1, NaN]", "the value is NaN"),
        ("NaN", "the value is NaN"),
        ('{"r": ' + "9" * 5000 + "}", "'r' is 99999999999999999999… (5000 characters)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ("", "not JSON: Expecting value, line 1 column 1"),
        ('{"a": 1} x', "not JSON: Extra data, line 1 column 10"),
        ('{"a": 1,}', "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 01}', "not JSON"),
        ("\ufeff{}", "not JSON"),
        ('{"a": "\n"}', "not JSON"),
    ],
    ids=lambda value: value[:24],
)
def test_row_31_and_9_refuses_what_is_not_strict(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, "conf.json")
    assert str(caught.value).startswith("conf.json: ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(InputError, match="byte 7 is 0xff"):
        parse(b'{"a": "\xff"}', "x")


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse('"\\ud83d\\ude00"', "x") == "\N{GRINNING FACE}"


def test_infinity_can_be_admitted_but_not_an_overflow() -> None:
    assert parse('{"time_step_limit": [0.0, Infinity]}', "x", allow_nonfinite=True) == {"time_step_limit": [0.0, math.inf]}
    with pytest.raises(InputError, match="1e400"):
        parse('{"a": 1e400}', "x", allow_nonfinite=True)


def test_row_37_names_from_the_text_are_escaped() -> None:
    with pytest.raises(InputError) as caught:
        parse('{"a\\u001b[31m": NaN}', "dir\x1b[2J/x.json")
    assert "\x1b" not in str(caught.value)


def test_the_error_type_is_the_callers() -> None:
    with pytest.raises(AdapterConfigError):
        parse("{", "x", error=AdapterConfigError)


def test_load_reads_a_regular_file_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "ä b.json"
    path.write_text('{"r": 8}', encoding="utf-8")
    assert load(path) == {"r": 8}
    with pytest.raises(InputError, match="8 bytes, more than the 7"):
        load(path, limit=7)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text", ['{"a":' * 201 + "1" + "}" * 201, "[" * 5000 + "]" * 5000, "[" * 150 + '{"a":' * 60 + "1" + "}" * 60 + "]" * 150]
)
def test_what_nests_deeper_than_others_can_follow_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        parse(text, "config.json")
    assert parse('{"a":' * 200 + "1" + "}" * 200, "config.json")["a"]
