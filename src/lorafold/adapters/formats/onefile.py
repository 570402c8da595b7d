"""An adapter that is one file of tensors without a configuration: finding the file, and what all such adapters have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import AdapterError
from ...files.safetensors.info import Header
from ..adapter import Adapter, AdapterModule
from ..source import Source
from .diffusion.components import of_component

_PATTERNS = ("pytorch_lora_weights.safetensors", "*.safetensors")


def tensor_file(source: Source) -> str | None:
    """The name of the one .safetensors file of `source`; None where there is none or several."""
    return source.find(*_PATTERNS)


def open_one(source: Source) -> Header:
    """The head of the one .safetensors file of `source`.

    Raises `AdapterError` where there is none, or several.
    """
    name = tensor_file(source)
    if name is None:
        raise AdapterError(f"{source.shown} holds no .safetensors file, or several", hint="give the path of the file")
    return source.header(name)


def single_file(
    source: Source,
    header: Header,
    modules: Mapping[str, AdapterModule],
    kind: str,
    *,
    notes: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of format `kind` that is `modules`, or what of them is of the component that the user asked for."""
    adapter = Adapter(
        name=source.name,
        path=source.path,
        format=kind,
        modules=modules,
        replacements={},
        header=header,
        sha256=source.sha256(header.path.name),
        config=config or {},
        notes=notes,
    )
    return of_component(adapter, source.options.component)
