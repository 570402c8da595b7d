"""Patterns from an adapter's configuration, matched in bounded time.

They are regular expressions that a stranger wrote, and Python's own matcher takes exponential time for some. Here a pattern is
read into a tree, and matching goes through the tree once with the set of all places that it can have reached: the time grows
with the pattern's length times the name's. What that cannot do (back-references, changes of flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

LONGEST = 4096
"""Characters of a pattern."""

_MOST_STEPS = 20_000
"""Places in a tree that one match may visit; a pattern that people write takes some hundreds."""


class PatternError(ValueError):
    """A pattern that is no regular expression, or not one that can be matched in bounded time."""


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` matches the whole of `text`, as `re.fullmatch` decides.

    Raises `PatternError`.

    >>> matches(r"model\\.layers\\.(\\d+)\\.q_proj", "model.layers.11.q_proj"), matches("(a+)+b", "a" * 200)
    (True, False)
    """
    if _nothing_twice(pattern):
        return _compiled(pattern).fullmatch(text) is not None
    return len(text) in _Walk(text).ends(parse(pattern), {0})


def matches_end(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name`, or all of it that comes after one of its dots: PEFT's `get_pattern_key`.

    Raises `PatternError`.

    >>> matches_end("q_proj", "layers.0.q_proj"), matches_end("proj", "layers.0.q_proj")
    (True, False)
    """
    whole = rf"(.*\.)?({pattern})"
    return _compiled(whole).fullmatch(name) is not None if _nothing_twice(pattern) else matches(whole, name)


_SPECIAL = re.compile(r"[*+?{(|]")


def _nothing_twice(pattern: str) -> bool:
    """Whether it is letters and single characters alone, of which `re` tries none twice."""
    return len(pattern) <= LONGEST and not _SPECIAL.search(pattern)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as cause:
        raise PatternError(str(cause)) from None


_PLAIN = re.compile(r"[\w.-]*")


class UnmatchablePatternError(PatternError):
    """A `PatternError` that knows its `pattern`."""

    def __init__(self, pattern: str, cause: PatternError) -> None:
        super().__init__(str(cause))
        self.pattern = pattern


def is_name(pattern: str) -> bool:
    """Whether each character of `pattern` stands for itself, or is a dot.

    >>> is_name("layers.0.q_proj"), is_name("layers.*"), is_name(r"q\\_proj")
    (True, False, False)
    """
    return len(pattern) <= LONGEST and _PLAIN.fullmatch(pattern) is not None


def checked(pattern: str) -> None:
    """Nothing, where `pattern` can be matched; raises `PatternError` otherwise."""
    if not is_name(pattern):
        parse(pattern)


class PatternLookup:
    """Patterns in their order; `fits` is what `matches_end` says of each of them, at a cost that does not grow with the names.

    A name (PEFT writes a whole one for each module whose rank differs) is a pattern too: its dots stand for any character.
    Names of one length, with dots in the same places, are looked up together.

    >>> list(PatternLookup(["v_proj", "layers.*proj", "0.q_proj"]).fits("layers.0.q_proj"))
    ['layers.*proj', '0.q_proj']
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._all = tuple(patterns)
        self._others: list[int] = []
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}  # length → places of the dots → name → its number
        for number, pattern in enumerate(self._all):
            if is_name(pattern):
                dots = tuple(at for at, character in enumerate(pattern) if character == ".")
                self._names.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = number
            else:
                self._others.append(number)

    def fits(self, module: str) -> Iterator[str]:
        """The patterns that match `module`, or all of it after one of its dots, in their order.

        Raises `UnmatchablePatternError`, when the pattern's turn comes.
        """
        if "\n" in module:  # which no dot stands for
            named, others = [], list(range(len(self._all)))
        else:
            named, others = sorted(self._named(module)), self._others
        waiting = iter([*named, len(self._all)])
        following = next(waiting)
        for number in [*others, len(self._all)]:
            while following < number:
                yield self._all[following]
                following = next(waiting)
            if number < len(self._all) and self._matches(number, module):
                yield self._all[number]

    def _named(self, module: str) -> Iterator[int]:
        if not self._names:
            return
        start = 0
        while start >= 0:
            end = module[start:]
            for dots, names in self._names.get(len(end), {}).items():
                spelled = list(end)
                for at in dots:
                    spelled[at] = "."
                number = names.get("".join(spelled))
                if number is not None:
                    yield number
            start = module.find(".", start) + 1 or -1

    def _matches(self, number: int, module: str) -> bool:
        try:
            return matches_end(self._all[number], module)
        except PatternError as cause:
            raise UnmatchablePatternError(self._all[number], cause) from None


@dataclass(frozen=True)
class _Char:
    """One character, by the source of a regular expression for it."""

    source: str


@dataclass(frozen=True)
class _At:
    """A place: ``^``, ``$``, ``\\b`` or the like."""

    source: str


@dataclass(frozen=True)
class _Look:
    """What must, or must not, come next."""

    inner: _Node
    wanted: bool


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Either:
    choices: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    inner: _Node
    least: int
    most: int | None


_Node = _Char | _At | _Look | _Sequence | _Either | _Repeat


@cache
def parse(pattern: str) -> _Node:
    """The tree of `pattern`.

    Raises `PatternError`.
    """
    if len(pattern) > LONGEST:
        raise PatternError(f"it has {len(pattern)} characters, more than {LONGEST}")
    _compiled(pattern)
    parser = _PatternParser(pattern)
    try:
        tree = parser.either()
    except RecursionError:
        raise PatternError("it nests too deeply") from None
    if parser.at < len(pattern):
        raise PatternError(f"unbalanced at {parser.at}")
    return tree


class _PatternParser:
    """`re` has accepted the pattern: what is looked for here is its structure, and what is not supported."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def either(self) -> _Node:
        choices = [self.sequence()]
        while self.take("|"):
            choices.append(self.sequence())
        return choices[0] if len(choices) == 1 else _Either(tuple(choices))

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.repeated(self.atom()))
        return _Sequence(tuple(parts))

    def repeated(self, inner: _Node) -> _Node:
        found = _COUNT.match(self.pattern, self.at)
        if found is None or found[0] == "{,}":
            return inner
        self.at = found.end()
        if self.take("+"):
            raise PatternError("possessive repeats are not supported")
        self.take("?")  # lazy: which match is found first does not matter
        if found[0] in ("*", "+", "?"):
            return _Repeat(inner, int(found[0] == "+"), 1 if found[0] == "?" else None)
        least = int(found["least"] or 0)
        most = least if found["comma"] is None else int(found["most"]) if found["most"] else None
        return _Repeat(inner, least, most)

    def atom(self) -> _Node:
        if self.take("("):
            return self.group()
        found = _ATOM.match(self.pattern, self.at)
        if found is None:
            raise PatternError(f"what begins at {self.at} is not supported")
        self.at = found.end()
        source = found[0]
        if source in ("^", "$", r"\A", r"\Z", r"\b", r"\B"):
            return _At(source)
        if source[0] == "\\" and source[1] in "123456789":
            raise PatternError(f"the back-reference {source} is not supported")
        return _Char(source)

    def group(self) -> _Node:
        look: bool | None = None
        if self.take("?=") or self.take("?!"):
            look = self.pattern[self.at - 1] == "="
        elif not self.take("?:") and self.pattern.startswith("?", self.at):
            found = _NAME.match(self.pattern, self.at)
            if found is None:
                raise PatternError(f"the group at {self.at - 1} is of a kind that is not supported")
            self.at = found.end()
        inner = self.either()
        self.take(")")
        return inner if look is None else _Look(inner, look)

    def take(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True


_COUNT = re.compile(r"[*+?]|\{(?P<least>\d*)(?P<comma>,)?(?P<most>\d*)\}")
_ATOM = re.compile(r"\\0[0-7]{0,2}|\\x..|\\u.{4}|\\U.{8}|\\N\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\]", re.DOTALL)
_NAME = re.compile(r"\?P<\w+>")


class _Walk:
    """One match of a tree against `text`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0

    def ends(self, node: _Node, starts: set[int]) -> set[int]:
        """Every place that `node` can lead to from one of `starts`."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise PatternError("it takes too long to match")
        match node:
            case _Char(source):
                return {at + 1 for at in starts if at < len(self.text) and _is(source, self.text[at])}
            case _At(source):
                place = re.compile(source)
                return {at for at in starts if place.match(self.text, at)} if starts else starts
            case _Sequence(parts):
                for part in parts:
                    if not starts:
                        break
                    starts = self.ends(part, starts)
                return starts
            case _Either(choices):
                return set().union(*(self.ends(choice, starts) for choice in choices))
            case _Look(inner, wanted):
                return {at for at in starts if bool(self.ends(inner, {at})) is wanted}
            case _Repeat(inner, least, most):
                return self.repeats(inner, least, most, starts)

    def repeats(self, inner: _Node, least: int, most: int | None, starts: set[int]) -> set[int]:
        for _ in range(least):
            after = self.ends(inner, starts)
            if after == starts:  # it will stay so
                break
            starts = after
        reached, fresh = set(starts), starts
        count = least
        while fresh and (most is None or count < most):
            fresh = self.ends(inner, fresh) - reached
            reached |= fresh
            count += 1
        return reached


@cache
def _is(source: str, character: str) -> bool:
    return re.fullmatch(source, character) is not None
