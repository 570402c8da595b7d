"""What a verb tells beside what it returns: a line in the log, and warnings, once, at the line that called it.

logging.basicConfig(level="INFO")                         # a line for each verb; DEBUG: two for each phase too
warnings.simplefilter("error", lorafold.LorafoldWarning)  # an error where a merge kept less than 0.9 of the update
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from ..errors import LorafoldWarning
from ..files.progress import LOG
from ..text import Summary


class Outcome(Protocol):
    """What a verb returns, or several of them."""

    def summary(self) -> Summary:
        """The outcome, for people."""
        ...


P = ParamSpec("P")
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
