"""Numbers made codes again, for rows of a weight that are given as an expression."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arithmetic import undisturbed
from ...files.evaluation import evaluate
from ...files.expression import Joined, Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .encoded import Encoded, Read


def encoded_again(encoded: Encoded, rows: Matrix, numbers: Tensor, read: Read, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes for `numbers`, (bytes,) uint8, and the numbers that these state, of the shape of `rows`.

    - `rows`: rows of `encoded.natural`, as `rows_of` makes them; `numbers`: as many, float64
    - `uniform`: as many, as `Encode` has it
    """
    with undisturbed():
        return _encoded_again(encoded, rows, numbers, read, uniform)


def _encoded_again(encoded: Encoded, rows: Matrix, numbers: Tensor, read: Read, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    numbers, uniform = numbers.reshape(rows.shape), None if uniform is None else uniform.reshape(rows.shape)
    if isinstance(rows, Reshaped) and not isinstance(rows.of, TensorInfo):
        codes, stated = _encoded_again(encoded, rows.of, numbers, read, uniform)
        return codes, stated.reshape(rows.shape)
    if isinstance(rows, Joined) and rows.dim == 0:
        sizes = [part.shape[0] for part in rows.several]
        noise = [None] * len(sizes) if uniform is None else torch.split(uniform, sizes)
        parts = [
            _encoded_again(encoded, part, some, read, each)
            for part, some, each in zip(rows.several, torch.split(numbers, sizes), noise, strict=True)
        ]
        return torch.cat([codes for codes, _ in parts]), torch.cat([stated for _, stated in parts])
    if encoded.encode is None:
        raise TypeError(f"{encoded.encoding} is not written")
    made = encoded.encode(numbers, rows, read, uniform).contiguous()

    def read_made(info: TensorInfo) -> Tensor:
        return made.reshape(info.shape) if info.name == encoded.stored[0] else read(info)

    return made.view(-1).view(torch.uint8), evaluate(rows, read_made)
