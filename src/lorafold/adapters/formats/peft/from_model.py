"""The adapters of a model in memory of PEFT, as what PEFT would save of them: its names and its configuration, taken from memory.

They then go through the reader of files, so every kind that it reads is read here. PEFT is not imported: a model has its layers
only where somebody has imported it.

A model's own base has what an initialisation took out of it (PiSSA, OLoRA …), its replicated layers and its resized vocabulary
already; for that base those fields are left out. The factor of an update is the one that the layer has, which `set_scale` and
`add_weighted_adapter` may have changed since the configuration was written.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....errors import CheckpointError, LayerError, printable
from ....files.safetensors.info import Header
from ....files.safetensors.mapped import digest, memory_header
from ....kernel.update import scaling_factor
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...read_options import ReadOptions
from ...source import Source
from .config import CONFIG_NAME
from .reader import WEIGHTS_NAME, load_peft

_PREFIX = "base_model.model."
_OF_THE_BASE: Mapping[str, Any] = {"layer_replication": None, "loftq_config": {}, "init_lora_weights": True}
"""Fields that say what was done to the base before training, and their values where nothing was."""


def is_peft_layer(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's: around a layer, around a module that is saved whole, or around one with trained rows."""
    return _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer") or _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper")


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model` has layers of PEFT, and the configurations of their adapters."""
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and bool(configs) and any(is_peft_layer(module) for module in model.modules())


def plain_model(model: nn.Module) -> nn.Module:
    """The model that PEFT put its layers into, of a `PeftModel` or `LoraModel` around it or of the model itself."""
    if _is(model, "peft.peft_model", "PeftModel"):
        model = model.base_model  # type: ignore[assignment]
    return model.model if _is(model, "peft.tuners.tuners_utils", "BaseTuner") else model  # type: ignore[return-value]


def plain_layer(module: nn.Module) -> nn.Module:
    """What `module` is around, through as many layers of PEFT as there are; itself where it is none."""
    while is_peft_layer(module):
        inner = "original_module" if _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper") else "base_layer"
        module = getattr(module, inner)
    return module


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that `model` computes with now.

    Raises `LayerError` where they are switched off or merged by PEFT, or the layers do not have the same.
    """
    active: tuple[str, ...] | None = None
    for name, layer in model.named_modules():
        if not is_peft_layer(layer):
            continue
        own = tuple(layer.active_adapters)
        if layer.disable_adapters:
            raise LayerError(f"{printable(name)}: PEFT's adapters are switched off", hint="call enable_adapter_layers() first")
        if layer.merged_adapters:
            raise LayerError(
                f"{printable(name)}: PEFT has merged {', '.join(layer.merged_adapters)} into the base weights itself",
                hint="call unmerge_adapter() first; it subtracts, so load the base anew where every bit counts",
            )
        if not _adds(layer):
            continue  # some adapters have nothing there
        if active is not None and own != active:
            raise LayerError(
                f"{printable(name)} uses the adapters {list(own)}, and others {list(active)}",
                hint="choose the same for all with set_adapter",
            )
        active = own
    if active is None:  # of a method whose layers are not LoRA's: reading its configuration says so
        given = getattr(model, "active_adapters", ())
        active = tuple(given() if callable(given) else given)
    if not active:
        raise LayerError("no adapter of the model is active", hint="choose one with set_adapter")
    _check_saved(model, active)
    return active


def adapters_of(model: nn.Module, options: ReadOptions | None = None, *, own_base: bool = False) -> list[Adapter]:
    """The active adapters of `model`, a model of PEFT; `own_base`: for the base that it has in memory, not for the one on disk.

    Raises `LayerError` as `active_adapters` does and where it is none, and what reading files raises.
    """
    if not is_peft_model(model):
        raise LayerError(
            f"{type(model).__qualname__} is no model of PEFT with an adapter in it", hint="give a path, or a PeftModel"
        )
    return [_adapter(model, name, options or ReadOptions(), own_base) for name in active_adapters(model)]


_LYCORIS = "peft.tuners.lycoris_utils", "LycorisLayer"
"""What PEFT's LoHa and LoKr have in common."""


def _adds(layer: nn.Module) -> bool:
    """Whether what the layer of PEFT has learnt is added to its weight with a factor: LoRA, LoHa, LoKr."""
    return _is(layer, "peft.tuners.lora.layer", "LoraLayer") or _is(layer, *_LYCORIS)


@dataclass(frozen=True)
class _Memory(Source):
    """A source whose two files are in memory."""

    def sha256(self, *names: str) -> str:
        header: Header = self._read[WEIGHTS_NAME]
        return digest(header, json.dumps(self._read[CONFIG_NAME], sort_keys=True).encode())


def _adapter(model: nn.Module, name: str, options: ReadOptions, own_base: bool) -> Adapter:
    config: Any = model.peft_config[name]  # type: ignore[index]
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    fields = json.loads(json.dumps(fields, default=str)) | {"inference_mode": True}
    if own_base:
        fields |= {key: value for key, value in _OF_THE_BASE.items() if key in fields}
        options = replace(options, initial_adapter=None)
    path = Path(f"PEFT's adapter {name}")
    found = frozenset({CONFIG_NAME, WEIGHTS_NAME})
    try:
        header = memory_header(_saved(model, name, own_base), path / WEIGHTS_NAME)
    except CheckpointError as error:
        raise LayerError(error.message, hint=error.hint) from error
    source = _Memory(path, path, None, found, options, {CONFIG_NAME: fields, WEIGHTS_NAME: header})
    adapter = _as_scaled(load_peft(source), _rescaled_layers(model, name))
    return _of_what_is_left(adapter) if own_base else adapter


def _saved(model: nn.Module, name: str, own_base: bool) -> dict[str, Tensor]:
    """What PEFT would save of the adapter `name`, by its names in the file."""
    save: Any = sys.modules["peft"].get_peft_model_state_dict
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which say what it saves beside
        tensors: Mapping[str, Tensor] = save(model, adapter_name=name, save_embedding_layers=False if own_base else "auto")
    prefix = "model." if _is(model, "peft.tuners.tuners_utils", "BaseTuner") else ""
    return {key if key.startswith(_PREFIX) else _PREFIX + key.removeprefix(prefix): value for key, value in tensors.items()}


@dataclass(frozen=True)
class _Rescaled:
    """The factor that a layer was made with, and the one that it has now."""

    made: float
    now: float

    def of(self, scaling: Scaling) -> Scaling:
        value = scaling.value * (self.now / self.made) if self.made else self.now
        return replace(scaling, value=value, lora_alpha=value * scaling.r, why=f"{self.now:g}, as the layer's scaling was set")


def _rescaled_layers(model: nn.Module, name: str) -> dict[str, _Rescaled]:
    """The layers whose factor for the adapter `name` is not that of its configuration, by module or by bare parameter."""
    found: dict[str, _Rescaled] = {}
    for path, layer in plain_model(model).named_modules():
        of_layer: Any = layer
        if not _adds(layer) or name not in of_layer.scaling:
            continue
        if _is(layer, *_LYCORIS):
            made = scaling_factor(of_layer.r[name], of_layer.alpha[name])
        else:
            made = scaling_factor(of_layer.r[name], of_layer.lora_alpha[name], bool(of_layer.use_rslora.get(name, False)))
        each = _Rescaled(made, float(of_layer.scaling[name]))
        if each.made != each.now:
            plain = ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod"))
            parameter = getattr(layer, "parameter_name", None)
            found[plain if parameter is None else f"{plain}.{parameter}"] = each
    return found


def _as_scaled(adapter: Adapter, layers: Mapping[str, _Rescaled]) -> Adapter:
    """`adapter` with the factors that the layers have now."""
    if not layers:
        return adapter

    def now(module: AdapterModule) -> AdapterModule:
        names = (module.tensor, module.tensor.removesuffix(".weight"), module.name)
        each = next((layers[name] for name in names if name in layers), None)
        return module if each is None else replace(module, scaling=each.of(module.scaling))

    made = replace(adapter, modules={name: now(module) for name, module in adapter.modules.items()})
    later = adapter.on_base
    if later is None:
        return made

    def on_base(base: Base) -> Adapter:
        return _as_scaled(later(base), layers)

    return replace(made, on_base=on_base)


def _of_what_is_left(adapter: Adapter) -> Adapter:
    """`adapter` for a base from which what it took out before training is gone already."""
    modules = {name: replace(module, residual=None) for name, module in adapter.modules.items()}
    notes = tuple(note for note in adapter.notes if "trained on what was left" not in note)
    made = replace(adapter, modules=modules, notes=notes)
    later = adapter.on_base
    return made if later is None else replace(made, on_base=lambda base: _of_what_is_left(later(base)))


def _check_saved(model: nn.Module, active: tuple[str, ...]) -> None:
    """Raises `LayerError` where an adapter that is active has a module saved whole, and that of another is used in its place."""
    for name, wrapper in model.named_modules():
        if not _is(wrapper, "peft.utils.other", "ModulesToSaveWrapper"):
            continue
        has = [each for each in active if each in wrapper.modules_to_save]
        used = list(wrapper.active_adapters)[:1]
        if has != used:
            raise LayerError(
                f"{printable(name)}: the adapters {list(active)} are active, of which {has} have this module, and it uses {used}",
                hint="choose the adapters anew with set_adapter",
            )


def _is(module: nn.Module, place: str, name: str) -> bool:
    kind = getattr(sys.modules.get(place), name, None)
    return isinstance(kind, type) and isinstance(module, kind)
