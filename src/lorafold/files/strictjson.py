"""JSON as the standard has it, and no more: what the usual reader lets through changes a merge without a word.

Two keys of the same name (the last wins), NaN and Infinity (not JSON), 1e400 (read as infinity), text that is not UTF-8,
nesting that exhausts the stack: each is an error here that names the file and the key. What the fields mean is for others.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from .regular import read_regular


def parse(text: str | bytes, source: str, *, error: type[InputError] = InputError, allow_nonfinite: bool = False) -> Any:
    """The value that `text` holds; `source` names it in errors. `allow_nonfinite` admits the literals NaN, Infinity and -Infinity
    (the `config.json` of some models has them), not numbers that overflow to them.

    Raises `error` where the text is not UTF-8, not JSON, has a key twice in one object, a number that is not finite or has too
    many digits, a half of a surrogate pair, or nests too deeply.

    >>> parse('{"r": 8, "r": 4}', "adapter_config.json")
    Traceback (most recent call last):
        ...
    lorafold.errors.InputError: adapter_config.json: the key 'r' stands twice in one object
    """
    return _JsonParser(printable(source), error, allow_nonfinite).parse(text)


CONFIG_LIMIT = 32 * 1024 * 1024
"""Bytes of the longest configuration that is read; the longest that are published, with the names of 20,000 classes, have 2 MB."""


def load(path: Path, *, error: type[InputError] = InputError, allow_nonfinite: bool = False, limit: int = CONFIG_LIMIT) -> Any:
    """The value in the regular file at `path`. Raises `error` as `parse` does, and where it cannot be read or exceeds `limit`."""
    return parse(read_regular(path, limit, error=error), str(path), error=error, allow_nonfinite=allow_nonfinite)


def canonical(value: Any) -> str:
    """`value` as JSON with sorted keys, no spaces and ASCII only: equal values give equal text, for hashing.

    >>> canonical({"b": [1, 2.5], "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_INTEGER = 400  # digits; a float64 has 309 before its point
_DEEPEST = 200  # what works on the value goes through it by recursion


@dataclass(frozen=True)
class _NotFinite:
    """Stands in a parsed value for a number that is refused once its key is known."""

    text: str


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [x for each in level if isinstance(each, (dict, list)) for x in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


class _JsonParser:
    def __init__(self, source: str, error: type[InputError], allow_nonfinite: bool) -> None:
        self.source, self.error, self.allow_nonfinite = source, error, allow_nonfinite
        self.refused = False  # a _NotFinite is somewhere in what has been parsed so far

    def parse(self, text: str | bytes) -> Any:
        try:
            text = text.decode("utf-8") if isinstance(text, bytes) else text
            numbers: dict[str, Any] = {"parse_constant": self._constant, "parse_float": self._float, "parse_int": self._int}
            value = json.loads(text, object_pairs_hook=self._object, **numbers)
            if self.refused:
                self._require_finite("the value", value)
            if _is_deep(value):
                raise RecursionError
        except UnicodeDecodeError as cause:
            raise self._fail(f"not UTF-8 text: byte {cause.start} is 0x{cause.object[cause.start]:02x}") from None
        except json.JSONDecodeError as cause:
            raise self._fail(f"not JSON: {cause.msg}, line {cause.lineno} column {cause.colno}") from None
        except RecursionError:
            raise self._fail(f"nested too deeply: more than {_DEEPEST} objects or lists in each other") from None
        if _SURROGATE.search(text):
            try:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                raise self._fail("a string holds half of a surrogate pair, which is no character") from None
        return value

    def _fail(self, reason: str) -> InputError:
        return self.error(f"{self.source}: {reason}")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise self._fail(f"the key '{printable(twice)}' stands twice in one object")
        if self.refused:
            for key, value in pairs:
                self._require_finite(f"'{printable(key)}'", value)
        return result

    def _require_finite(self, where: str, value: Any) -> None:
        if isinstance(value, _NotFinite):
            raise self._fail(f"{where} is {printable(value.text)}, which is not a finite number")
        if isinstance(value, list):
            for element in value:
                self._require_finite(where, element)

    def _refuse(self, text: str) -> _NotFinite:
        self.refused = True
        return _NotFinite(text if len(text) <= 40 else f"{text[:20]}… ({len(text)} characters)")

    def _constant(self, text: str) -> float | _NotFinite:
        return float(text) if self.allow_nonfinite else self._refuse(text)

    def _float(self, text: str) -> float | _NotFinite:
        return value if math.isfinite(value := float(text)) else self._refuse(text)

    def _int(self, text: str) -> int | _NotFinite:
        return int(text) if len(text) <= _LONGEST_INTEGER else self._refuse(text)
