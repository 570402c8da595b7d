"""mlx-lm's folder: `adapters.safetensors` and `adapter_config.json` with `lora_parameters`.

Its layers compute x @ lora_a @ lora_b · scale (mlx-lm, `tuner/lora.py`), so lora_a is (in, r) and lora_b (r, out); those of
experts are stored the other way round, (E, r, in) and (E, out, r); an embedding's are (num_embeddings, r) and (r, dims). `scale`
is the factor itself; an embedding's update is that of a tied head too. DoRA's `m` has a number for each row of the weight, of an
embedding too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Cut, Matrix, Permuted, Reshaped
from ....files.safetensors.info import Header, TensorInfo
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...source import Source
from ..single_file import Parts, both, check_shape, gather, magnitude, turned

WEIGHTS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"

EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embeddings", "word_embeddings")
"""Last names of the modules that embed; all others are linear."""

HEAD = "lm_head"

EXPERTS = {
    ("block_sparse_moe", "gate_proj"): "w1",
    ("block_sparse_moe", "down_proj"): "w2",
    ("block_sparse_moe", "up_proj"): "w3",
}
"""What a projection in `switch_mlp` is called in transformers, by the module around it; elsewhere the same."""

_PARTS = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "m"}


def is_mlx(source: Source) -> bool:
    """Whether mlx-lm's two files are there."""
    return source.find(WEIGHTS_NAME) is not None and CONFIG_NAME in source.names


def load_mlx(source: Source) -> Adapter:
    """The adapter in the folder of `source`.

    Raises `AdapterError` (or a kind of it) where the files contradict each other or hold what cannot be merged.
    """
    fields = source.config(CONFIG_NAME)
    shown = printable(str(source.folder / CONFIG_NAME))
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"{shown}: fine_tune_type is {kind!r}, expected 'lora' or 'dora'", hint="whole weights are not an adapter"
        )
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise AdapterConfigError(f"{shown}: lora_parameters must be an object, not {type(parameters).__name__}")
    scale, rank = _number(parameters.get("scale"), "scale", shown), parameters.get("rank")
    if type(rank) is not int or rank <= 0:
        raise AdapterConfigError(f"{shown}: lora_parameters.rank must be a positive integer, not {rank!r}")
    header = source.header(WEIGHTS_NAME)
    modules: dict[str, AdapterModule] = {}
    for name, parts in gather(header, _PARTS, {}).items():
        if ("m" in parts) != (kind == "dora"):
            found = "is there" if "m" in parts else "is missing"
            raise AdapterError(f"{printable(str(header.path))}: {printable(name)}: fine_tune_type is '{kind}', but its m {found}")
        for module in _modules(name, parts, scale, rank, header):
            modules[module.name] = module
    adapter = Adapter(
        name=source.folder.resolve().name,
        path=source.folder,
        format="mlx",
        modules=modules,
        replacements={},
        header=header,
        sha256=source.sha256(CONFIG_NAME, WEIGHTS_NAME),
        config=fields,
        base_model=fields["model"] if isinstance(fields.get("model"), str) else None,
    )
    embeddings = [name for name in modules if _last(name) in EMBEDDINGS]
    if len(embeddings) != 1 or any(_last(name) == HEAD for name in modules):
        return adapter
    return replace(adapter, on_base=lambda base: _with_head(adapter, embeddings[0], base))


def _with_head(adapter: Adapter, name: str, base: Base) -> Adapter:
    """`adapter` with the same update of the head, where `base` has that tied to its embedding: mlx-lm adds it to both.

    There the embedding is the head too (mlx-lm, `LoRAEmbedding.as_linear`); in PEFT it is the embedding alone.
    """
    embedding = adapter.modules[name]
    if not _tied(base):
        return adapter
    above = name.split(".")[:-1]
    while above and above[-1] in ("model", "transformer"):
        above.pop()
    head = ".".join([*above, HEAD])
    factors = (
        (Permuted(embedding.lora_B), Permuted(embedding.lora_A)) if embedding.embedding else (embedding.lora_A, embedding.lora_B)
    )
    module = AdapterModule(head, *factors, embedding.scaling, magnitude=embedding.magnitude)
    note = f"the base's head is tied to {printable(name)}, so that it gets the same update, as in mlx-lm"
    return replace(adapter, modules={**adapter.modules, head: module}, notes=(*adapter.notes, note))


