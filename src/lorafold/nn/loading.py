"""An adapter from disk into a model in memory, by the reader that the merging of files uses."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, AdapterModule, Base, on_base
from ..adapters.load import load_adapter
from ..adapters.numbers import AdapterReader, check_numbers, check_sum
from ..adapters.read_options import ReadOptions
from ..errors import (
    SHOWN,
    AmbiguousNameError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    UnsupportedAdapterError,
    nearest_names,
    printable,
)
from ..kernel.merge import Precision
from ..kernel.undo.keep import UndoKind
from ..kernel.update import joint_dtype
from .attaching import put
from .foreign import check_no_others
from .layers.adapted import OWN
from .layers.conv import ConvLoRA
from .layers.embedding import Embedding
from .layers.linear import MergedLinear
from .layers.locks import model_lock
from .layers.mergeable import Mergeable
from .layers.ownership import check_not_shared
from .layers.plain_weight import check_plain
from .merging_layers import set_active
from .replace import Settings, can_replace, lora_layer
from .select import plain_name


@dataclass(frozen=True, eq=False)
class _Pair:
    """One module's factors, read."""

    module: AdapterModule
    lora_A: Tensor
    lora_B: Tensor

    def for_layer(self, layer: Mergeable) -> _Pair:
        """The same update in the shapes of `layer`.

        PEFT's pair for a convolution is ΔW = B @ A as (out_channels, in_channels · kernel). A `ConvLoRA` of two or three dimensions
        reads each such row as k rows, (out_channels · k, in_channels · rest): A's rows are cut into k pieces, and B stands once for
        each piece.
        """
        if not isinstance(layer, ConvLoRA) or layer.conv.groups != 1:
            return self
        r, out, inner = self.lora_A.shape[0], self.lora_B.shape[0], layer.matrix(layer.weight).shape[1]
        if self.lora_A.numel() != r * layer.weight[0].numel() or self.lora_B.numel() != out * r:
            return self  # which will not fit
        k = layer.weight[0].numel() // inner
        pieces = self.lora_A.reshape(r, k, inner).transpose(0, 1).reshape(k * r, inner)
        blocks = self.lora_B.new_zeros(out, k, k, r)
        for t in range(k):
            blocks[:, t, t] = self.lora_B.view(out, r)
        return _Pair(self.module, pieces, blocks.view(out * k, k * r))


def load_adapter_into(
    model: nn.Module,
    path: str | os.PathLike[str] | nn.Module,
    *,
    name: str = OWN,
    active: bool = True,
    merge_weights: bool = True,
    undo: UndoKind = "copy",
    precision: Precision = "exact",
    read_options: ReadOptions | None = None,
) -> list[str]:
    """Load the adapter at `path`, or of a model in memory of PEFT, into `model`, and return the names of its modules there.

    Modules that are no LoRA layers yet become such, as by `attach` with `merge_weights`, `undo` and `precision`.

    - `name`: the adapter's in the layers, by default their own, whose place it takes
    - `active`: whether it becomes the one that counts; layers that are merged are then merged anew
    - `read_options`: what the adapter's files cannot tell

    Names may be those of the model whose body this is, or of the body of this model. Where PEFT saved the base weight of an
    embedding or a head beside its LoRA pair, that is the weight which the layer has after, as it is in PEFT.

    Raises, with the model as it was: what `load_adapter` raises, `NonFiniteError` for NaN or infinity, `UnmatchedAdapterError` for
    modules that the model does not have, `ShapeMismatchError` where one does not fit, `UnsupportedAdapterError` for what a live
    model cannot take (whole tensors, biases), and `LayerError` as `attach` and `set_active` do.
    """
    check_no_others(model, "load_adapter_into")
    adapter = on_base(load_adapter(path, read_options), _base_of(model))
    check_numbers(adapter)
    with model_lock(model):
        rename = _rename_of(adapter, model)
        adapter, bases = _without_copies(adapter, rename, model)
        _check_supported(adapter)
        modules = _matched(adapter, rename, model)
        with AdapterReader(adapter) as reader:
            for module in adapter.modules.values():
                check_sum(module, adapter)
            pairs = {n: _Pair(m, reader.matrix(m.lora_A), reader.matrix(m.lora_B)) for n, m in adapter.modules.items()}
        settings = Settings(0, 1, 0.0, merge_weights, undo, precision)
        fresh = {module: lora_layer(module, settings) for module in modules.values() if not isinstance(module, Mergeable)}
        layers = {n: m if isinstance(m, Mergeable) else fresh[m] for n, m in modules.items()}
        pairs = {n: pair.for_layer(layers[n]) for n, pair in pairs.items()}
        for n, layer in layers.items():
            _check_fits(layer, pairs[n], n)
            if name != OWN:
                layer.check_new_name(name)
        put(model, fresh)
        dropout = float(adapter.config.get("lora_dropout", 0.0))
        for n, layer in layers.items():
            if n in bases:
                _rebase(layer, bases[n])
            _give(layer, pairs[n], name, dropout)
        if active:
            set_active(model, name)
    return [rename(n) for n in layers]


