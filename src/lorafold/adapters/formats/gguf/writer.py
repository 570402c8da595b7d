"""llama.cpp's adapter: one GGUF file, in llama.cpp's names and order of rows, one alpha for all modules."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from torch import Tensor

from ....errors import InputError, UnsupportedAdapterError, printable
from ....files.evaluation import evaluate
from ....files.gguf.ggml_types import GGML_NUMBERS
from ....files.gguf.gguf_layout import GgufSpec, gguf_layout, number_pair, text_pair
from ....files.safetensors.buffers import bytes_of
from ....files.safetensors.info import NAMES, TensorInfo
from ...convert.request import Update, WriteRequest, WrittenAdapter, refuse, refuse_parts
from ...convert.scalings import alpha_for, one_for_all, stored, with_scaling
from ..rotary import to_pairs
from .names import ARCHITECTURES, PAIRED, name_of


def write_gguf(request: WriteRequest) -> WrittenAdapter:
    """The GGUF file of `request`, whose base must be given: it says the architecture and the number of heads.

    Raises `InputError` without a base, `UnsupportedAdapterError` for families and modules that are not known, and for what a GGUF
    adapter does not have.
    """
    request = request.of_one_model()
    refuse(request, "gguf")
    refuse_parts(request, "gguf", "magnitude", "lora_bias", "kernel")
    if request.base is None:
        raise InputError("a GGUF adapter has the base's names and rows in llama.cpp's order", hint="give the base: `base=BASE`")
    architecture = ARCHITECTURES.get(request.base.model_type)
    if architecture is None:
        raise UnsupportedAdapterError(
            f"what llama.cpp calls the modules of a base of model_type '{printable(request.base.model_type)}' is not known here:"
            f" known are {', '.join(ARCHITECTURES)}",
            hint="nothing was written; convert it to peft, and that with llama.cpp's convert_lora_to_gguf.py",
        )
    alpha = one_for_all(request.updates, _alpha) if any(_alpha(update) for update in request.updates) else _near(request.updates[0])
    updates, notes = with_scaling(request.updates, lambda update: alpha / update.r, rounded=request.rounded)
    updates, more = stored(updates, rounded=request.rounded)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        name = name_of(update.name, architecture)
        if name is None or f"{name}.weight.lora_a" in tensors:
            raise UnsupportedAdapterError(
                f"{request.shown}: what llama.cpp calls {printable(update.name)} of a {architecture} model is not known here",
                hint="nothing was written",
            )
        turned = update.lora_A.T.contiguous() if name == "token_embd" else update.lora_A
        tensors |= {f"{name}.weight.lora_a": turned, f"{name}.weight.lora_b": _rows(update, architecture, request)}
    pairs: dict[str, str | float] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "general.name": request.adapter.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    return WrittenAdapter({"": gguf_bytes(pairs, tensors)}, (*notes, *more))


def gguf_bytes(pairs: Mapping[str, str | float], tensors: Mapping[str, Tensor]) -> bytes:
    """A GGUF file of version 3 with text and float32 numbers, and `tensors` of plain types."""
    stated = [text_pair(key, each) if isinstance(each, str) else number_pair(key, each) for key, each in pairs.items()]
    specs = [GgufSpec(name, GGML_NUMBERS[NAMES[tensor.dtype]], tuple(tensor.shape)) for name, tensor in tensors.items()]
    layout = gguf_layout(stated, specs)
    data = bytearray(layout.file_size)
    data[: len(layout.head)] = layout.head
    for info in layout.tensors:
        data[info.start : info.stop] = bytes_of(tensors[info.name].contiguous())
    return bytes(data)


def _alpha(update: Update) -> float | None:
    """An alpha for the factor of `update` that float32, in which the file has it, can hold; not 0, which would mean 1."""
    alpha = alpha_for(update.scaling, update.r, update.lora_alpha)
    return alpha if alpha and struct.unpack("<f", struct.pack("<f", alpha))[0] == alpha else None


def _near(update: Update) -> float:
    """The float32 number next to the alpha of `update`, or 1 where that is 0."""
    alpha: float = struct.unpack("<f", struct.pack("<f", update.scaling * update.r))[0]
    return alpha or 1.0


def _rows(update: Update, architecture: str, request: WriteRequest) -> Tensor:
    """lora_B with its rows in the order of the architecture."""
    last = update.name.rpartition(".")[2]
    if architecture not in PAIRED or last not in ("q_proj", "k_proj") or request.base is None:
        return update.lora_B
    queries, keys = request.base.heads(request.adapter)
    heads, rows = queries if last == "q_proj" else keys, update.lora_B.shape[0]
    if rows % (2 * heads):
        raise InputError(f"{request.shown}: {printable(update.name)} has {rows} rows, which {heads} heads do not divide")
    info = TensorInfo("", "", tuple(update.lora_B.shape), 0, 0, request.adapter.path)
    return evaluate(to_pairs(info, heads), lambda _: update.lora_B).contiguous()
