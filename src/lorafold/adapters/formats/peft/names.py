"""Names in PEFT's files: which module a tensor is of, and which part of it.

`base_model.model.` + the module's path + `.lora_A.weight`, `.lora_B.weight`, `.lora_B.bias` (lora_bias), `.lora_embedding_A`,
`.lora_embedding_B`, `.lora_diag` (KaSA); biases that were trained and modules that were saved whole stand beside them under their
own names. PEFT drops the adapter's name (`lora_A.default.weight`) when it saves; files that kept it are read too, and so are those
of a model that was wrapped once more around PEFT's (`module.`, `_orig_mod.`).

A module that PEFT wrapped is `<path>.base_layer` inside its wrapper, so that word stands in the names of everything in it, and once
more for every further wrapper: those of bare parameters lie inside each other, one for each parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ....errors import AdapterError, UnsupportedAdapterError, printable
from ....files.safetensors.info import TensorInfo
from .config import PeftConfig

AROUND = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of what torch.compile, FSDP and activation checkpointing put around a module, anywhere in a model."""

ENDS = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "tokens_embed", "word_embedding",
    "embeddings", "lm_head", "embed_out", "output_projection", "proj_out", "decoder", "vocab_projector",
    "generator_lm_head",
)  # fmt: skip
"""Last names of the modules at both ends of a model, which PEFT may save of its own accord (`save_embedding_layers`)."""

_PREFIX = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.")
_LORA = re.compile(
    r"(?P<module>.+)\.(?:(?P<part>lora_A|lora_B)(?:(?:\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias))?"
    r"|(?P<bare>lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag)(?:\.(?P<named>(?!weight$)[^.]+))??(?:\.weight)?)"
)
_TRAINING = re.compile(r".+\.(?P<part>lora_velora_embed|lora_monteclora_sampler)(?:\..+)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<parameter>[^.]+)")
_ORIGINAL = re.compile(r".+\.original_module\.[^.]*bias")
_TWICE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<parameter>[^.]*bias)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_OTHER = re.compile(r".+\.(lora_[A-Za-z_]+|token_adapter|vera_[a-z_]+|hada_\w+|ia3_l)(\..+)?")
_PART = re.compile(r".+\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag)(\..+)?")
_WRAPPED = re.compile(r"(?P<outer>.+?)(?:\.base_layer)+(?P<inner>\.(?!base_layer(?:\.|$)).+)")


@dataclass
class Sorted:
    """Every tensor of the file in one place.

    - `modules`: the parts of each module, by its path; of a wrapper inside another, with `.base_layer` after it for each around it
    - `inside`: the paths of modules that lie in a module that is wrapped itself, and the path of that one
    - `replacements`: by the base tensor that each replaces; `tokens`: trained rows by their embedding
    - `left_out`: what nothing is merged of, by name, and why
    - `twins`: biases of modules that were saved whole, which PEFT then saves as biases too, and what each must be equal to
    - `tied`: weights that modules_to_save does not name, but one that it names may be tied to
    - `around`: what wraps modules in its names, and was taken out of them
    - `ends`: those of `replacements` that are of an embedding or a head which the configuration does not name
    """

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, TensorInfo] = field(default_factory=dict)
    tokens: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    tied: dict[str, TensorInfo] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    around: set[str] = field(default_factory=set)


def sort_tensors(tensors: Mapping[str, TensorInfo], config: PeftConfig, weights: Path) -> Sorted:
    """The tensors of the file `weights` by what they are.

    Raises `AdapterError` where one is nothing that `config` knows of, or two are the same.
    """
    found = Sorted()
    adapters: dict[str | None, str] = {}
    for name, info in tensors.items():
        plain = unwrapped(_PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name)
        if "._" in name or name[:1] == "_":
            found.around |= set(name.split(".")) & set(AROUND)
        if lora := _LORA.fullmatch(plain):
            part = (lora["part"] or lora["bare"]) + (".bias" if lora["kind"] == "bias" else "")
            adapters.setdefault(lora["adapter"] or lora["named"], name)
            parts = found.modules.setdefault(_module(lora["module"], found), {})
            if part in parts:
                raise AdapterError(
                    f"{printable(str(weights))}: {printable(name)} and {printable(parts[part].name)} are the same part"
                )
            parts[part] = info
        elif (tokens := _TOKENS.fullmatch(plain)) and tokens["module"] not in found.tokens:
            found.tokens[tokens["module"]] = info
        elif (training := _TRAINING.fullmatch(plain)) and _is_trained_with(training["part"], config):
            found.left_out[name] = f"only training needs it ({'VeLoRA' if 'velora' in training['part'] else 'MonteCLoRA'})"
        elif config.bias != "none" and _ORIGINAL.fullmatch(plain):
            found.left_out[name] = "it is of a module as it was before modules_to_save, which was saved whole"
        elif config.bias != "none" and (twice := _TWICE.fullmatch(plain)):
            found.twins[name] = f"{twice['module']}.{twice['parameter']}"
        elif config.ensure_weight_tying and _is_unnamed(plain, config):
            found.tied[plain] = info
        else:
            target, named = _replaced(plain, config, name, weights)
            if not named:
                found.ends.append(target)
            if target in found.replacements:
                raise AdapterError(
                    f"{printable(str(weights))}: {printable(name)} and {printable(found.replacements[target].name)}"
                    f" both replace {printable(target)}"
                )
            found.replacements[target] = info
    if None in adapters and len(adapters) > 1:
        odd = next(name for adapter, name in adapters.items() if adapter is not None)
        raise AdapterError(
            f"{printable(str(weights))}: tensor '{printable(odd)}' is no part of a LoRA pair as PEFT names them: the others hold no"
            " adapter's name",
            hint="the file was changed after it was saved; nothing was written",
        )
    if len(adapters) > 1:
        raise AdapterError(
            f"{printable(str(weights))} holds several adapters: {', '.join(sorted(printable(str(each)) for each in adapters))}",
            hint="save each by itself",
        )
    return found


