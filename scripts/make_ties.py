"""Which weights transformers ties in which model, written to `src/lorafold/planning/ties.json`: run by `make ties`.

Everything is asked of transformers itself: each class of models is built without memory for its weights and says what it ties
(`_tied_weights_keys`, its parts' included) and under which names its files hold that (the reverse of `conversion_mapping`); each
configuration is read from what config.json could say, and says whether the tie is then in force. A class that cannot be built
here (it needs a library that is not installed) says what its source says.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

TABLE = Path(__file__).resolve().parent.parent / "src" / "lorafold" / "planning" / "ties.json"
FLAG = "tie_word_embeddings"
OLDER_FLAGS = ("tie_embedding", "tie_codebooks_embeddings")
"""Other fields that configurations take the flag from."""
DEPTHS = (
    "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "n_layer", "n_layers", "num_decoder_layers",
    "encoder_num_hidden_layers", "decoder_num_hidden_layers",
)  # fmt: skip
COMPOSED = {"EncoderDecoderModel": "decoder", "VisionEncoderDecoderModel": "decoder", "SpeechEncoderDecoderModel": "decoder"}
"""Classes that are made of any two models: which of them has a head."""


def model_classes() -> list[type[PreTrainedModel]]:
    """Every class of models that transformers has, in the order of names."""
    found = {}
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for each in vars(module).values():
            if (
                isinstance(each, type)
                and issubclass(each, PreTrainedModel)
                and each.__module__ == name
                and isinstance(each.config_class, type)
            ):
                found[each.__name__] = each
    return [found[name] for name in sorted(found)]


def parts_of(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """The configuration and those of its parts, each with its place in config.json."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not name.startswith("_"):
            yield from parts_of(value, f"{path}.{name}" if path else name)


def built(kind: type[PreTrainedModel], *, small: bool) -> PreTrainedModel:
    """A model of the class with all flags on, its weights without memory; of few layers where it is to be `small`."""
    config = kind.config_class()
    for _, part in parts_of(config):
        fields: dict[str, Any] = {FLAG: True}
        if small:
            fields |= {field: 2 for field in DEPTHS if isinstance(getattr(part, field, None), int) and getattr(part, field) > 2}
            if isinstance(getattr(part, "layer_types", None), list):
                fields["layer_types"] = part.layer_types[:2]
        for field, value in fields.items():
            try:
                setattr(part, field, value)
            except Exception:  # a configuration may refuse any field, for any reason
                continue
    if getattr(config, "vocab_size", 0) is None:
        config.vocab_size = 64
    with torch.device("meta"):
        return kind(config)