def _base_of(model: nn.Module) -> Base:
    """What a reader may ask about `model`: its transformers configuration, if it has one, and the shapes of its tensors."""
    config: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return Base(config, {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()})


def _check_supported(adapter: Adapter) -> None:
    rescaled = next((module.name for module in adapter.modules.values() if module.magnitude is not None), None)
    if rescaled is not None:
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} is DoRA, which rescales the weight of {printable(rescaled)}; a model in memory cannot",
            hint="merge it into the base model's files, and load those",
        )
    residual = next((module for module in adapter.modules.values() if module.residual is not None), None)
    if residual is not None and residual.residual is not None:
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} was trained on what {residual.residual.kind} left of the weight of"
            f" {printable(residual.name)}; a model in memory has all of it",
            hint="merge it into the base model's files, and load those",
        )
    bare = next((module.tensor for module in adapter.modules.values() if module.tensor != f"{module.name}.weight"), None)
    if bare is not None and adapter.format == "peft":
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} is for the bare parameter {printable(bare)}; the layers of a model in"
            " memory are modules",
            hint="merge it into the base model's files, and load those",
        )
    if adapter.rows:
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} replaces rows of {printable(next(iter(adapter.rows)))}:"
            " a model in memory cannot take that",
            hint="merge it into the base model's files, and load those",
        )
    biases = [module.name for module in adapter.modules.values() if module.lora_bias is not None]
    if adapter.replacements or biases:
        what = next(iter(adapter.replacements), None) or f"{biases[0]}.lora_bias"
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} holds more than low-rank updates: {printable(what)}. "
            "A layer cannot take that out again",
            hint="merge_into(model, …) merges it into a model in memory, and takes it out again",
        )


@dataclass(frozen=True)
class _Rename:
    """`strip` is taken off the front of a name, and `add` put there."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name


def _rename_of(adapter: Adapter, model: nn.Module) -> _Rename:
    """How the names of `adapter` become those of `model`, which may be the body of what it was trained on, or have one.

    Raises `AmbiguousNameError` where they could become several.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    taking = {name for name, module in modules.items() if isinstance(module, Mergeable) or can_replace(module)}
    names = list(adapter.modules)
    if not names or set(names) <= modules.keys():
        return _Rename()
    parts = names[0].split(".")
    rests = [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts))]
    bodies = [_Rename(front and f"{front}.") for front, rest in rests if rest in taking]
    wholes = [_Rename(add=name.removesuffix(names[0])) for name in taking if name.endswith(f".{names[0]}")]
    fitting = [rename for rename in (*bodies, *wholes) if all(rename(name) in taking for name in names)]
    if len(fitting) > 1:
        places = ", ".join(printable(rename(names[0])) for rename in fitting)
        raise AmbiguousNameError(
            f"{printable(names[0])} of {printable(str(adapter.path))} could be {places}", hint="load it into the part that is meant"
        )
    return fitting[0] if fitting else _Rename()  # all that is missing is said below


