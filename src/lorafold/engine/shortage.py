"""Saying for which tensor memory ran out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ..errors import memory_shortage, printable
from ..planning.plan import Step


class OfStep(Protocol):
    """What is a part of a step's tensor."""

    @property
    def step(self) -> Step:
        """The step."""


Part = TypeVar("Part", bound=OfStep)
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def naming_the_tensor(work: Callable[Concatenate[Part, Rest], Result]) -> Callable[Concatenate[Part, Rest], Result]:
    """`work`, which is given a part of a step's tensor, raising `MemoryShortageError` with its name where memory runs out."""

    @wraps(work)
    def named(part: Part, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        try:
            return work(part, *args, **kwargs)
        except (MemoryError, RuntimeError) as cause:
            shortage = memory_shortage(cause, f"at tensor '{printable(part.step.tensor)}'")
            if shortage is None:
                raise
            raise shortage from cause

    return named
