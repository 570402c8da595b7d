"""What transformers calls the tensors of a model, from what the files of its makers call them: its own conversion mapping, as data.

`transformers.json` is made by `scripts/make_names.py` from the version that it states. A checkpoint keeps the makers' names, also
when transformers saves it; adapters trained on the model have transformers'. Whether they fit is for the prefix to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from ...checkpoints.conv1d import model_types

_TABLE = Path(__file__).with_name("transformers.json")


@dataclass(frozen=True)
class Renaming:
    """One step of the way from the makers' names to transformers'.

    - `old`: patterns, of which the first that is found in a name is replaced by the one of `new` beside it
    - `together`: none counts where no name has the first of `old`, since new names then look like old ones
    - `parts`: the weight of that name is cut into equal parts, called by each of `new` in turn
    - `joined`: the weights of all of `old` are one after the other that of `new`
    """

    old: tuple[re.Pattern[str], ...]
    new: tuple[str, ...]
    together: bool = False
    parts: bool = False
    joined: bool = False


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(_TABLE.read_text(encoding="utf-8")))


@cache
def known_types() -> frozenset[str]:
    """Every `model_type` that transformers has a class for."""
    return frozenset(_table()["model_types"])


@cache
def _renamings(key: str, inside: bool) -> tuple[Renaming, ...]:
    """Those of the model type or class `key`; `inside`: where it is a part of a model, anywhere in whose names they may begin."""
    found = []
    for rule in _table()["renames"].get(key, ()):
        old = tuple(
            re.compile(each.replace("^", r"(?:^|(?<=\.))", 1) if inside and each[:1] == "^" else each) for each in rule["old"]
        )
        found.append(
            Renaming(old, tuple(rule["new"]), rule.get("together", False), rule.get("parts", False), rule.get("joined", False))
        )
    return tuple(found)


def renamings_of(config: Mapping[str, Any] | None) -> tuple[tuple[Renaming, ...], ...]:
    """The steps for the model with this configuration, then those for it and its parts; empty where nothing is renamed."""
    config = config or {}
    classes = config.get("architectures")
    own = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    types = list(dict.fromkeys(model_types(config)))
    bodies = _table()["bodies"]
    keys = [*own[:1], *(bodies.get(kind, kind) for kind in types)]
    keys += [f"{name[: -len(end)]}Model" for name in own[:1] for end in _HEADS if name.endswith(end)]
    top = next(([key] for key in (*own[:1], *types[:1]) if _renamings(key, False)), [])
    alone = tuple(step for key in top for step in _renamings(key, False))
    rest = [key for key in dict.fromkeys(keys) if key not in (*top, *types[:1])]
    whole = alone + tuple(step for key in rest for step in _renamings(key, True))
    return tuple(steps for steps in dict.fromkeys((alone, whole)) if steps)


_HEADS = (
    "ForConditionalGeneration", "ForCausalLM", "ForImageTextToText", "ForRetrieval", "ForImageClassification", "ForMaskedLM",
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForSemanticSegmentation", "ForObjectDetection",
)  # fmt: skip


def renamed(names: Collection[str], steps: tuple[Renaming, ...]) -> dict[str, str]:
    """Each of `names` with what transformers calls it; of one that is cut into parts, as it was."""
    current = {name: name for name in names}
    for step in steps:
        if step.parts or step.joined or (step.together and not any(step.old[0].search(name) for name in current.values())):
            continue
        current = {name: _replaced(now, step) for name, now in current.items()}
    return current


def parts_of(name: str, steps: tuple[Renaming, ...]) -> Iterator[tuple[str, tuple[Fraction, Fraction]]]:
    """The parts that the weight `name`, in transformers' spelling, is cut into, and from where to where each has its outputs."""
    for step in steps:
        found = step.old[0].search(name) if step.parts else None
        if found is not None:
            count = len(step.new)
            for i, new in enumerate(step.new):
                yield _put(name, found, new), (Fraction(i, count), Fraction(i + 1, count))
            return


def joined_of(names: Collection[str], steps: tuple[Renaming, ...]) -> dict[str, tuple[str, ...]]:
    """By the name of a weight that transformers has for several of `names`, in its own spelling: these, in their order."""
    whole: dict[str, tuple[str, ...]] = {}
    for step in (step for step in steps if step.joined):
        found: dict[str, dict[int, str]] = {}
        for name in names:
            for i, old in enumerate(step.old):
                if match := old.search(name):
                    found.setdefault(_put(name, match, step.new[0]), {})[i] = name
        whole |= {new: tuple(each[i] for i in sorted(each)) for new, each in found.items() if len(each) == len(step.old)}
    return whole


def _replaced(name: str, step: Renaming) -> str:
    for old, new in zip(step.old, step.new, strict=True):
        if found := old.search(name):
            return _put(name, found, new)
    return name


def _put(name: str, found: re.Match[str], new: str) -> str:
    text = re.sub(r"\\(\d)", lambda number: found.group(int(number[1])) or "", new)
    return name[: found.start()] + text + name[found.end() :]
