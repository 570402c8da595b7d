"""loralib's state dict in a file of torch.save. It has no alpha: the reader is told."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ....errors import UnsupportedAdapterError, printable
from ...convert.request import WriteRequest, WrittenAdapter, refuse, refuse_parts
from ...convert.scalings import alpha_for, one_for_all, stored, with_scaling
from ...numbers import AdapterReader


def write_loralib(request: WriteRequest) -> WrittenAdapter:
    """The dictionary of `<module>.lora_A` and `<module>.lora_B`, and biases that were trained.

    Raises `UnsupportedAdapterError` for what loralib's layers do not have: DoRA, and convolutions with a kernel, whose update is
    another there.
    """
    request = request.of_one_model()
    refuse(request, "loralib", biases=True)
    refuse_parts(request, "loralib", "magnitude", "lora_bias")
    for update in request.updates:
        if any(size != 1 for size in update.kernel):
            raise UnsupportedAdapterError(
                f"{request.shown}: {printable(update.name)} is a convolution with kernel {list(update.kernel)}; loralib's is of"
                " rank r in another matrix than the weight's, so that its factors are others",
                hint="nothing was written; choose peft",
            )
    alpha = one_for_all(request.updates, lambda update: alpha_for(update.scaling, update.r, update.lora_alpha))
    updates, notes = with_scaling(request.updates, lambda update: alpha / update.r, rounded=request.rounded)
    updates, more = stored(updates, rounded=request.rounded)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= {f"{update.name}.lora_A": update.lora_A.flatten(1), f"{update.name}.lora_B": update.lora_B.flatten(1)}
    with AdapterReader(request.adapter) as reader:
        tensors |= {name: reader.tensor(info) for name, info in request.adapter.replacements.items()}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    told = f"loralib's files do not hold lora_alpha: it is {alpha:g}, `ReadOptions(lora_alpha={alpha!r})` when it is read"
    return WrittenAdapter({"": buffer.getvalue()}, (*notes, *more, told))
