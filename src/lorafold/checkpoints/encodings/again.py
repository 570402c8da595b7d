"""Numbers made codes again, for rows of a weight that are given as an expression."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...arithmetic import undisturbed
from ...files.evaluation import evaluate
from ...files.expression import Joined, Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .encoded import Encoded, Read
from .rewrite import beyond


def encoded_again(encoded: Encoded, rows: Matrix, numbers: Tensor, read: Read, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes for `numbers`, (bytes,) uint8, and the numbers that these state, of the shape of `rows`.

    - `rows`: rows of `encoded.natural`, as `rows_of` makes them; `numbers`: as many, float64
    - `uniform`: as many, as `Encode` has it
    """
    encode = encoded.encode
    if encode is None:
        raise TypeError(f"{encoded.encoding} is not written")
    codes, stated = [], []
    with undisturbed():
        for part, some, noise in _parts(rows, numbers, uniform):
            made = encode(some, part, read, noise).contiguous()

            def read_made(info: TensorInfo, made: Tensor = made) -> Tensor:
                return made.reshape(info.shape) if info.name == encoded.stored[0] else read(info)

            codes.append(made.view(-1).view(torch.uint8))
            stated.append(evaluate(part, read_made).reshape(-1))
    return torch.cat(codes), torch.cat(stated).reshape(rows.shape)


def beyond_codes(rows: Matrix, numbers: Tensor, read: Read) -> int:
    """How many of `numbers` are `beyond` what codes can state with the scales in `rows`; arguments as `encoded_again` has them."""
    with undisturbed():
        return sum(beyond(some, part, read) for part, some, _ in _parts(rows, numbers, None))


def _parts(rows: Matrix, numbers: Tensor, uniform: Tensor | None) -> Iterator[tuple[Matrix, Tensor, Tensor | None]]:
    """What `rows` are put together of, one part after another, with the `numbers` and what is drawn for each."""
    numbers, uniform = numbers.reshape(rows.shape), None if uniform is None else uniform.reshape(rows.shape)
    if isinstance(rows, Reshaped) and not isinstance(rows.of, TensorInfo):
        yield from _parts(rows.of, numbers, uniform)
    elif isinstance(rows, Joined) and rows.dim == 0:
        sizes = [part.shape[0] for part in rows.several]
        noise = [None] * len(sizes) if uniform is None else torch.split(uniform, sizes)
        for part, some, each in zip(rows.several, torch.split(numbers, sizes), noise, strict=True):
            yield from _parts(part, some, each)
    else:
        yield rows, numbers, uniform
