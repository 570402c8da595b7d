"""From the tensors that shards hold to the tensors of the model: what stands for a weight is found, and decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, printable
from ...files.expression import Matrix
from ...files.safetensors.info import Header, TensorInfo
from ...files.safetensors.reader import TensorFile
from ..conv1d import model_types, stored_transposed
from .encoded import Config, Encoded, transposed
from .registry import ENCODINGS

OF_ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "input_scale_ub",
    "input_zero_point",
    "output_scale",
    "prob_output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "k_zero_point",
    "v_zero_point",
    "qscale_act",
)
"""How tensors of a quantised model end that go with activations or the cache of attention, and mean nothing to floats."""

LARGEST = 1 << 24
"""Bytes of the largest tensor that is read to tell what another one is."""


@dataclass(frozen=True)
class Recognised:
    """The tensors of the model by name, which of them are encoded and how, and the stored tensors that go with activations."""

    tensors: Mapping[str, Matrix]
    encoded: Mapping[str, Encoded]
    companions: tuple[str, ...] = ()


def recognise(headers: tuple[Header, ...], config: Config, model: Mapping[str, Any] | None = None) -> Recognised:
    """The tensors of the model that the files with these `headers` hold, in their order; an encoded one where its codes lie.

    - `config`: the part of a configuration on quantisation; `model`: all of it, by which weights are told that the model transposes

    Raises `CheckpointError` where tensors contradict each other or `config`.
    """
    stored = {name: info for header in headers for name, info in header.tensors.items()}
    files = {header.path: header for header in headers}

    def read(info: TensorInfo) -> Tensor:
        if info.nbytes > LARGEST:
            raise CheckpointError(f"{printable(str(info.path))}: '{printable(info.name)}' has {info.nbytes} bytes, far too many")
        with TensorFile(files[info.path]) as file:
            return file.read(info)

    left: dict[str, TensorInfo] = dict(stored)
    encoded: dict[str, Encoded] = {}
    for family in ENCODINGS:
        found = dict(family.find(left, config, read))
        if family.as_linear:
            types = tuple(model_types(model))
            found = {name: transposed(each) if stored_transposed(name, types) else each for name, each in found.items()}
        encoded |= found
        taken = {name for each in found.values() for name in (*each.stored, *each.companions)}
        left = {name: info for name, info in left.items() if name not in taken}
    if not encoded:
        return Recognised(stored, {})
    own = {name for each in encoded.values() for name in each.stored}
    named = [name for each in encoded.values() for name in each.companions]
    companions = dict.fromkeys(name for name in (*named, *left) if name in named or name.rpartition(".")[2] in OF_ACTIVATIONS)
    places = {each.stored[0]: name for name, each in encoded.items()}
    tensors: dict[str, Matrix] = {}
    for name, info in stored.items():
        if name in places:
            tensors[places[name]] = encoded[places[name]].decoded
        elif name not in own and name not in companions:
            tensors[name] = info
    return Recognised(tensors, {name: replace(each, companions=()) for name, each in encoded.items()}, tuple(companions))
