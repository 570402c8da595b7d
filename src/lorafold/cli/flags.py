"""Flags made from option classes: their names, values, checks and sections in ``--help``. A flag is written nowhere else.

Text below the command line names an option as Python takes it, between backquotes: `restart=True`, `ReadOptions(lora_alpha=16)`.
`in_flags` says the same in flags.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..adapters.read_options import ReadOptions
from ..declared import Declared, declared, every
from ..options import ConvertOptions, MatchOptions, RunOptions, SumOptions
from .values import ADAPTER_OPTION, SPOKEN, parse_adapter, parse_adapter_options, parse_pairs, spoken_name, values_of

if TYPE_CHECKING:
    from ..api.given import AdapterLike


ALLOW = "--allow"


@dataclass(frozen=True)
class Chosen:
    """What was chosen by flags: `values` by option, those that were given; `adapter_options` as they were written."""

    values: dict[str, Any] = field(default_factory=dict)
    adapter_options: tuple[str, ...] = ()
    allow_pickle: bool = False

    def of(self, *classes: type) -> Any:
        """Those of `classes`, to hand on by name."""
        return {name: value for name, value in self.values.items() if name in every(classes)}

    def adapters(self, texts: Sequence[str]) -> list[AdapterLike]:
        """The adapters that were given as PATH or PATH@WEIGHT, each with how it is read."""
        paths = [parse_adapter(text) for text in texts]
        options = parse_adapter_options(self.adapter_options, [path for path, _ in paths])
        return [
            (path, weight, ReadOptions(**each, allow_pickle=self.allow_pickle))
            for (path, weight), each in zip(paths, options, strict=True)
        ]

    def reading(self, path: object) -> ReadOptions:
        """How the one adapter at `path` is read."""
        (options,) = parse_adapter_options(self.adapter_options, [str(path)])
        return ReadOptions(**options, allow_pickle=self.allow_pickle)


def flag_name(entry: Declared) -> str:
    """The flag of an option; of one that is on by default, the flag that turns it off."""
    name = (entry.said.flag or entry.name).replace("_", "-")
    return f"--no-{name}" if entry.said.off else f"--{name}"


def allowed(classes: Sequence[type]) -> dict[str, Declared]:
    """The options of `classes` by their word after ``--allow``."""
    return {entry.said.allow: entry for entry in every(tuple(classes)).values() if entry.said.allow}


def with_flags(*classes: type, reads: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command that takes `chosen`, which makes it one that takes a flag for each option of `classes`.

    `reads`: whether it reads adapters, and takes what is said about that
    """
    seen = (*classes, ReadOptions) if reads else classes
    flags = {entry.name: entry for entry in every(classes).values() if entry.said.shown and not entry.said.allow}
    words = allowed(seen)

    def of(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [each for each in own.parameters.values() if each.name != "chosen"]
        made = [_parameter(entry) for entry in flags.values()]
        if reads:
            made.append(_adapter_option())
        if words:
            made.append(_allow(list(words)))

        @functools.wraps(command)
        def with_chosen(**given: Any) -> None:
            taken = {each.name: given.pop(each.name) for each in made}
            allow = {words[word].name for word in taken.pop("allow", None) or ()}
            adapter_options = tuple(taken.pop("adapter_option", None) or ())
            values = {name: _value(flags[name], value) for name, value in taken.items() if value is not None and value is not False}
            values |= dict.fromkeys(allow - {"allow_pickle"}, True)
            command(**given, chosen=Chosen(values, adapter_options, "allow_pickle" in allow))

        with_chosen.__signature__ = own.replace(parameters=[*parameters, *made])  # type: ignore[attr-defined]
        with_chosen.__annotations__ = {each.name: each.annotation for each in (*parameters, *made)}
        with_chosen.option_classes = seen  # type: ignore[attr-defined]
        return with_chosen

    return of


def _parameter(entry: Declared) -> inspect.Parameter:
    """What typer makes the flag of `entry` of."""
    words: dict[str, Any] = {"help": entry.said.off or entry.said.doc, "rich_help_panel": entry.section}
    if entry.kind is bool:
        return _made(entry.name, bool, False, typer.Option(flag_name(entry), **words))
    choices = entry.said.choices or tuple(map(str, entry.choices))
    kind: Any = str
    if choices:
        kind = _one_of(entry.name, choices)
    elif entry.kind is dict:
        kind = list[str]
    elif entry.kind is int and entry.said.read is None:
        kind = int
    default = entry.default if entry.default is None or not choices else kind(entry.default)
    option = typer.Option(flag_name(entry), metavar=entry.said.metavar or None, **words)
    return _made(entry.name, kind if default is not None else kind | None, default, option)


def _one_of(name: str, words: Sequence[str]) -> Any:
    """The type of a flag whose value is one of `words`."""
    members: Any = {word: word for word in words}
    return StrEnum(name, members)


def _made(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _value(entry: Declared, word: Any) -> Any:
    """The option that a flag's `word` is.

    Raises `typer.BadParameter` naming the flag where it is none.
    """
    if entry.said.off:
        return False
    value: Any = str(word) if isinstance(word, StrEnum) else word
    if entry.kind is dict:
        value = parse_pairs(value)
    try:
        return entry.check(value)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix(f"{entry.name} "), param_hint=flag_name(entry)) from None


def _adapter_option() -> inspect.Parameter:
    option = typer.Option(
        ADAPTER_OPTION,
        help="What the files of an adapter leave open: of all adapters, or of ADAPTER alone.",
        metavar="[ADAPTER:]NAME=VALUE",
        rich_help_panel=ReadOptions.section,
    )
    return _made("adapter_option", list[str] | None, None, option)


def _allow(words: list[str]) -> inspect.Parameter:
    kind: Any = list[_one_of("Allowed", words)]  # type: ignore[misc]  # made from data
    option = typer.Option(ALLOW, help="Accept what is refused by default; once for each.", rich_help_panel="What is allowed")
    return _made("allow", kind | None, None, option)


class SectionedCommand(TyperCommand):
    """A command whose options stand under the heading of their class: plain text that reads at 80 columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                usual = "Arguments" if argument else "Options"
                record = (record[0].partition(" <")[0], record[1]) if argument else record
                name = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(name, []).extend(self._rows(parameter.name or "", record))
        for name, rows in sections.items():
            with formatter.section(name):
                formatter.write_dl(rows)

    def _rows(self, name: str, record: tuple[str, str]) -> list[tuple[str, str]]:
        """The lines for the option `name`: one, but for options of which each value is explained."""
        if name == "allow":
            words = allowed(getattr(self.callback, "option_classes", ()))
            return [(f"{ALLOW} {word}", entry.said.doc) for word, entry in words.items()]
        if name == "adapter_option":
            entries = [(spoken, declared(ReadOptions)[field]) for spoken, field in SPOKEN.items()]
            return [record, *((f"  {spoken}={values_of(entry)}", entry.said.doc) for spoken, entry in entries)]
        return [record]


_OWN = {"base": "--base", "adapters": "--adapter", "undo": "--undo"}
"""Arguments of verbs that are no options there, and their flags."""

_NAMED = re.compile(r"`(?:(ReadOptions)\()?([a-z_0-9]+)=([^`]*?)\)?`")


def in_flags(text: str) -> str:
    """`text` with the options that it names in Python's words named by their flags.

    >>> in_flags("add `restart=True`, or `rounding='stochastic'`; allow it: `allow_partial=True`")
    'add --restart, or --rounding stochastic; allow it: --allow partial'
    >>> in_flags("give it: `ReadOptions(lora_alpha=16)`, or `ReadOptions(enable_lora=(True, False))`")
    'give it: --adapter-option lora_alpha=16, or --adapter-option enable_lora=true,false'
    >>> in_flags("`verify=False`, `max_memory=…`, `base=BASE`, `nothing=3`")
    '--no-verify, --max-memory SIZE, --base BASE, `nothing=3`'
    """
    return _NAMED.sub(lambda found: _flag(found[2], found[3]) or found[0], text)


def meant_instead(flag: str) -> str | None:
    """What to write instead of `flag`, which there is not, where it is the name of an option that is said in another way.

    >>> meant_instead("--lora-alpha"), meant_instead("--allow-partial"), meant_instead("--merge-again"), meant_instead("--x")
    ('write --adapter-option lora_alpha=ALPHA', 'write --allow partial', 'write --allow merge-again', None)
    """
    name = flag.lstrip("-").replace("-", "_")
    name = {"map": "renames"}.get(name, name)
    options = every((SumOptions, MatchOptions, RunOptions, ConvertOptions, ReadOptions))
    said = _flag(name, "…") if name in options else None
    return None if said is None or said.split()[0] == flag else f"write {said}"


def _flag(name: str, value: str) -> str | None:
    options = every((SumOptions, MatchOptions, RunOptions, ConvertOptions))
    if name in declared(ReadOptions):
        entry = declared(ReadOptions)[name]
        if not entry.said.allow:
            return f"{ADAPTER_OPTION} {spoken_name(entry)}={_word(entry, value)}"
        return f"{ALLOW} {entry.said.allow}"
    if name in options:
        entry = options[name]
        if entry.said.allow:
            return f"{ALLOW} {entry.said.allow}"
        return flag_name(entry) if entry.kind is bool else f"{flag_name(entry)} {_word(entry, value)}"
    return f"{_OWN[name]} {value}" if name in _OWN else None


def _word(entry: Declared, value: str) -> str:
    """A value in Python's words as it is written on the command line."""
    if value in ("…", "..."):
        return entry.said.metavar or values_of(entry)
    if entry.name == "renames":
        return "=".join(re.findall(r"'([^']*)'", value)) or value
    if entry.kind is bool:
        return value.lower()
    return ",".join(part.strip(" ()'\"").replace("True", "true").replace("False", "false") for part in value.split(",") if part)