def shell(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of the class that has no modules: enough to ask how its names are rewritten."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    try:
        model.config = kind.config_class()
    except Exception:  # a default that does not fit
        model.config = kind.config_class.__new__(kind.config_class)
    return model


def stored_name(model: PreTrainedModel, name: str) -> str:
    """What transformers calls the tensor `name` of the model in a file."""
    try:
        held = revert_weight_conversion(model, {name: torch.empty(4, 4)})
    except Exception:  # a conversion that wants other tensors beside this one
        return name
    return str(next(iter(held))) if len(held) == 1 else name


def owners(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel, dict[str, str]]]:
    """The modules that tie something, with their names and what they tie, under the names that the whole model has for it."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel):
            before = f"{name}." if name else ""
            tied = {before + k: before + v for k, v in module.get_expanded_tied_weights_keys(all_submodels=False).items()}
            if tied:
                found.append((name, module, tied))
    return found


def groups(tied: dict[str, str]) -> list[list[str]]:
    """The names that share one weight, the one that the others are tied to first."""
    by_source: dict[str, list[str]] = {}
    for target, source in tied.items():
        while source in tied and tied[source] != target:
            source = tied[source]
        by_source.setdefault(source, [source]).append(target)
    return list(by_source.values())


def _place(config: PreTrainedConfig, part: PreTrainedConfig) -> str:
    """Where in config.json the configuration of a part stands."""
    same = [path for path, each in parts_of(config) if each is part]
    return (same or [path for path, each in parts_of(config) if type(each) is type(part)] or [""])[0]


def _at(fields: dict[str, Any], path: str) -> dict[str, Any] | None:
    for name in path.split(".") if path else ():
        if not isinstance(fields := fields.get(name), dict):
            return None
    return fields


@cache
def flag_of(kind: type[PreTrainedConfig], place: str) -> dict[str, Any]:
    """Whether a tie is in force whose flag is in the part at `place`, by what config.json says.

    - `table`: nine letters, T or F: the flag is not there, true, false; for each of these `other`, the field of another part
      that has a say, is not there, true, false
    - `older`: another field that the flag is taken from
    - `means_more`: whether false cannot be said, or says something else too
    """
    try:
        plain = kind().to_dict()
    except Exception:  # a default that does not fit
        return {"at": "", "table": ("T" if getattr(kind, FLAG, False) is True else "F") * 3 + "TTTFFF"}

    def in_force(own: bool | None, other: str | None, said: bool | None) -> str:
        fields = copy.deepcopy(plain)
        for path, value in ((other, said), (place, own)):
            part = None if path is None else _at(fields, path)
            if part is not None:
                part.pop(FLAG, None)
                part |= {} if value is None else {FLAG: value}
        try:
            config = kind.from_dict(fields)
            for name in place.split(".") if place else ():
                config = getattr(config, name)
        except Exception:  # a configuration may refuse what it is told
            return "F"
        return "T" if getattr(config, FLAG, False) is True else "F"

    said = (None, True, False)
    others = [path for path, _ in parts_of(kind()) if path != place and _at(plain, path) is not None]
    matters = [path for path in others if len({in_force(own, path, value) for value in said for own in (False,)}) > 1]
    matters += [path for path in others if len({in_force(own, path, value) for value in said for own in (None,)}) > 1]
    other = matters[0] if matters else None
    found: dict[str, Any] = {"at": place, "table": "".join(in_force(own, other, value) for own in said for value in said)}
    if other is not None:
        found["other"] = other
    for older in OLDER_FLAGS:
        try:
            tried = [getattr(kind(**{older: value}), FLAG, None) for value in (True, False)]
        except Exception:  # as above
            continue
        if tried == [True, False] and not place:
            found["older"] = older
    if found["table"][8] == "T" or _differ(kind, place):
        found["means_more"] = True
    return found


def _differ(kind: type[PreTrainedConfig], place: str) -> bool:
    """Whether the configuration is another one where the flag is, beside the flag."""
    part = kind
    for name in place.split(".") if place else ():
        sub = part.sub_configs.get(name)
        part = (getattr(sub, "__mro__", None) and sub) or part
    try:
        one, other = (part(**{FLAG: value}).to_dict() for value in (True, False))
    except Exception:  # as above
        return False
    return {k: v for k, v in one.items() if k != FLAG} != {
        k: v for k, v in other.items() if k != FLAG and FLAG not in str(v)
    } and any(one[k] != other.get(k) for k in one if k != FLAG and not isinstance(one[k], dict))


@cache
def _computes_with_it(kind: type[nn.Module]) -> bool:
    """Whether the model computes something else where the flag is on."""
    try:
        return f"config.{FLAG}" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def model_of(kind: type[PreTrainedModel]) -> dict[str, Any]:
    """What is known of one class: its ties, each with its names and its flag; how its base model is called; its embedding."""
    found: dict[str, Any] = {"prefix": kind.base_model_prefix or ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(kind)
        if model is None:
            hollow, tied = shell(kind), dict(kind._tied_weights_keys or {})
            plain = all(re.fullmatch(r"[\w.]+", name) for name in (*tied, *tied.values()))
            tying = [("", hollow, tied)] if tied and plain else []
            if tied and not plain:
                found["varies"] = True
        else:
            tying = owners(model)
            embedding = _embedding(model)
            if embedding is not None:
                found["input"] = embedding
                if _computes(model.get_submodule(embedding.removesuffix(".weight"))):
                    found["computes"] = True
    ties: list[dict[str, Any]] = []
    for name, module, tied in tying:
        config = (model or hollow).config
        place = _place(config, module.config)
        if model is not None and (nested := _nested(name, place, config, module)) is not None:
            found.setdefault("nested", {})[name] = nested
            continue
        flag = dict(flag_of(type(config), place))
        if _computes_with_it(type(module)):
            flag["means_more"] = True
        for names in groups(tied):
            same = next((tie for tie in ties if tie["flag"]["at"] == place and tie["names"][0] == names[0]), None)
            if same is None:
                ties.append(same := {"names": [], "flag": flag})
            same["names"] += [each for each in names if each not in same["names"]]
    for tie in ties:
        tie["stored"] = [stored_name(model or hollow, each) for each in tie["names"]]
    if ties and (where := _where(kind, (model or hollow).config)):
        found["where"] = where
    if kind.__name__ in COMPOSED:
        found["nested"] = {COMPOSED[kind.__name__]: [COMPOSED[kind.__name__], "causal"]}
    if "nested" in found or any(tie["flag"]["at"] for tie in ties):
        found |= _seen(kind)
    sources = [tie["names"][0] for tie in ties if "embed" in tie["names"][0] or ".shared." in f".{tie['names'][0]}"]
    if "input" not in found and sources:
        found["input"] = sources[0]  # of a model that could not be built
    for tie in ties:
        if tie["stored"] == tie["names"]:
            del tie["stored"]
    if any(re.search(r"(^|\.)[1-9]\d*\.", name) for tie in ties for name in tie["names"]):
        found["varies"] = True  # with the number of layers
    if ties:
        found["ties"] = ties
    return found if ties or found.keys() & {"nested", "varies", "computes"} else {}


def _seen(kind: type[PreTrainedModel]) -> dict[str, bool]:
    """What PEFT makes of ties in parts of a model: it sees them where the class says that it ties, and has the flag at the top."""
    if not isinstance(kind._tied_weights_keys, dict):
        return {}
    try:
        return {"seen": getattr(kind.config_class(), FLAG, False) is True}
    except Exception:  # a default that does not fit
        return {"seen": getattr(kind.config_class, FLAG, False) is True}


def _model(kind: type[PreTrainedModel]) -> PreTrainedModel | None:
    for small in (True, False):
        try:
            model = built(kind, small=small)
            owners(model)
        except Exception:  # of any kind: a library that is not here, a default that does not fit
            continue
        if small and any(_counts(type(module)) for module in model.modules() if isinstance(module, PreTrainedModel)):
            continue
        return model
    return None


def _counts(kind: type[PreTrainedModel]) -> bool:
    """Whether the class writes down its ties while it is built, one a layer."""
    source = inspect.getsource(kind)
    return "_tied_weights_keys" in source and ("prefix_pattern" in source or "{layer_id}" in source)


def _where(kind: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the configuration that the ties of the class hang on, with the values that it was asked with."""
    found: dict[str, Any] = {}
    lines = inspect.getsource(kind).splitlines()
    for i, line in enumerate(lines):
        if "self._tied_weights_keys" in line:
            for before in lines[max(0, i - 5) : i]:
                fields = re.findall(r"\bif (?:not )?(?:self\.config|config|self)\.(\w+)\b", before)
                found |= {f: getattr(config, f) for f in fields if type(getattr(config, f, None)) in (bool, int)}
    return found