def _tied(base: Base) -> bool:
    """Whether the output head of `base` is its embedding, by its configuration, or else by what is stored."""
    for fields in (base.config, base.config.get("text_config")):
        said = fields.get("tie_word_embeddings") if isinstance(fields, Mapping) else None
        if isinstance(said, bool):
            return said
    return not any(name.endswith(f"{HEAD}.weight") for name in base.shapes)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _modules(name: str, parts: Parts, scale: float, rank: int, header: Header) -> list[AdapterModule]:
    a, b, shown = both(name, parts, "lora_a", "lora_b", header)
    if len(a.shape) == 3:
        return _experts(name, parts, scale, rank, shown)
    if _last(name) in EMBEDDINGS:
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
        check_shape(b, f"(r, dims) beside '{printable(a.name)}' (num_embeddings, r) {list(a.shape)}", fits, shown)
        scaling = _scaling(scale, rank, a.shape[1], shown)
        if "m" not in parts:
            return [AdapterModule(name, Permuted(a), Permuted(b), scaling, embedding=True)]
        # DoRA of its rows is that of a linear layer: ΔW (num_embeddings, dims) is lora_a @ lora_b as it stands
        return [AdapterModule(name, b, a, scaling, magnitude=magnitude(parts, "m", a.shape[0], shown))]
    lora_A, lora_B, r = turned(a, b, shown)
    scaling = _scaling(scale, rank, r, shown)
    return [AdapterModule(name, lora_A, lora_B, scaling, magnitude=magnitude(parts, "m", lora_B.shape[0], shown))]


def _experts(name: str, parts: Parts, scale: float, rank: int, shown: str) -> list[AdapterModule]:
    """One module for each expert, named as where each is a module of its own."""
    a, b = parts["lora_a"], parts["lora_b"]
    fits = len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    check_shape(b, f"(experts, out, r) beside '{printable(a.name)}' (experts, r, in) {list(a.shape)}", fits, shown)
    if "m" in parts:
        raise UnsupportedAdapterError(f"{shown} has DoRA's m for experts, which mlx-lm does not train")
    before, switch, last = name.rpartition(".switch_mlp.")
    if not switch:
        raise UnsupportedAdapterError(
            f"{shown} holds a factor for each of several experts, and only those in a module switch_mlp are known"
        )
    last = EXPERTS.get((before.rpartition(".")[2], last), last)
    scaling = _scaling(scale, rank, a.shape[1], shown)
    return [AdapterModule(f"{before}.experts.{e}.{last}", _matrix_of(a, e), _matrix_of(b, e), scaling) for e in range(a.shape[0])]


def _matrix_of(info: TensorInfo, index: int) -> Matrix:
    return Reshaped(Cut(info, 0, index, index + 1), info.shape[1:])


def _scaling(scale: float, rank: int, r: int, shown: str) -> Scaling:
    if r != rank:
        raise AdapterConfigError(
            f"{shown} has rank {r}, but lora_parameters.rank is {rank}",
            hint="the configuration and the tensors are not of one training run",
        )
    return Scaling(scale, r, scale * r, f"scale {scale:g}, whatever r {r}")


def _number(value: Any, name: str, shown: str) -> float:
    number = float(value) if type(value) in (int, float) else math.nan
    if not math.isfinite(number):
        raise AdapterConfigError(f"{shown}: lora_parameters.{name} must be a finite number, not {value!r}")
    return number
