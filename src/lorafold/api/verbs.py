"""Verbs that take options by name: their parameters for `help` and `inspect.signature`, and an error for a name that is none."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ..declared import every, lines
from ..errors import nearest_names

P = ParamSpec("P")
R = TypeVar("R")

MARK = "- `**options`: as listed below\n"
"""The line of a verb's docstring that the list of its options takes the place of."""


def takes(*classes: type, live: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a verb whose ``**options`` are the fields of `classes`; `live`: those that hold for a model in memory.

    The verb raises `TypeError` for another name, saying which was meant.
    """
    options = every(classes, live=live)

    def of(verb: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(verb)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.annotation)
            for name, each in options.items()
        ]
        names = {each.name for each in own} | options.keys()

        @functools.wraps(verb)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in names:
                    raise _unexpected(verb.__name__, name, names)
            return verb(*args, **kwargs)

        checked.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        if checked.__doc__ is not None:
            listed = "".join(f"    {line}\n" for line in lines(classes, live=live))
            checked.__doc__ = checked.__doc__.replace(f"    {MARK}", listed)
        return checked

    return of


def _unexpected(verb: str, name: str, known: set[str]) -> TypeError:
    near = nearest_names(name, sorted(known))
    return TypeError(f"{verb}() has no option '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
