"""What a field of an option class says of itself, and the checks that follow from it: the same in Python and on the command line.

A class of options is a frozen dataclass whose fields are made by `option`. What says a field once: its name, type, default, one
sentence on it, and where it differs from what can be told by those, its flag. From that come the checks here, the signatures and
docstrings of the verbs (`api/verbs.py`) and the flags of the commands (`cli/flags.py`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Said:
    """What a field says of itself beside its name, type and default.

    - `doc`: a sentence; `off`: that of the flag that turns it off, where it is on by default
    - `metavar`: the word for a value in help texts; `choices`: the values that the command line offers, where the type has no list
    - `accepts`: the type that callers may give, where `read` makes the field's own of it
    - `read`: makes the value of what was given; raises `ValueError` with what is wrong
    - `least`: of a number
    - `allow`: its word after ``--allow``; `flag`: the name of its flag, where that is not its own
    - `live`: whether it holds for a model in memory too
    - `shown`: whether it has a flag
    """

    doc: str
    off: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    accepts: str = ""
    read: Callable[[Any], Any] | None = None
    least: int | None = None
    allow: str = ""
    flag: str = ""
    live: bool = False
    shown: bool = True


def option(default: Any, doc: str, **said: Any) -> Any:
    """A field of a class of options; `said` as the fields of `Said`."""
    return dataclasses.field(default=default, metadata={"said": Said(doc, **said)})


@dataclasses.dataclass(frozen=True)
class Declared:
    """A field of an option class: `name`, `hint` (its type), `default`, what is `said` of it, and what callers may give."""

    name: str
    hint: Any
    default: Any
    said: Said
    annotation: str
    section: str

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it can have; empty where these are not listed."""
        for hint in _alternatives(self.hint):
            if get_origin(hint) is Literal:
                return get_args(hint)
        return ()

    @property
    def kind(self) -> type:
        """bool, int, float, str, tuple, or dict: what a value is, where it is not None."""
        hint = next(hint for hint in _alternatives(self.hint) if hint is not type(None))
        origin = get_origin(hint) or hint
        if origin is Literal:
            return type(get_args(hint)[0])
        if origin in (bool, int, float, str, tuple):
            return origin  # type: ignore[no-any-return]
        return dict if isinstance(origin, type) and issubclass(origin, Mapping) else str

    def check(self, value: Any) -> Any:
        """`value` as the field holds it.

        Raises `ValueError` where it cannot be that.
        """
        if value is None and self.default is None:
            return None
        if self.said.read is not None:
            try:
                value = self.said.read(value)
            except ValueError as error:
                raise ValueError(f"{self.name} must be {error}, not {value!r}") from None
        wanted = self._wanted(value)
        if wanted:
            raise ValueError(f"{self.name} must be {wanted}, not {value!r}")
        return value

    def _wanted(self, value: Any) -> str:
        """What the value must be, in words; empty where it is that."""
        if self.choices:
            fits = any(type(value) is type(choice) and value == choice for choice in self.choices)
            return "" if fits else " or ".join(map(repr, self.choices))
        if self.kind is bool:
            return "" if isinstance(value, bool) else "True or False"
        if self.kind is int:
            if type(value) is not int:
                return "an integer"
            return "positive" if self.said.least == 1 and value < 1 else ""
        if self.kind is float:
            return "" if type(value) in (int, float) and math.isfinite(value) else "a finite number"
        if self.kind is str:
            return "" if isinstance(value, str) or (isinstance(value, os.PathLike) and "PathLike" in self.annotation) else "text"
        return ""


def declared(cls: type[Any]) -> Mapping[str, Declared]:
    """The fields of the option class `cls` by name, in their order."""
    if cls not in _KNOWN:
        _KNOWN[cls] = types.MappingProxyType(_declared(cls))
    return _KNOWN[cls]


_KNOWN: dict[type[Any], Mapping[str, Declared]] = {}


def _declared(cls: type[Any]) -> dict[str, Declared]:
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for each in dataclasses.fields(cls):
        said = each.metadata["said"]
        annotation = said.accepts or str(each.type)
        found[each.name] = Declared(each.name, hints[each.name], each.default, said, annotation, getattr(cls, "section", ""))
    return found


def picked(cls: type[T], given: Mapping[str, object]) -> T:
    """The options of `cls` among those `given` by name, the others as they are by default.

    Raises what `cls` does where one cannot have its value.
    """
    return cls(**{name: given[name] for name in _names(cls) if name in given})


def lines(classes: tuple[type, ...], *, live: bool = False) -> Iterator[str]:
    """A line of a docstring for each option; `live`: of those that hold for a model in memory."""
    for entry in every(classes, live=live).values():
        choices = f" One of {', '.join(map(repr, entry.choices))}." if entry.choices else ""
        yield f"- `{entry.name}`: {entry.said.doc}{choices}"


def every(classes: tuple[type, ...], *, live: bool = False) -> dict[str, Declared]:
    """The fields of all `classes`; `live`: of those that hold for a model in memory."""
    return {name: entry for cls in classes for name, entry in declared(cls).items() if entry.said.live or not live}


def described(cls: type[T]) -> type[T]:
    """`cls` with a docstring that lists its fields."""
    classes: tuple[type, ...] = (cls,)
    if cls.__doc__ is not None:
        cls.__doc__ = "\n".join([cls.__doc__.rstrip(), "", *lines(classes)])
    return cls


_UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("", "i")}


def read_size(given: int | str) -> int:
    """Bytes of a size such as ``500MB``, ``4GiB`` or 1000000.

    >>> read_size("1.5kB"), read_size("2 MiB"), read_size(300)
    (1500, 2097152, 300)
    """
    if type(given) is int:
        if given <= 0:
            raise ValueError("positive")
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", given) if isinstance(given, str) else None
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise ValueError("a size such as 500MB, 4GiB or a number of bytes")
    return max(1, int(float(found[1]) * _UNITS[found[2].lower()]))


def read_hashes(given: Mapping[str, str]) -> dict[str, str]:
    """sha256 by file name, in small letters.

    >>> read_hashes({"model.safetensors": "A" * 64})["model.safetensors"][:3]
    'aaa'
    """
    if not isinstance(given, Mapping) or not all(isinstance(v, str) and re.fullmatch("[0-9a-fA-F]{64}", v) for v in given.values()):
        raise ValueError("64 hexadecimal digits by the name of a file")
    return {str(name): sha256.lower() for name, sha256 in given.items()}


def _names(cls: type[Any]) -> Iterator[str]:
    return (each.name for each in dataclasses.fields(cls))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
