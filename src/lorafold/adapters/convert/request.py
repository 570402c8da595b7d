"""What a writer of a format is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedAdapterError, printable
from ...files.safetensors.buffers import bytes_of
from ...files.safetensors.header import PT_METADATA, encode_header
from ...files.safetensors.info import NAMES
from ..adapter import Adapter, AdapterModule, Base
from ..formats.diffusion.names import PIPELINE, component_of, underscored, within
from ..numbers import AdapterReader, check_sum

"""Formats in which a module's name begins with the part of a pipeline that it is of."""


@dataclass(frozen=True)
class WriteRequest:
    """An adapter to be written in another format.

    - `updates`: all of its updates; `adapter`: where they are from, for what it holds beside them
    - `base`: what is known of the base model, or None; `component`: the part of a pipeline that it is for
    - `makers`: whether names are those of the makers of the model where kohya's files have these
    - `rounded`: whether numbers may be rounded to float32 where the format cannot hold them
    """

    adapter: Adapter
    updates: Sequence[Update]
    base: Base | None = None
    component: str | None = None
    rounded: bool = False
    makers: bool = False

    @property
    def shown(self) -> str:
        """The adapter's path, for errors."""
        return printable(str(self.adapter.path))

    @property
    def of_pipeline(self) -> bool:
        """Whether the names of the adapter's modules begin with a part of a pipeline."""
        return self.adapter.format in PIPELINE

    def of_one_model(self) -> WriteRequest:
        """The request with names as the model itself has them, for formats that do not know pipelines.

        Raises `InputError` where the updates are of several parts, or their names are spelled with underscores.
        """
        if not self.of_pipeline:
            return self
        parts = sorted({component_of(update.name) for update in self.updates})
        if len(parts) > 1:
            raise InputError(
                f"{self.shown} is for {len(parts)} parts of a pipeline: {', '.join(printable(part) for part in parts)}",
                hint="this format is for one model: choose with `ReadOptions(component=…)`",
            )
        for update in self.updates:
            if underscored(update.name):
                raise InputError(
                    f"{self.shown}: {printable(update.name)} is spelled with underscores, and what it was is not known",
                    hint="give the base that has the module: `base=BASE`",
                )
        return replace(self, updates=[replace(update, name=within(update.name)) for update in self.updates])


@dataclass(frozen=True)
class WrittenAdapter:
    """The files of the output: bytes by name, and notes on what was done. An output that is one file has the name ``""``."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = field(default=())


def refuse(request: WriteRequest, kind: str, *, whole: bool = True, rows: bool = True, biases: bool = False) -> None:
    """Raises `UnsupportedAdapterError` for what the format `kind` has no place for.

    - `whole`, `rows`: whole tensors, and rows, that replace those of the base; `biases`: such tensors that are biases may stay
    """
    lost = [name for name in request.adapter.replacements if whole and not (biases and name.endswith(".bias"))]
    lost += [f"rows of {name}" for name in request.adapter.rows if rows]
    _lose(request, kind, lost, "tensors that replace those of the base")
    _lose(request, kind, ["the order of the base's layers"] if request.adapter.layers else [], "layers that stand several times")


def refuse_parts(request: WriteRequest, kind: str, *parts: str) -> None:
    """Raises `UnsupportedAdapterError` where an update has one of `parts`: magnitude, lora_bias, embedding, kernel."""
    words = {
        "magnitude": "DoRA's magnitudes",
        "lora_bias": "biases of lora_B",
        "embedding": "updates of embeddings",
        "kernel": "updates of convolutions",
    }
    for part in parts:
        found = [update.name for update in request.updates if _has(update, part)]
        _lose(request, kind, found, words[part])


def _has(update: Update, part: str) -> bool:
    value = getattr(update, part)
    return value is not None and not (isinstance(value, bool | tuple) and not value)


def _lose(request: WriteRequest, kind: str, lost: Sequence[str], what: str) -> None:
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UnsupportedAdapterError(
            f"{request.shown} holds {what}, for which the format {kind} has no place; lost would be"
            f" {', '.join(printable(name) for name in lost[:3])}{more}",
            hint="nothing was written; choose another format, or merge the adapter",
        )


STORED = (torch.float32, torch.float16, torch.bfloat16)
"""Types of factors that formats have in common."""


@dataclass(frozen=True, eq=False)
class Update:
    """What is added to one weight.

    - `name`: the module's
    - `lora_A`: (r, in, *kernel); `lora_B`: (out, r, 1, …); of an embedding (r, num_embeddings) and (embedding_dim, r)
    - `scaling`: the factor; `lora_alpha`: a number that the factor is of the rank, if it was so given
    - `magnitude`: (outputs,) of DoRA, or None; `lora_bias`: (out,), or None
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_alpha: float
    embedding: bool = False
    magnitude: Tensor | None = None
    lora_bias: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank that the factors have room for."""
        return self.lora_A.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution; empty for other layers."""
        return tuple(self.lora_A.shape[2:])