def _computes(embedding: nn.Module) -> bool:
    """Whether the embedding does more than to look up, and to multiply by a number, which PEFT does too."""
    forward = type(embedding).forward
    return isinstance(embedding, nn.Embedding) and forward is not nn.Embedding.forward and not hasattr(embedding, "embed_scale")


def _embedding(model: PreTrainedModel) -> str | None:
    try:
        embedding = model.get_input_embeddings()
    except Exception:  # a model without one may raise anything
        return None
    names = [name for name, module in model.named_modules() if module is embedding]
    return f"{names[0]}.weight" if names and isinstance(getattr(embedding, "weight", None), torch.Tensor) else None


def _nested(name: str, place: str, config: PreTrainedConfig, part: PreTrainedModel) -> list[str] | None:
    """Where in config.json the configuration of the part `name` stands, and which class it then is, if any could be there."""
    if not name or not place or "." in place or type(config).sub_configs.get(place) is not transformers.AutoConfig:
        return None
    kinds = [kind for kind, names in auto().items() if names.get(part.config.model_type) == type(part).__name__]
    return [place, kinds[0]] if kinds else None


@cache
def auto() -> dict[str, dict[str, str]]:
    """The class of each type of models, by what is asked of it."""
    mappings = {
        "causal": "MODEL_FOR_CAUSAL_LM", "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "text": "MODEL_FOR_TEXT_ENCODING",
        "plain": "MODEL",
    }  # fmt: skip
    return {
        kind: {
            name: each if isinstance(each, str) else each[0]
            for name, each in sorted(getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").items())
        }
        for kind, mapping in mappings.items()
    }


def table(kinds: list[type[PreTrainedModel]]) -> dict[str, Any]:
    """The whole table of `kinds`."""
    models: list[dict[str, Any]] = [{}]
    classes: dict[str, int] = {}
    types: dict[str, list[str]] = {}
    for kind in kinds:
        model = model_of(kind)
        if model not in models:
            models.append(model)
        classes[kind.__name__] = models.index(model)
        types.setdefault(kind.config_class.model_type, []).append(kind.__name__)
    ties = [tie for model in models if not model.get("varies") for tie in model.get("ties", ())]
    embeddings, heads = _ends(ties)
    used = {kind for model in models for _, kind in model.get("nested", {}).values()} | {"seq2seq"}
    return {
        "made_from": f"transformers {transformers.__version__}",
        "embeddings": embeddings,
        "heads": heads,
        "auto": {kind: names for kind, names in auto().items() if kind in used},
        "models": models,
        "classes": classes,
        "types": {name: sorted(each) for name, each in sorted(types.items()) if name},
    }


def _ends(ties: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The last names of modules that embed tokens, and of those that turn hidden states into logits."""
    other = ("class_embed", "bbox_embed", "attention_bias", "patch", "enc_score_head", ".bias")  # detectors tie by the same flag
    last = lambda name: name.rpartition(".")[0].rpartition(".")[2]  # noqa: E731
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for names in (tie["names"] for tie in ties if not any(each in tie["names"][0] for each in other)):
        sources[last(names[0])] += 1
        targets.update(last(name) for name in names[1:])
    known = [name for name in sources | targets if name and not name.isdigit()]
    embeds = {name for name in known if "embed" in name and name not in ("embed_out", "unembedding_projection")}
    others = {name for name in known if sources[name] > targets[name]} - {"lm_head"}
    return sorted(embeds | (others & {"wte", "shared"})), sorted(set(known) - embeds - others)  # other names are said of anything


def write(made: dict[str, Any]) -> None:
    """Write the table, a class or a type of models a line."""
    lines = [f'"{key}": {json.dumps(value)}' for key, value in made.items() if key not in ("models", "classes", "types")]
    lines.append('"models": [\n' + ",\n".join(json.dumps(model) for model in made["models"]) + "\n]")
    for key in ("classes", "types"):
        lines.append(f'"{key}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in made[key].items()) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Make the table anew."""
    logging.disable(logging.ERROR)
    write(table(model_classes()))


if __name__ == "__main__":
    main()
