"""What every verb of the Python interface has: its options by name, a line in the log, and warnings.

The parameters are shown by `help` and `inspect.signature`, and a name that is none of them is an error. Warnings are given once, at
the line that called the verb.

logging.basicConfig(level="INFO")                         # a line for each verb; DEBUG: two for each phase too
warnings.simplefilter("error", lorafold.LorafoldWarning)  # an error where a merge kept less than 0.9 of the update
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from ..declared import every, lines
from ..errors import LorafoldWarning, nearest_names
from ..files.progress import LOG
from ..text import Summary

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


class Outcome(Protocol):
    """What a verb returns, or several of them."""

    def summary(self) -> Summary:
        """The outcome, for people."""
        ...


Result = TypeVar("Result", bound=Outcome | Sequence[Outcome])

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)
_PACKAGE = str(Path(__file__).parents[1]) + "/"


def tells(verb: Callable[P, Result]) -> Callable[P, Result]:
    """`verb`, which logs what came of it and warns its caller of what its outcome warns of; not where another verb called it."""

    @functools.wraps(verb)
    def told(*args: P.args, **kwargs: P.kwargs) -> Result:
        if _INSIDE.get():
            return verb(*args, **kwargs)
        token = _INSIDE.set(True)
        try:
            result = verb(*args, **kwargs)
        finally:
            _INSIDE.reset(token)
        for each in result if isinstance(result, Sequence) else [result]:
            if LOG.isEnabledFor(logging.INFO):
                LOG.info("%s: %s", verb.__name__, each.summary().title)
            if found := getattr(each, "warnings", ()):
                where = f"{each.summary().title}: " if isinstance(result, Sequence) else ""
                warnings.warn(where + "\n".join(found), LorafoldWarning, stacklevel=_outside())
        return result

    return told


def _outside() -> int:
    """How far up, for who calls this, the first frame is that is none of the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level
