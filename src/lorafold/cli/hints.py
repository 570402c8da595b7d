"""Options in the words of the command line: what an error or a note says in Python's words, said in flags.

Text below the command line names an option as Python takes it, between backquotes: `restart=True`, `ReadOptions(lora_alpha=16)`.
"""

from __future__ import annotations

import re

from ..adapters.options import ReadOptions
from ..declared import Declared, declared, every
from ..options import ConvertOptions, MatchOptions, RunOptions, SumOptions
from .arguments import ADAPTER_OPTION, spoken_name, values_of
from .flags import ALLOW, flag_name

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
