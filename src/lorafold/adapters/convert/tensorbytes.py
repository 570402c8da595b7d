"""The bytes of a safetensors file that holds a few tensors, made in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...files.safetensors.dtypes import NAMES
from ...files.safetensors.layout import PT_METADATA, encode_header
from ...files.safetensors.memory import bytes_of


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file with `tensors`, sorted by name, and `metadata` beside the remark that every loader wants."""
    held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    specs = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items()]
    head, infos = encode_header(specs, {**PT_METADATA, **(metadata or {})})
    return b"".join([head, *(bytes(bytes_of(held[info.name])) for info in infos)])
