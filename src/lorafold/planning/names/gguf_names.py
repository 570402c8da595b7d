"""What llama.cpp calls the tensors of a model, and what its converter does to their rows: an adapter as it is on a base in GGUF.

Names are those of the gguf package's own tables: `gguf.json` is made by `scripts/make_gguf_names.py`, never by hand. An adapter in
GGUF has them already. What the converter does to an architecture was read in llama.cpp's ``conversion/*.py``, and what is not read
is not guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ...adapters.adapter import Adapter, AdapterModule, Base
from ...adapters.formats.gguf.reader import modules_in_gguf
from ...adapters.formats.rotary import to_pairs
from ...checkpoints.checkpoint import Checkpoint
from ...errors import AdapterError, InputError, UnsupportedAdapterError, printable
from ...files.expression import Matrix, Reshaped, narrow
from ..families import VISION, WRAPPERS
from .offers import shapes_of

TABLE = Path(__file__).with_name("gguf.json")

ORDERS: Mapping[str, Literal["straight", "paired"]] = {
    **dict.fromkeys(("llama", "mistral3", "smollm3", "arcee", "granite", "olmo", "minicpm"), "paired"),
    **dict.fromkeys(
        (
            "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "gemma", "gemma2", "gemma3", "phi2", "phi3", "olmo2",
            "olmoe", "seed_oss", "starcoder2", "command-r", "cohere2", "exaone4", "nemotron", "stablelm", "gpt2",
        ),
        "straight",
    ),
}  # fmt: skip
"""By `general.architecture`: whether the rows of queries and keys lie in neighbouring pairs (``LlamaModel.permute`` and its like),
or, as those of all other matrices, as transformers has them. Every linear weight is (out, in), also where transformers has it the
other way round (GPT-2)."""

WHOLE = ("token_embd.weight", "output.weight")
"""What an adapter may replace: vectors are stored in other ways too, such as norms with 1 added."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)\.")
_PAIRS = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")


@dataclass(frozen=True)
class _Named:
    """Where the tensor of an adapter lies in a base: `tensor`, and of a stack of experts which one."""

    tensor: str
    index: int | None = None


