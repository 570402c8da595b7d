"""An adapter as the list of its updates, read, whatever format it came in: what every writer starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedAdapterError, printable
from ...files.safetensors.buffers import bytes_of
from ...files.safetensors.dtypes import NAMES
from ...files.safetensors.layout import PT_METADATA, encode_header
from ..adapter import Adapter, AdapterModule
from ..reader import AdapterReader

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
    """The file with `tensors`, sorted by name, and `metadata` beside the remark that every loader wants."""
    held = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    specs = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items()]
    head, infos = encode_header(specs, {**PT_METADATA, **(metadata or {})})
    return b"".join([head, *(bytes(bytes_of(held[info.name])) for info in infos)])
