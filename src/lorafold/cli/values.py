"""Words of the command line turned into values, with errors that name the argument."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import typer

from ..adapters.read_options import ReadOptions
from ..declared import Declared, declared
from ..errors import nearest_names

ADAPTER_OPTION = "--adapter-option"

SPOKEN: dict[str, str] = {entry.said.flag or name: name for name, entry in declared(ReadOptions).items() if not entry.said.allow}
"""The fields of `ReadOptions` by their name after ``--adapter-option``."""


def parse_adapter(text: str) -> tuple[str, float]:
    """(path, weight) of ``PATH`` or ``PATH@WEIGHT``; a path that exists is taken whole.

    >>> parse_adapter("style@0.7"), parse_adapter("style")
    (('style', 0.7), ('style', 1.0))
    """
    path, at, weight = text.rpartition("@")
    if not at or os.path.lexists(text):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not path:
        raise typer.BadParameter(f"'{text}': after @ comes the adapter's weight, a finite number such as 0.7", param_hint="ADAPTER")
    return path, value


def parse_adapter_options(texts: Sequence[str], paths: Sequence[str]) -> list[dict[str, Any]]:
    """The fields of `ReadOptions` for each of the adapters at `paths`, of ``NAME=VALUE`` and ``ADAPTER:NAME=VALUE``.

    >>> parse_adapter_options(["lora_alpha=16", "b:lora_alpha=8", "b:map=h=layers"], ["a", "b"])
    [{'lora_alpha': 16.0}, {'lora_alpha': 8.0, 'renames': (('h', 'layers'),)}]
    """
    of_all: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in paths]
    for text in texts:
        path = max((path for path in paths if text.startswith(f"{path}:")), key=len, default=None)
        rest = text if path is None else text[len(path) + 1 :]
        name, _, word = rest.partition("=")
        entry = _adapter_option(name, text, paths)
        targets = [of_all] if path is None else [own[i] for i, each in enumerate(paths) if each == path]
        for target in targets:
            value = _value(entry, word, text)
            target[entry.name] = (*target.get(entry.name, ()), *value) if entry.name == "renames" else value
    return [{**of_all, **each} for each in own]


def _adapter_option(name: str, text: str, paths: Sequence[str]) -> Declared:
    spoken = name.replace("-", "_")
    if spoken in SPOKEN:
        return declared(ReadOptions)[SPOKEN[spoken]]
    where, colon, last = name.rpartition(":")
    if colon and last.replace("-", "_") in SPOKEN:
        raise _bad(f"'{text}': {where} is none of the adapters: {', '.join(paths)}")
    near = nearest_names(spoken, list(SPOKEN))
    hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(SPOKEN)}"
    raise _bad(f"'{text}': {name or 'nothing'} is no option of an adapter; {hint}")


def _value(entry: Declared, word: str, text: str) -> Any:
    """The value of the adapter option `entry` that `word` stands for."""
    value: Any = word
    if entry.kind is bool:
        value = {"": True, "true": True, "false": False}.get(word)
    elif entry.choices:
        value = next((choice for choice in entry.choices if str(choice) == word), None)
    elif entry.kind is float:
        value = parse_number(word)
    elif entry.name == "renames":
        old, equals, new = word.partition("=")
        value = ((old, new),) if equals and old and "=" not in new else None
    elif entry.kind is tuple:
        words = word.split(",")
        value = tuple(each == "true" for each in words) if {*words} <= {"true", "false"} and "true" in words else None
    if value is None or value == "":
        raise _bad(f"'{text}': write {spoken_name(entry)}={values_of(entry)}")
    return value


def spoken_name(entry: Declared) -> str:
    """The name of the field `entry` of `ReadOptions` after ``--adapter-option``."""
    return entry.said.flag or entry.name


def values_of(entry: Declared) -> str:
    """What can stand after the name of the field `entry` and =."""
    if entry.kind is bool:
        return "true"
    return "|".join(map(str, entry.choices)) or entry.said.metavar


def parse_number(word: str) -> float | None:
    """The finite number that `word` is; None where it is none."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _bad(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=ADAPTER_OPTION)


def parse_pairs(texts: Sequence[str]) -> dict[str, str]:
    """Values by name, of ``NAME=VALUE`` each; the last = counts, since names of files may hold some.

    >>> parse_pairs(["model.safetensors=ab"])
    {'model.safetensors': 'ab'}
    """
    parts = [text.rpartition("=") for text in texts]
    return {name or value: value if name else "" for name, _, value in parts}
