"""From a path to an `Adapter`: which format it is in is decided from what is there, and said."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..errors import AdapterError, CheckpointError, InputError, nearest_names, printable
from .adapter import Adapter
from .formats.diffusion.diffusers import may_be_diffusers
from .formats.gguf.reader import is_gguf_model
from .formats.peft.config import CONFIG_NAME
from .formats.peft.from_model import adapters_of
from .formats.peft.reader import WEIGHTS_NAME
from .formats.table import FORMATS, Format
from .read_options import ReadOptions
from .source import Source, look


def load_adapter(path: str | os.PathLike[str] | nn.Module, options: ReadOptions | None = None) -> Adapter:
    """The adapter at `path`, a folder or a file in one of the formats of `adapters.formats`; `Adapter.format` says which.

    For a model in memory of PEFT: the one adapter of it that is active, as PEFT would save it, copied from memory.

    Only headers and configuration are read, and the bytes for their hash. `options` say what the files cannot.

    Raises `AdapterError` where there is no adapter, its files contradict each other or several formats fit, `AdapterConfigError`
    for a field of its configuration, `UnsupportedAdapterError` for a kind that cannot be merged, and
    `LayerError` for a model whose adapters are merged, switched off, or none.

    >>> import lorafold
    >>> module = lorafold.load_adapter("adapter").modules["model.layers.0.q_proj"]
    >>> module.scaling.value, module.scaling.why
    (2.0, 'lora_alpha 4 / r 2')
    """
    options = options or ReadOptions()
    if isinstance(path, nn.Module):
        return _one_of(path, options)
    if options.lora_alpha is not None and not math.isfinite(options.lora_alpha):
        raise InputError(f"lora_alpha must be a finite number, not {options.lora_alpha}")
    try:
        source = look(Path(path), options)
        found = _named(options.format) if options.format is not None else _fitting(source)
        adapter = replace(found.load(source), format=found.name)
        return adapter if options.fan_in_fan_out is None else _stored(adapter, options.fan_in_fan_out)
    except CheckpointError as error:  # of the file that holds its tensors
        raise AdapterError(error.message, hint=error.hint) from error


def _one_of(model: nn.Module, options: ReadOptions) -> Adapter:
    found = adapters_of(model, options)
    if len(found) > 1:
        names = ", ".join(printable(adapter.name) for adapter in found)
        raise AdapterError(f"{len(found)} adapters of the model are active: {names}", hint="choose one with set_adapter")
    return replace(found[0], format="peft")


def _stored(adapter: Adapter, in_out: bool) -> Adapter:
    """`adapter` with its user's word on how weights are stored."""
    own = adapter.on_base
    if own is not None:
        adapter = replace(adapter, on_base=lambda base: _stored(own(base), in_out))
    return replace(adapter, given_fan_in_fan_out=in_out)


def is_adapter(path: Path, options: ReadOptions | None = None) -> bool:
    """Whether what is at `path` is in one of the formats, or is meant to be.

    Raises as `load_adapter` does where a file is damaged or may not be read.
    """
    options = options or ReadOptions()
    if options.format is not None:
        return True
    if not path.exists():
        return False
    source = look(path, options)
    if is_gguf_model(source):
        return False
    return CONFIG_NAME in source.names or any(each.fits(source) for each in FORMATS)


def _named(name: str) -> Format:
    for each in FORMATS:
        if each.name == name:
            return each
    names = [each.name for each in FORMATS]
    near = nearest_names(name, names)
    raise InputError(
        f"'{printable(name)}' is not a format of adapters; there are {', '.join(names)}",
        hint=f"did you mean {near[0]}?" if near else None,
    )


def _fitting(source: Source) -> Format:
    """The one format that fits; an error where none or several do."""
    fit = [each for each in FORMATS if each.fits(source)]
    if len(fit) == 1:
        return fit[0]
    if fit:
        choices = " or ".join(f"{each.name} ({each.looks})" for each in fit)
        raise AdapterError(
            f"{source.shown} can be read in {len(fit)} formats: {choices}",
            hint=f"say which is meant: `ReadOptions(format='{fit[0].name}')`",
        )
    raise _nothing_fits(source)


def _nothing_fits(source: Source) -> AdapterError:
    names = source.names
    has_config, has_weights = CONFIG_NAME in names, WEIGHTS_NAME in names
    if source.file is None and (has_config or has_weights):
        return AdapterError(
            f"{source.shown} has {CONFIG_NAME if has_config else WEIGHTS_NAME} but no {WEIGHTS_NAME if has_config else CONFIG_NAME}"
        )
    if source.file is None:
        inner = sorted(entry.name for entry in source.path.iterdir() if (entry / CONFIG_NAME).is_file())
        if inner:
            return AdapterError(
                f"{source.shown} holds no {CONFIG_NAME}", hint=f"there is one in {printable(str(source.path / inner[0]))}"
            )
        if "config.json" in names:
            return AdapterError(
                f"{source.shown} holds no {CONFIG_NAME}; it looks like a base model",
                hint="the base model comes first, adapters after",
            )
    wanted = "\n".join(f"  {each.name:<10} {each.looks}" for each in FORMATS)
    hint = None
    if source.file is not None and may_be_diffusers(source):
        hint = (
            "if it is of an image, video or sound model, say so: `ReadOptions(format='diffusers')`, for which alpha is the rank"
            " where the file has none; an adapter of PEFT's is a folder, whose adapter_config.json has its alpha"
        )
    what = f"{source.shown} is in no format that is known: {_what_is_there(source)}; expected one of\n{wanted}"
    return AdapterError(what, hint=hint)


def _what_is_there(source: Source) -> str:
    """The tensors of the file that was given, or the files of the folder, in a few words."""
    if source.file is not None:
        tensors = source.header(source.file).tensors
        names, kind = list(tensors), "tensor"
    else:
        names, kind = sorted(source.names), "file"
    if not names:
        return f"it holds no {kind}s"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"it holds the {kind}{'s' if len(names) > 1 else ''} {', '.join(printable(name) for name in names[:3])}{more}"
