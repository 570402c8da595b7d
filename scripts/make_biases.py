"""Which field of config.json gives which layers of a model a bias, written to `src/lorafold/planning/biases.json`: run by
`make biases`.

Everything is asked of transformers itself: each class of models is built without memory for its weights, with each such field off
and on. What it has more with the field on are the biases that the field gives. A field that is used for anything else is left out,
and so is one that changes anything else.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from make_ties import DEPTHS, model_classes, parts_of, stored_name
from transformers import PreTrainedConfig, PreTrainedModel

TABLE = Path(__file__).resolve().parent.parent / "src" / "lorafold" / "planning" / "biases.json"
LAYERS = 8
"""So many are built at most: no model has a longer row of layers of different kinds that are not known by their names."""


def switches(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """The fields that may give biases, each with the place of its configuration in config.json."""
    return [
        (place, field)
        for place, part in parts_of(config)
        for field, value in part.to_dict().items()
        if "bias" in field and isinstance(value, bool)
    ]


def built(kind: type[PreTrainedModel], place: str, field: str, on: bool) -> PreTrainedModel:
    """A model of the class, its weights without memory, with the field as said."""
    config = kind.config_class()
    for path, part in parts_of(config):
        fields: dict[str, Any] = {field: on} if path == place else {}
        fields |= {name: LAYERS for name in DEPTHS if isinstance(value := getattr(part, name, None), int) and value > LAYERS}
        fields |= {"layer_types": part.layer_types[:LAYERS]} if isinstance(getattr(part, "layer_types", None), list) else {}
        for name, value in fields.items():
            setattr(part, name, value)
    if getattr(config, "vocab_size", 0) is None:
        config.vocab_size = 64
    with torch.device("meta"):
        return kind(config)


@cache
def means_more(module: str, field: str) -> bool:
    """Whether the modelling code asks for the field otherwise than to give a layer a bias."""
    source = inspect.getsource(sys.modules[module])
    given = re.findall(rf"\bbias\s*=\s*(?:self\.)?config\.{field}\b(?!\s*(?:and|or|if|[=!<>]))", source)
    return len(re.findall(rf"\.{field}\b", source)) != len(given)


def biases_of(kind: type[PreTrainedModel], place: str, field: str) -> dict[str, Any] | None:
    """What the field gives; None where that is nothing, or it does anything else."""
    config = kind.config_class()
    part = next(each for path, each in parts_of(config) if path == place)
    off, on = (built(kind, place, field, value) for value in (False, True))
    before, after = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (off, on))
    new = [name for name in after if name not in before]
    if not new or any(after.get(name) != shape for name, shape in before.items()):
        return None
    owners = {type(module).__module__ for module in off.modules() if type(module).__module__.startswith("transformers.")}
    if any(means_more(each, field) for each in owners):
        return None
    for name in new:
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or after[name] != before.get(f"{module}.weight", ())[:1]:
            return None
    found: dict[str, Any] = {"at": place, "field": field}
    if place:
        found["type"] = part.model_type
    modules = sorted({form(name) for name in new})
    stored = sorted({form(stored_name(on, name)) for name in new})
    return found | {"modules": modules} | ({} if stored == modules else {"stored": stored})


def form(bias: str) -> str:
    """The module of a bias, with an asterisk for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", bias.removesuffix(".bias"))


def table(kinds: list[type[PreTrainedModel]]) -> dict[str, Any]:
    """The whole table of `kinds`."""
    models: list[list[dict[str, Any]]] = []
    classes: dict[str, int] = {}
    for kind in kinds:
        found = []
        try:
            asked = switches(kind.config_class())
        except Exception:  # a default that does not fit
            continue
        for place, field in asked:
            try:
                found.append(biases_of(kind, place, field))
            except Exception:  # of any kind: a library that is not here, a configuration that refuses the field
                continue
        model = [each for each in found if each is not None]
        if model:
            models += [model] if model not in models else []
            classes[kind.__name__] = models.index(model)
    return {"made_from": f"transformers {transformers.__version__}", "models": models, "classes": classes}


def write(made: dict[str, Any]) -> None:
    """Write the table, a model a line."""
    models = ",\n".join(json.dumps(model) for model in made["models"])
    TABLE.write_text(
        f'{{"made_from": {json.dumps(made["made_from"])},\n"models": [\n{models}\n],\n"classes": {json.dumps(made["classes"])}}}\n'
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    made = table(model_classes())
    write(made)
    print(f"{len(made['classes'])} classes, {len(made['models'])} different models: {TABLE}")
