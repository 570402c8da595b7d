"""A model in memory as the rooms that plan know a base: its tensors by the names that they are saved under, of the very modules.

State dicts are not asked: their hooks may rename what is in them, or copy it. PEFT's layers are looked through, so that a model
of PEFT has the names of the plain model that it was made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapters.formats.peft.from_model import is_peft_layer, is_peft_model, plain_layer, plain_model
from ..checkpoints.checkpoint import Checkpoint, Shard
from ..errors import InputError, LayerError
from ..files.safetensors.info import NAMES, FileIdentity, Header, TensorInfo
from ..nn.foreign import others
from ..nn.layers.ownership import Places, places_of
from ..nn.layers.plain_weight import offloaded, why_not_plain
from ..nn.replace import stores_transposed, takes_bias
from ..nn.select import lora_layers, plain_name

PLACE = Path("the model")


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of a model: the attribute `name` of `module`; where that is computed from others, `tensor` is what it is now."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def numbers(self) -> Tensor:
        """Those of the tensor, also where accelerate keeps them elsewhere."""
        found = offloaded(self.module, self.name) if self.tensor.is_meta else None
        return self.tensor if found is None else found


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A layer of PEFT, the child `name` of `parent`, and the plain one that it is around."""

    parent: nn.Module
    name: str
    layer: nn.Module
    plain: nn.Module


@dataclass(frozen=True, eq=False)
class Survey:
    """A model as it is found.

    - `root`: the model whose names its tensors have: the one that PEFT was given, where it is one of PEFT's; else itself
    - `held`: the parameters and the buffers that are saved, by name; those that several modules share under each of theirs
    - `wrapped`: PEFT's layers, the outermost at each place
    - `places`: where all tensors lie, PEFT's and those that are not saved among them
    """

    root: nn.Module
    held: Mapping[str, Held]
    wrapped: tuple[Wrapped, ...]
    places: Places


def survey(model: nn.Module) -> Survey:
    """What there is in `model`.

    PEFT's MultiheadAttention makes its weights parameters anew whenever it is walked through by `named_modules`: that is done once,
    and all else by other ways, so that the tensors are the same ones throughout.
    """
    root = model
    if is_peft_model(model):
        for _ in model.named_modules():
            pass
        root = plain_model(model)
    wrapped = [
        Wrapped(parent, name, child, plain_layer(child))
        for _, parent in _modules(root, "")
        for name, child in parent._modules.items()
        if child is not None and is_peft_layer(child)
    ]
    return Survey(root, held_tensors(root), tuple(wrapped), places_of(root, _every(root, "", {})))


def held_tensors(root: nn.Module) -> dict[str, Held]:
    """The tensors of `root`, the root of a `Survey`, by name."""
    found: dict[str, Held] = {}
    for prefix, module in _modules(root, ""):
        for name in _saved(module):
            tensor = getattr(module, name)
            if isinstance(tensor, Tensor):
                found[plain_name(f"{prefix}{name}")] = Held(module, name, tensor)
    return found


def check_plain_model(model: nn.Module, verb: str) -> None:
    """Raises `LayerError` where `model` has LoRA layers of lorafold, or such of others than PEFT."""
    if any(layer.adapter_names for layer in lora_layers(model).values()):
        raise LayerError(
            f"{verb}: the model has LoRA layers of lorafold", hint="lorafold.merged and eval() merge those; detach takes them out"
        )
    found = {owner: names for owner, names in others(model).items() if owner != "PEFT"}
    if found:
        owner, names = next(iter(found.items()))
        raise LayerError(f"{verb}: the model has layers of {owner}: {names[0]}", hint="take them out first")


def as_checkpoint(found: Survey) -> Checkpoint:
    """What the rooms that plan know a base by."""
    infos: dict[str, TensorInfo] = {}
    start = 0
    for name, each in found.held.items():
        dtype = NAMES.get(each.tensor.dtype)
        if dtype is not None:
            infos[name] = TensorInfo(name, dtype, tuple(each.tensor.shape), start, start + each.tensor.nbytes, PLACE)
            start += each.tensor.nbytes
    if not infos:
        raise InputError("the model has no tensors to merge into")
    names = hashlib.sha256(repr([(info.name, info.dtype, info.shape) for info in infos.values()]).encode()).hexdigest()
    header = Header(PLACE, infos, {}, 0, start, names, FileIdentity(start, 0, 0, 0))
    shards, config = (Shard("model", header),), _config(found.root)
    transposed = frozenset(name for name, each in found.held.items() if each.name == "weight" and stores_transposed(each.module))
    without_bias = tuple(name for name, each in found.held.items() if each.name == "weight" and takes_bias(each.module))
    return Checkpoint(
        PLACE,
        shards,
        infos,
        config,
        {},
        indexed=False,
        single_file=True,
        live=True,
        transposed=transposed,
        without_bias=without_bias,
    )


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The plain modules, each with its name and a dot; what computes a parametrized weight is none."""
    module = plain_layer(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and not (name == "parametrizations" and parametrize.is_parametrized(module)):
            yield from _modules(child, f"{prefix}{name}.")


def _every(module: nn.Module, prefix: str, seen: dict[nn.Module, None]) -> Iterator[tuple[str, nn.Module]]:
    """All modules, as `named_modules` has them."""
    if module in seen:
        return
    seen[module] = None
    yield prefix.removesuffix("."), module
    for name, child in module._modules.items():
        if child is not None:
            yield from _every(child, f"{prefix}{name}.", seen)


def _saved(module: nn.Module) -> Iterator[str]:
    """The names of the tensors of `module`, those that it computes from others among them."""
    yield from (name for name, value in module._parameters.items() if value is not None)
    yield from (n for n, value in module._buffers.items() if value is not None and n not in module._non_persistent_buffers_set)
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.keys()  # type: ignore[operator, union-attr]
    sources = {name.rpartition("_")[0] for name in module._parameters if name.endswith(("_v", "_orig"))}
    yield from (name for name in sorted(sources) if name and name not in module._parameters and why_not_plain(module, name))


def _config(model: nn.Module) -> dict[str, Any] | None:
    """What transformers or diffusers writes into the model's config.json; None where it is of neither."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):  # diffusers
        return {"_class_name": type(model).__name__, **config}
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return {**found, "architectures": [type(model).__name__]} if isinstance(found, dict) else None
