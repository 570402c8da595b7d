"""What transformers ties in which class of models, as `ties.json` has it: made by `scripts/make_ties.py`, never by hand.

A class is known by the name that `architectures` in config.json gives; by `model_type` alone where that leaves no doubt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Flag:
    """What decides whether a tie is in force.

    - `at`: the part of config.json whose flag it is, "" for the top; `other`: another part whose flag has a say
    - `table`: T or F for the flag at `at` absent, true, false, and for each of these `other`'s absent, true, false
    - `older`: another name of the field, which counts for more
    - `means_more`: whether false cannot be said, or changes more than the tie
    """

    at: str
    table: str
    other: str | None = None
    older: str | None = None
    means_more: bool = False

    def in_force(self, config: Mapping[str, Any]) -> bool:
        """Whether the model with this config.json ties."""
        own, other = flag_at(config, self.at), None if self.other is None else flag_at(config, self.other)
        if self.older is not None and isinstance(older := config.get(self.older), bool):
            own = older
        return self.table[3 * _column(own) + _column(other)] == "T"

    def off(self, config: Mapping[str, Any]) -> dict[str, bool]:
        """The fields of config.json, by dotted path, that say that it does not tie; empty where that cannot be said."""
        if self.means_more:
            return {}
        fields = {_path(self.at, FLAG): False}
        if self.older is not None and isinstance(config.get(self.older), bool):
            fields[self.older] = False
        other = None if self.other is None else flag_at(config, self.other)
        if self.other is not None and self.table[6 + _column(other)] == "T":
            fields[_path(self.other, FLAG)] = False
        return fields

    def within(self, place: str) -> Flag:
        """The flag of a model whose configuration stands at `place` of another's."""
        other = None if self.other is None else _path(place, self.other)
        return replace(self, at=_path(place, self.at), other=other, older=None if self.older is None else _path(place, self.older))


@dataclass(frozen=True)
class KnownTie:
    """Names of tensors that share their numbers, the one that the others are tied to first: of modules, and in files."""

    names: tuple[str, ...]
    stored: tuple[str, ...]
    flag: Flag

    def within(self, module: str, place: str) -> KnownTie:
        """The tie in a model that has this one as `module`."""
        names, stored = (tuple(f"{module}.{each}" for each in several) for several in (self.names, self.stored))
        return KnownTie(names, stored, self.flag.within(place))


@dataclass(frozen=True)
class KnownModel:
    """What is known of a class of models.

    - `ties`: all that it may tie; `prefix`: how its names begin in a file that has the model without its header, or does not
    - `embedding`: the tensor that embeds its tokens, by its module's name
    - `seen`: whether PEFT sees ties in parts of it where config.json does not have the flag at the top; None where it never does
    - `computes`: whether the embedding's module does more with a row than to scale it
    - `varies`: whether what is tied depends on fields that the table does not have, such as the number of layers
    """

    ties: tuple[KnownTie, ...] = ()
    prefix: str = ""
    embedding: str | None = None
    varies: bool = False
    seen: bool | None = None
    computes: bool = False

    def shows(self, tie: KnownTie, config: Mapping[str, Any]) -> bool:
        """Whether PEFT sees `tie`, which is in force."""
        top = flag_at(config, "")
        return not tie.flag.at or (self.seen is not None and (self.seen if top is None else top))

    def numbered(self, tensor: str) -> bool:
        """Whether `tensor` has the name of one that is tied, but for numbers."""
        form = re.sub(r"\d+", "0", tensor)
        return any(re.sub(r"\d+", "0", name) == form for tie in self.ties for name in (*tie.names, *tie.stored))


NOTHING = KnownModel()
"""Of a model that ties nothing."""


def known_model(config: Mapping[str, Any]) -> KnownModel | None:
    """What is known of the model with this config.json; None where it is of no class that transformers has."""
    table, architectures = _table(), config.get("architectures")
    named = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if named and named[0] in table["classes"]:
        return _model(named[0], config)
    if named and "auto_map" in config:
        return None  # code of its own
    kinds = table["types"].get(_text(config.get("model_type")), ())
    models = [_model(kind, config) for kind in kinds]
    tying = [model for model in models if model.ties or model.varies]
    if not tying:
        return KnownModel() if kinds else None
    agree = all({tie.names for tie in model.ties} == {tie.names for tie in tying[0].ties} for model in tying)
    return tying[0] if agree else None


def ends_elsewhere() -> tuple[Collection[str], Collection[str]]:
    """The last names of modules that embed tokens, and of those that turn hidden states into logits, in any known model."""
    return frozenset(_table()["embeddings"]), frozenset(_table()["heads"])


def has_vocabulary(config: Mapping[str, Any] | None) -> bool:
    """Whether a model with this config.json may embed tokens: not where it nowhere states the size of a vocabulary."""
    return config is None or _states(config, "vocab_size")


def flag_at(config: Mapping[str, Any], place: str) -> bool | None:
    """`tie_word_embeddings` in the part of config.json at `place`; None where it is not said."""
    part = _part(config, place)
    value = None if part is None else part.get(FLAG)
    return value if isinstance(value, bool) else None


def _model(kind: str, config: Mapping[str, Any], depth: int = 0) -> KnownModel:
    entry = _table()["models"][_table()["classes"][kind]]
    ties = [
        KnownTie(tuple(tie["names"]), tuple(tie.get("stored", tie["names"])), Flag(**tie["flag"])) for tie in entry.get("ties", ())
    ]
    embedding, varies = entry.get("input"), bool(entry.get("varies"))
    varies = varies or any(config.get(field, value) != value for field, value in entry.get("where", {}).items())
    for module, (place, asked) in entry.get("nested", {}).items():
        part = _part(config, place)
        inner = None if part is None else _asked(asked, _text(part.get("model_type")))
        if part is None or inner is None or depth > 3:
            varies = True
            continue
        model = _model(inner, part, depth + 1)
        ties += [tie.within(module, place) for tie in model.ties]
        varies = varies or model.varies
        if embedding is not None and embedding.startswith(f"{module}."):
            embedding = None if model.embedding is None else f"{module}.{model.embedding}"
    return KnownModel(tuple(ties), entry.get("prefix", ""), embedding, varies, entry.get("seen"), bool(entry.get("computes")))


def _text(value: Any) -> str:
    """`value` where it is a text, as a field of a configuration should be; else an empty one, which names nothing."""
    return value if isinstance(value, str) else ""


def _asked(asked: str, model_type: str) -> str | None:
    """The class that transformers makes where it is asked for one of a kind; where no decoder is meant, one with an encoder."""
    auto = _table()["auto"]
    kinds = [asked, "seq2seq"] if asked == "causal" else [asked]
    found = next((auto[kind][model_type] for kind in kinds if model_type in auto[kind]), None)
    return found if found in _table()["classes"] else None


def _states(config: Any, field: str) -> bool:
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if part.get(field) is not None:
                return True
            parts += part.values()
    return False


def _part(config: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    for name in place.split(".") if place else ():
        found = config.get(name)
        if not isinstance(found, Mapping):
            return None
        config = found
    return config


def _path(place: str, field: str) -> str:
    return ".".join(part for part in (place, field) if part)


def _column(said: bool | None) -> int:
    return 0 if said is None else 1 if said else 2


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("ties.json").read_text())
    return found