def unwrapped(name: str) -> str:
    """`name` without what wraps modules, anywhere in it.

    >>> unwrapped("model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight")
    'model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return name if "._" not in name and name[:1] != "_" else ".".join(part for part in name.split(".") if part not in AROUND)


def wrappers_of(path: str) -> tuple[str, int]:
    """The path of the module that is wrapped, and how many wrappers lie around the one of `path`.

    >>> wrappers_of("layers.0.experts.base_layer.base_layer")
    ('layers.0.experts', 2)
    """
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return path, depth


def is_or_ends(name: str, end: str) -> bool:
    """Whether `name` is `end`, or ends in it after a dot."""
    return name == end or name.endswith("." + end)


def ends_of(name: str) -> Iterator[str]:
    """`name`, and what of it comes after each of its dots: all that it is or ends in.

    >>> list(ends_of("layers.0.q_proj"))
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    start = 0
    while start >= 0:
        yield name[start:]
        start = name.find(".", start) + 1 or -1


class Endings:
    """Names to be asked many times, at a cost that does not grow with how many they are."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(end for name in self._names for end in ends_of(name))

    def any_ends(self, end: str) -> bool:
        """Whether any of the names is `end`, or ends in it after a dot."""
        return end in self._ends

    def any_is_end_of(self, name: str) -> bool:
        """Whether `name` is one of the names, or ends in one after a dot."""
        return any(end in self._names for end in ends_of(name))

    def meets(self, name: str) -> bool:
        """Whether `name` ends in one of the names, or one of them in it."""
        return self.any_ends(name) or self.any_is_end_of(name)


def _module(path: str, found: Sorted) -> str:
    """`path` without the wrappers around modules that it lies in."""
    while wrapped := _WRAPPED.fullmatch(path):
        path = wrapped["outer"] + wrapped["inner"]
        found.inside[path] = wrapped["outer"]
    return path


def _is_trained_with(part: str, config: PeftConfig) -> bool:
    return bool(config.fields.get("velora_config" if part == "lora_velora_embed" else "monteclora_config")) or (
        config.fields.get("init_lora_weights") in ("velora", "monteclora")
    )


def _is_unnamed(plain: str, config: PeftConfig) -> bool:
    """Whether `plain` is the weight of a module, as that has it, of which modules_to_save says nothing."""
    module, _, parameter = plain.rpartition(".")
    named = any(part.endswith(config.modules_to_save) for part in _above(module))
    return (
        parameter == "weight"
        and bool(config.modules_to_save)
        and not named
        and not _OTHER.fullmatch(plain)
        and (".base_layer" not in plain and ".modules_to_save." not in plain)
    )


def _replaced(plain: str, config: PeftConfig, name: str, weights: Path) -> tuple[str, bool]:
    """The base tensor that the whole tensor `plain` replaces, and whether the configuration, or a LoRA pair, names its module.

    PEFT saves the embedding and the head as they are where the vocabulary was resized, or where LoRA is on one of them; then a bias
    of theirs too (PEFT, `utils/save_and_load.py`).
    """
    shown = f"{printable(str(weights))}: tensor '{printable(name)}'"
    if _PART.fullmatch(plain):
        raise AdapterError(
            f"{shown} is no part of a LoRA pair as PEFT names them: lora_A.weight, lora_B.weight, lora_B.bias, lora_embedding_A, …",
            hint="the file was changed after it was saved; nothing was written",
        )
    if _OTHER.fullmatch(plain):
        raise UnsupportedAdapterError(f"{shown} belongs to a kind of adapter that is not supported", hint="nothing was written")
    if saved := _SAVED.fullmatch(plain):
        return f"{saved['module']}.{saved['parameter']}", True
    bias = config.bias != "none" and plain.rpartition(".")[2].endswith("bias")
    module, _, parameter = plain.rpartition(".")
    last = module.removesuffix(".base_layer").rpartition(".")[2]
    if module.endswith(".base_layer") and (parameter == "weight" or bias or (parameter == "bias" and last in ENDS)):
        return plain.replace(".base_layer", ""), True
    if any(part.endswith(config.modules_to_save) for part in _above(module)) or bias:
        return plain.replace(".base_layer", ""), True
    if last in ENDS and parameter in ("weight", "bias") and "." not in parameter:
        return plain, False
    reason = "" if parameter != "bias" else f", and bias is '{config.bias}'"
    raise AdapterError(
        f"{shown} is not part of a LoRA pair, and modules_to_save does not name it{reason}",
        hint="the file holds more than its configuration says; nothing was written"
        if parameter != "bias"
        else 'nothing was written; where these biases were trained, set "bias" to "all" in adapter_config.json, which'
        " mergekit's extracts leave out",
    )


def _above(module: str) -> list[str]:
    """`module` and the modules around it, innermost first."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
