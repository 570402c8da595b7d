"""loralib's state dict in a file of torch.save. It has no alpha: the reader is told."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ....errors import UnsupportedAdapterError, printable
from ...convert.job import Job, Written, refuse, refuse_parts
from ...convert.scalings import alpha_for, one_for_all, stored, with_scaling
from ...reader import AdapterReader


def write_loralib(job: Job) -> Written:
    """The dictionary of `<module>.lora_A` and `<module>.lora_B`, and biases that were trained.

    Raises `UnsupportedAdapterError` for what loralib's layers do not have: DoRA, and convolutions with a kernel, whose update is
    another there.
    """
    job = job.of_one_model()
    refuse(job, "loralib", biases=True)
    refuse_parts(job, "loralib", "magnitude", "lora_bias")
    for update in job.updates:
        if any(size != 1 for size in update.kernel):
            raise UnsupportedAdapterError(
                f"{job.shown}: {printable(update.name)} is a convolution of kernel {list(update.kernel)}; loralib's is of rank r in"
                " another matrix than the weight's, so that its factors are others",
                hint="nothing was written; choose peft",
            )
    alpha = one_for_all(job.updates, lambda update: alpha_for(update.scaling, update.r, update.lora_alpha))
    updates, notes = with_scaling(job.updates, lambda update: alpha / update.r, rounded=job.rounded)
    updates, more = stored(updates, rounded=job.rounded)
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= {f"{update.name}.lora_A": update.lora_A.flatten(1), f"{update.name}.lora_B": update.lora_B.flatten(1)}
    with AdapterReader(job.adapter) as reader:
        tensors |= {name: reader.tensor(info) for name, info in job.adapter.replacements.items()}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    told = f"loralib's files do not hold lora_alpha: it is {alpha:g}, `ReadOptions(lora_alpha={alpha!r})` when it is read"
    return Written({"": buffer.getvalue()}, (*notes, *more, told))
