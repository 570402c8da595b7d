"""Every error that lorafold raises on purpose, and how it prints.

::

    LorafoldError
    ├── UpdateError               factors of an update that do not fit each other or their weight
    ├── LayerError                a layer or model that cannot do what was asked of it
    ├── InputError                something given to lorafold is not what it must be
    │   ├── AdapterError          an adapter's files are damaged or contradict each other
    │   │   ├── AdapterConfigError        a field of its configuration
    │   │   └── UnsupportedAdapterError   a kind of adapter that cannot be merged (yet)
    │   ├── CheckpointError       a base checkpoint's files are damaged or contradict each other
    │   ├── UnmatchedAdapterError adapter modules for which the base has no tensor
    │   ├── AmbiguousNameError    adapter modules for which the base has several
    │   ├── ShapeMismatchError    an update that does not fit its tensor
    │   ├── NonFiniteError        NaN or infinity where a number must be
    │   ├── AlreadyMergedError    the adapter is in the base already
    │   └── PlanError             a plan that cannot be read, or is not of these files
    ├── OutputError               the output cannot be written where it was asked for
    │   └── OutputExistsError     something is there already
    ├── MemoryShortageError       the memory that this process may use is used up
    └── VerificationError         the written checkpoint is not what it must be

    LorafoldWarning               what was asked for is done, but is not what one may expect

An error holds its parts (`message`, `hint`) and prints as the message, a blank line, and ``hint: …``. What belongs here: the
types. What does not: the judgement of when to raise one.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Collection, Sequence


class LorafoldError(Exception):
    """Something went wrong in a way that has a name.

    `message` says what happened, to which tensor and file, what was expected and what was found; `hint` says what to do.

    >>> import lorafold
    >>> try:
    ...     lorafold.merge("bsae", ["adapter"], "out")
    ... except lorafold.LorafoldError as error:
    ...     print(type(error).__name__, "|", error.message, "|", error.hint)
    CheckpointError | bsae: no such folder or file | did you mean base?
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable_lines(message)  # whoever wrote it may have forgotten a name that came from a file
        self.hint = None if hint is None else printable_lines(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class LorafoldWarning(UserWarning):
    """What was asked for is done, but is not what one may expect: a merge that kept less than 0.9 of the update, say.

    Told by `warnings.warn`, once a call, at the line of the caller; the command line prints it.

    >>> import warnings, lorafold
    >>> warnings.simplefilter("error", lorafold.LorafoldWarning)  # to be stopped by it
    """


class UpdateError(LorafoldError, ValueError):
    """The factors of an update do not fit each other, or do not fit the weight."""


class LayerError(LorafoldError, ValueError):
    """A layer or a model cannot do what was asked of it."""


class InputError(LorafoldError, ValueError):
    """Something given to lorafold is not what it must be."""


class AdapterError(InputError):
    """An adapter's files are damaged or contradict each other."""


class AdapterConfigError(AdapterError):
    """A field of an adapter's configuration has a value that it cannot have."""


class UnsupportedAdapterError(AdapterError):
    """A kind of adapter that cannot be merged, or not yet."""


class CheckpointError(InputError):
    """A base checkpoint's files are damaged or contradict each other."""


class UnmatchedAdapterError(InputError):
    """Adapter modules for which the base checkpoint has no tensor.

    `unmatched` are the module names, `nearest` maps each to the most similar names of the base (possibly none).
    """

    def __init__(
        self,
        message: str,
        *,
        unmatched: Sequence[str],
        nearest: dict[str, list[str]],
        hint: str | None = None,
    ) -> None:
        lines = [message + ":"]
        for name in unmatched[:SHOWN]:
            near = f"   (did you mean {nearest[name][0]}?)" if nearest.get(name) else ""
            lines.append(f"  {name}{near}")
        if len(unmatched) > SHOWN:
            lines.append(f"  … and {len(unmatched) - SHOWN} more")
        super().__init__("\n".join(lines), hint=hint)
        self.unmatched = tuple(unmatched)
        self.nearest = nearest


class AmbiguousNameError(InputError):
    """Adapter modules that fit several places in the base checkpoint."""


class ShapeMismatchError(InputError):
    """An update or a replacement whose shape does not fit its tensor."""


class NonFiniteError(InputError):
    """NaN or infinity in an adapter, in a targeted base tensor, or in a merged one."""


class AlreadyMergedError(InputError):
    """The base's receipt says that this adapter has been merged into it."""


class PlanError(InputError):
    """A plan that cannot be read, or that was made for other files."""


class OutputError(LorafoldError):
    """The output cannot be written where it was asked for."""


class OutputExistsError(OutputError):
    """There is something at the output path already."""


class MemoryShortageError(LorafoldError, MemoryError):
    """The memory that this process may use is used up."""


class VerificationError(LorafoldError):
    """A written checkpoint is not what base and adapters say it must be; `failures` names each tensor and what is wrong."""

    exit_code = 3

    def __init__(self, message: str, *, failures: Sequence[str] = (), hint: str | None = None) -> None:
        lines = [message + (":" if failures else "")]
        lines += [f"  {failure}" for failure in failures[:SHOWN]]
        if len(failures) > SHOWN:
            lines.append(f"  … and {len(failures) - SHOWN} more")
        super().__init__("\n".join(lines), hint=hint)
        self.failures = tuple(failures)


SHOWN = 20
"""How many names an error lists; the rest are counted, and held in full in its fields."""


def memory_shortage(cause: BaseException, doing: str) -> MemoryShortageError | None:
    """The error to raise where memory ran out while `doing`, in words; None where `cause` is of something else."""
    text = str(cause)
    if not isinstance(cause, MemoryError) and not any(words in text for words in _SHORT):
        return None
    if isinstance(cause, MemoryShortageError):
        return cause
    return MemoryShortageError(
        f"memory ran out {doing}" + (f": {text.splitlines()[0]}" if text else ""),
        hint="allow this process more, or have it use less with `max_memory=…`",
    )


_SHORT = ("can't allocate memory", "not enough memory", "can't start new thread", "CUDA out of memory")
"""What torch and Python say of it in errors of the general kind."""


def nearest_names(name: str, names: Collection[str], count: int = 1) -> list[str]:
    """The `count` most similar of `names`, best first; none when nothing is similar.

    >>> nearest_names("self_attn.q_prj", ["self_attn.q_proj", "mlp.up_proj"])
    ['self_attn.q_proj']
    """
    if len(name) > _LONGEST:
        return []
    near: Collection[str] = [each for each in names if len(each) <= _LONGEST]
    if len(near) > _COMPARED:  # comparing takes a millisecond each
        near = heapq.nlargest(_COMPARED, near, key=lambda each: _ends_alike(name, each))
    return difflib.get_close_matches(name, near, n=count, cutoff=0.6)


_COMPARED = 256
"""Names that are compared letter by letter, of more those whose ends are most alike."""

_LONGEST = 512
"""Characters of the longest name that is compared."""


def _ends_alike(name: str, other: str) -> int:
    """How many letters the two have in common at their beginning, and at their end."""
    start = _first_difference(name, other)
    return start + _first_difference(name[:start:-1], other[:start:-1])


def _first_difference(name: str, other: str) -> int:
    return next((i for i, (one, two) in enumerate(zip(name, other, strict=False)) if one != two), min(len(name), len(other)))


def printable_lines(text: str) -> str:
    """`text` with the control characters of each of its lines escaped; line ends stay."""
    return "\n".join(printable(line) for line in text.split("\n"))


def printable(name: str) -> str:
    """`name` with control characters escaped, so that a name from a file cannot drive a terminal.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if name.isprintable():  # at once, as nearly all are
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