def has_names_of_llama_cpp(checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` is in GGUF under llama.cpp's names: models of images are there under their makers'."""
    return checkpoint.gguf is not None and any(name.startswith(("blk.", "token_embd.")) for name in checkpoint.tensors)


def in_gguf(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter`, whose files leave nothing open, with the tensors that it changes called as the base `checkpoint`, in GGUF, calls
    them, and its rows in that one's order; what has no place there stays as it is.

    Raises `UnsupportedAdapterError` for an architecture whose order of rows is not known, and for what its converter changes in
    other ways than that, `AdapterError` for an adapter of another architecture.
    """
    metadata = {} if checkpoint.gguf is None else checkpoint.gguf.metadata
    architecture = metadata.get("general.architecture", "")
    if adapter.format == "gguf":
        return _in_its_names(adapter, architecture)
    if architecture not in ORDERS:
        raise UnsupportedAdapterError(
            f"{printable(str(checkpoint.shards[0].path))} is of the architecture '{printable(architecture)}', and what llama.cpp's"
            f" converter does to its weights is not known here: known are {', '.join(sorted(ORDERS))}",
            hint="nothing was written; convert the adapter with llama.cpp's convert_lora_to_gguf.py, and merge what that writes",
        )
    if adapter.layers:
        raise UnsupportedAdapterError(
            f"{printable(adapter.name)} is for a model made of other layers (layer_replication), which a base in GGUF is not made"
            " into",
            hint="nothing was written; merge into the base in safetensors",
        )
    places = _places(adapter, architecture, checkpoint)
    heads = _Heads(adapter, architecture, metadata)
    found = [each for module in adapter.modules.values() for each in _matrices(module, places, checkpoint)]
    modules = {module.name: _module(module, places.get(module.tensor), heads) for module in found}
    for name in adapter.replacements:
        if name in places and places[name].tensor not in WHOLE:
            raise UnsupportedAdapterError(
                f"{printable(adapter.name)} replaces {printable(name)} as a whole, and how llama.cpp stores that"
                f" ({printable(places[name].tensor)}) is not known here: known are {', '.join(WHOLE)}",
                hint="nothing was written; merge into the base in safetensors, and convert the result",
            )
    called = {name: place.tensor for name, place in places.items()}
    return replace(
        adapter,
        modules=modules,
        replacements={called.get(name, name): info for name, info in adapter.replacements.items()},
        rows={called.get(name, name): rows for name, rows in adapter.rows.items()},
        fan_in_fan_out=False,
        given_fan_in_fan_out=None,
        notes=(*adapter.notes, *heads.notes),
        initial=None if adapter.initial is None else in_gguf(adapter.initial, checkpoint),
    )


def told_of(checkpoint: Checkpoint) -> Base:
    """What adapters are told of a base: its configuration, or in GGUF how many heads and layers it has, as its metadata says."""
    shapes = shapes_of(checkpoint)
    if checkpoint.gguf is None:
        return Base(checkpoint.config or {}, shapes)
    metadata = checkpoint.gguf.metadata
    kind = metadata.get("general.architecture", "")
    fields = {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
    }
    said = {name: metadata.get(f"{kind}.{field}", "") for name, field in fields.items()}
    return Base({"model_type": kind, **{name: int(text) for name, text in said.items() if text.isdecimal()}}, shapes)


def _in_its_names(adapter: Adapter, architecture: str) -> Adapter:
    """An adapter in GGUF, as its file has it."""
    meant = str(adapter.config.get("general.architecture", ""))
    if meant != architecture:
        raise AdapterError(
            f"{printable(str(adapter.path))} is for the architecture '{printable(meant)}', and the base is of"
            f" '{printable(architecture)}'",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    return replace(adapter, modules=modules_in_gguf(adapter.header), notes=(), on_base=None)


@cache
def _names(architecture: str) -> Mapping[str, str]:
    """What llama.cpp calls each module that somebody has a name for; the number of a layer is ``{bid}`` in both."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: tensor for tensor in table["architectures"][architecture] for name in (tensor, *table["tensors"][tensor])}


def _place(tensor: str, architecture: str, checkpoint: Checkpoint) -> _Named | None:
    """Where `tensor`, as transformers calls it, lies in `checkpoint`; None where it has none of that name."""
    expert = _EXPERT.search(tensor)
    module, dot, kind = (tensor if expert is None else _EXPERT.sub("", tensor)).rpartition(".")
    if kind not in ("weight", "bias"):
        module, dot, kind = f"{module}{dot}{kind}", ".", "weight"
    number = _NUMBER.search(f"{module}.")
    found = _names(architecture).get(_NUMBER.sub("{bid}", f"{module}.", count=1).removesuffix("."))
    if found is None:
        return None
    name = f"{found.replace('{bid}', number[0] if number else '')}.{kind}"
    base = checkpoint.tensors.get(name)
    if base is None:  # a head that is not stored is the embedding
        return _Named(name) if name == "output.weight" and "token_embd.weight" in checkpoint.tensors else None
    if expert is None:
        return _Named(name)
    return _Named(name, int(expert[1])) if len(base.shape) == 3 and int(expert[1]) < base.shape[0] else None


def _places(adapter: Adapter, architecture: str, checkpoint: Checkpoint) -> dict[str, _Named]:
    """Where the tensors of `adapter` lie, under the one rewriting of what wraps the model that finds most of them."""
    best: dict[str, _Named] = {}
    names = tuple(part for name in adapter.tensor_names for part in _parts(name))
    for rewritten in _rewritten(names):
        found = {name: _place(new, architecture, checkpoint) for name, new in rewritten.items()}
        placed = {name: place for name, place in found.items() if place is not None}
        if len(placed) > len(best):
            best = placed
        if len(best) == len(names):
            break
    return best


def _parts(tensor: str) -> tuple[str, ...]:
    """What llama.cpp has of `tensor` one by one."""
    front, _, last = tensor.rpartition(".experts.")
    return (f"{front}.experts.gate_proj", f"{front}.experts.up_proj") if last == "gate_up_proj" else (tensor,)


def _matrices(module: AdapterModule, places: Mapping[str, _Named], checkpoint: Checkpoint) -> Iterator[AdapterModule]:
    """`module`, or of an expert of a stack that it was trained on as a whole (PEFT's target_parameters) the matrices that llama.cpp
    has of it, each (out, in): gate before up, which PEFT may have seen the other way round.

    Raises `UnsupportedAdapterError` where it fits both ways.
    """
    parts = _parts(module.tensor)
    if module.index is None or not all(part in places and places[part].tensor in checkpoint.tensors for part in parts):
        yield module
        return
    shapes = [checkpoint.tensors[places[part].tensor].shape[1:] for part in parts]
    wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if module.shape == wanted == wanted[::-1]:
        raise UnsupportedAdapterError(
            f"{printable(module.name)}: the experts are square, and whether the adapter was trained on them as (out, in) or as"
            " (in, out) is not known here",
            hint="nothing was written; merge into the base in safetensors, and convert the result",
        )
    straight = module.turned() if module.shape == wanted[::-1] else replace(module, exchanged=True)
    if len(parts) == 1 or module.shape not in (wanted, wanted[::-1]):
        yield straight
        return
    if straight.transform is not None or straight.residual is not None or straight.magnitude_axis == 1:
        raise UnsupportedAdapterError(
            f"{printable(module.name)} is no sum, and llama.cpp has its gate and up projections apart",
            hint="nothing was written; merge into the base in safetensors, and convert the result",
        )
    start = 0
    for part, (size, *_) in zip(parts, shapes, strict=True):
        magnitude = None if straight.magnitude is None else narrow(straight.magnitude, 0, start, size)
        yield replace(
            straight,
            name=f"{module.name}, {part.rpartition('.')[2]}",
            lora_B=narrow(straight.lora_B, 0, start, size),
            magnitude=magnitude,
            tensor=part,
        )
        start += size


def _rewritten(names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """`names` without the first parts that wrap a language model, none to three of them, and with what may stand in their place."""
    for count in range(4):
        for front in ("", "model.", "transformer."):
            found = {name: front + _unwrapped(name, count) for name in names}
            yield found


def _unwrapped(name: str, count: int) -> str:
    parts = name.split(".")
    for _ in range(count):
        if len(parts) > 1 and parts[0] in WRAPPERS - VISION:
            parts.pop(0)
    return ".".join(parts)


class _Heads:
    """How many heads queries and keys have, which `metadata` is asked when something has their rows; `notes`: what was done."""

    def __init__(self, adapter: Adapter, architecture: str, metadata: Mapping[str, str]) -> None:
        self._adapter = adapter
        self._architecture = architecture
        self._metadata = metadata
        self.paired = ORDERS[architecture] == "paired"
        self.notes: tuple[str, ...] = ()

    def ordered(self, matrix: Matrix, kind: str) -> Matrix:
        """`matrix` (rows, …) with its rows in pairs; `kind`: q or k."""
        field = f"{self._architecture}.attention.head_count"
        said = self._metadata.get(field, "")
        said = self._metadata.get(f"{field}_kv", said) if kind == "k" else said
        heads, rows = int(said) if said.isdecimal() else 0, matrix.shape[0]
        if not heads or rows % (2 * heads):
            raise InputError(
                f"{printable(self._adapter.name)}: {rows} rows of attn_{kind} are to be put in llama.cpp's order, and the base says"
                f" that they are {printable(said)[:40] or 'no number of'} heads ({printable(field)})",
                hint="nothing was written; merge into the base in safetensors, and convert the result",
            )
        self.notes = ("rows of queries and keys put in llama.cpp's order",)
        return to_pairs(matrix, heads)


def _module(module: AdapterModule, place: _Named | None, heads: _Heads) -> AdapterModule:
    """`module` in its place."""
    if place is None:
        return module
    new = replace(module, tensor=place.tensor)
    if place.index is not None:  # the layer of one expert, which is (out, in)
        new = replace(new, index=place.index, exchanged=True)
    found = _PAIRS.fullmatch(place.tensor)
    if found is None or not heads.paired:
        return new
    if module.transform is not None or module.magnitude_axis == 1:
        raise UnsupportedAdapterError(
            f"{printable(module.name)}: {'DoRA by input' if module.transform is None else module.transform.kind} on queries or"
            " keys, whose rows llama.cpp has in another order, is not merged there",
            hint="nothing was written; merge into the base in safetensors, and convert the result",
        )
    size = new.shape[0]
    magnitude = None if new.magnitude is None else heads.ordered(Reshaped(new.magnitude, (size,)).settled(), found[1])
    bias = None if new.lora_bias is None else heads.ordered(new.lora_bias, found[1])
    return replace(new, lora_B=heads.ordered(new.lora_B, found[1]), magnitude=magnitude, lora_bias=bias)