_VECTORS = (".w_norm", ".b_norm", ".diff_b")
"""What LyCORIS calls differences of norms and biases."""


def read_updates(adapter: Adapter) -> list[Update]:
    """The updates of `adapter`, all of them in memory.

    Raises `UnsupportedAdapterError` for what is no update of a whole weight: experts of a tensor of several, and updates of what is
    left of the base weight.
    """
    with AdapterReader(adapter) as reader:
        return [_update(module, reader, adapter) for module in adapter.modules.values()]


def _update(module: AdapterModule, reader: AdapterReader, adapter: Adapter) -> Update:
    where = f"{printable(adapter.name)}: {printable(module.name)}"
    if module.index is not None or module.tensor != f"{module.name}.weight":
        raise UnsupportedAdapterError(
            f"{where} is for {printable(module.tensor)}, not for the weight of a module: each format holds such updates in its own"
            " way",
            hint="nothing was written; merge it, or keep the format that it is in",
        )
    vector = next((info.name for info in module.stored if info.name.endswith(_VECTORS)), None)
    if vector is not None:
        raise UnsupportedAdapterError(
            f"{where}: '{printable(vector)}' changes a norm or a bias, which no other format has a place for",
            hint="nothing was written; merge it instead",
        )
    check_sum(module, adapter)
    if module.residual is not None:
        raise UnsupportedAdapterError(
            f"{where} was trained on what {module.residual.kind} left of the base weight, which no other format can say",
            hint="nothing was written; merge it, or convert it with PEFT (path_initial_model_for_weight_conversion)",
        )
    if module.magnitude is not None and (module.rule != "peft" or module.magnitude_axis != 0):
        raise UnsupportedAdapterError(
            f"{where} has LyCORIS's dora_scale, which other formats do not have", hint="nothing was written; merge it instead"
        )
    lora_A, lora_B = _narrowed(reader.matrix(module.lora_A)), _narrowed(reader.matrix(module.lora_B))
    return Update(
        name=module.name,
        lora_A=lora_A,
        lora_B=lora_B.reshape(*lora_B.shape[:2], *(1 for _ in lora_A.shape[2:])),  # kernels of 1, as many as A has
        scaling=module.scaling.value,
        lora_alpha=module.scaling.lora_alpha,
        embedding=module.embedding,
        magnitude=None if module.magnitude is None else _narrowed(reader.matrix(module.magnitude).flatten()),
        lora_bias=None if module.lora_bias is None else _narrowed(reader.matrix(module.lora_bias)),
    )


def _narrowed(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, in float32 where it is float64 and loses nothing by that."""
    if tensor.dtype == torch.float64 and torch.equal(tensor.float().double(), tensor):
        tensor = tensor.float()
    return tensor.contiguous()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file with `tensors`, sorted by name, and `metadata` beside the metadata field that every loader wants."""
    held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    specs = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items()]
    head, infos = encode_header(specs, {**PT_METADATA, **(metadata or {})})
    return b"".join([head, *(bytes(bytes_of(held[info.name])) for info in infos)])