def _without_copies(adapter: Adapter, rename: _Rename, model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """`adapter` without the base weights that PEFT saves beside a LoRA pair on an embedding or a head, and what the model has.

    And such base weights by module, where the model has others: the pair was trained on these.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    left, bases = {}, {}
    with AdapterReader(adapter) as reader:
        for name, info in adapter.replacements.items():
            module_name, _, tensor_name = rename(name).rpartition(".")
            module = modules.get(module_name)
            found: Any = getattr(module, tensor_name, None)
            if isinstance(module, Mergeable) and tensor_name == "weight":
                found = module.base_weight()
            if not isinstance(found, Tensor) or found.is_meta or tuple(found.shape) != info.shape:
                left[name] = info
                continue
            value = reader.tensor(info).to(found.dtype)
            if torch.equal(value, found.detach().cpu()):
                continue
            if ".base_layer." in info.name and tensor_name == "weight" and name.removesuffix(".weight") in adapter.modules:
                bases[name.removesuffix(".weight")] = value
            else:
                left[name] = info
    return replace(adapter, replacements=left), bases


def _rebase(layer: Mergeable, weight: Tensor) -> None:
    """Make `weight` the base of `layer`."""
    again = layer.merged
    layer.unmerge()
    with torch.no_grad():
        layer.weight.copy_(weight)
    if again:
        layer.merge()


def _matched(adapter: Adapter, rename: _Rename, model: nn.Module) -> dict[str, nn.Module]:
    """The module of `model` for each module of `adapter`, by its name there."""
    found = {plain_name(name): module for name, module in model.named_modules()}
    there = {name: rename(name) for name in adapter.modules}
    modules = found | {name: found[own] for name, own in there.items() if own in found}
    unmatched = [name for name in adapter.modules if name not in modules]
    if unmatched:
        usable = [name for name, module in modules.items() if isinstance(module, Mergeable) or can_replace(module)]
        raise UnmatchedAdapterError(
            f"{len(unmatched)} of {len(adapter.modules)} adapter modules are not in the model",
            unmatched=[printable(name) for name in unmatched],
            nearest={printable(name): nearest_names(name, usable) for name in unmatched[:SHOWN]},
            hint="nothing was changed; check that the adapter was trained on this base model",
        )
    matched = {name: modules[name] for name in adapter.modules}
    for name, module in matched.items():
        plain = not isinstance(module, Mergeable)
        if (plain and not can_replace(module)) or isinstance(module, MergedLinear):
            raise UnsupportedAdapterError(f"{name} is a {type(module).__qualname__}, which cannot take an adapter of PEFT")
        if plain:
            check_plain(module, name, ("weight", "bias"), here=False)
            check_not_shared(module, model)
    return matched


def _check_fits(layer: Mergeable, pair: _Pair, name: str) -> None:
    expected = layer.factor_shapes(pair.module.scaling.r)
    found = (tuple(pair.lora_A.shape), tuple(pair.lora_B.shape))
    if found != expected or pair.module.embedding is not isinstance(layer, Embedding):
        raise ShapeMismatchError(
            f"{name}: lora_A and lora_B have shapes {found[0]} and {found[1]}, but the layer, "
            f"{type(layer).__name__} with a weight of {tuple(layer.weight.shape)}, takes {expected}",
            hint="nothing was changed; check that the adapter was trained on this base model",
        )


def _give(layer: Mergeable, pair: _Pair, name: str, dropout: float) -> None:
    """Put the numbers into `layer`, under `name`. Halves become float32: nothing is lost, and they can be trained."""
    scaling = pair.module.scaling
    r, lora_alpha = scaling.r, scaling.lora_alpha
    dtype = joint_dtype((pair.lora_A.dtype, torch.float32))
    lora_A, lora_B = pair.lora_A.to(dtype), pair.lora_B.to(dtype)
    if name == OWN:
        layer.take_factors(lora_A, lora_B, r=r, lora_alpha=lora_alpha, lora_dropout=dropout, scaling=scaling.value)
        return
    factors = layer.add_adapter(name, r, lora_alpha, dropout, scaling=scaling.value, dtype=dtype)
    with torch.no_grad():
        factors.lora_A.copy_(lora_A)
        factors.lora_B.copy_(lora_B)
