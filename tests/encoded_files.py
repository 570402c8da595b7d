"""Quantised tensors in a file, as an encoding finds them there; and what decoded rows and codes that are written must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafold.checkpoints.encodings.encoded import Encoded, Find
from lorafold.checkpoints.encodings.recognise import recognise
from lorafold.files.evaluation import evaluate, rows_of
from lorafold.files.expression import Matrix, narrow, tensors_of
from lorafold.files.safetensors.header import read_header
from lorafold.files.safetensors.info import TensorInfo
from lorafold.files.safetensors.reader import TensorFile


@dataclass(frozen=True)
class Found:
    """What `find` has found in a file, and how numbers are read there; `held`: the tensors of the file."""

    encoded: Mapping[str, Encoded]
    file: TensorFile
    stored: Mapping[str, TensorInfo]
    held: Mapping[str, Tensor]

    def read(self, info: TensorInfo) -> Tensor:
        return self.file.read(info)

    def numbers(self, matrix: Matrix) -> Tensor:
        return evaluate(matrix, self.read)


def found_in(
    folder: Path,
    find: Find | None,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Found:
    """What `find` makes of `tensors`, saved in `folder`; None: what all encodings, in their order, make of them."""
    folder.mkdir(exist_ok=True)
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors")
    header = read_header(folder / "model.safetensors")
    file = TensorFile(header).__enter__()
    if find is None:
        return Found(recognise((header,), config or {}, model).encoded, file, header.tensors, held)
    encoded = dict(find(header.tensors, config or {}, file.read))
    return Found(encoded, file, header.tensors, held)


def assert_rows(found: Found, name: str, expected: np.ndarray, *, times: int = 1) -> None:
    """All numbers of `name` are `expected`; and parts of it along each dimension those of the whole, read from fewer bytes.

    - `times`: how many times its share of the codes a row may read
    """
    decoded = found.encoded[name].decoded
    whole = found.numbers(decoded)
    assert whole.dtype == torch.float64
    assert np.array_equal(whole.numpy(), expected, equal_nan=True)
    for dim, size in enumerate(whole.shape):
        for start, count in {(0, 1), (size // 3, max(1, size // 2)), (size - 1, 1)}:
            part = narrow(decoded, dim, start, count)
            assert part.shape == (*whole.shape[:dim], count, *whole.shape[dim + 1 :])
            assert np.array_equal(found.numbers(part).numpy(), expected.take(range(start, start + count), dim), equal_nan=True)
    natural = found.encoded[name].natural
    rows, columns = natural.shape[0], int(np.prod(natural.shape[1:]))
    if rows > 2:
        one = rows_of(natural, rows // 2, 1, columns)
        codes = found.encoded[name].stored[0]
        read = max(info.nbytes for info in tensors_of(one) if info.name == codes)
        together = found.encoded[name].together
        assert read <= times * (found.stored[codes].nbytes * together) // rows + 8, "reading only what they need"


def codes_again(found: Found, name: str, sums: Tensor, uniform: Tensor | None, each: int | None = None) -> bytes:
    """The bytes of the codes for `sums`, of the shape of the natural numbers, so many rows at a time."""
    encoded = found.encoded[name]
    rows, made = encoded.natural.shape[0], []
    each = each or rows
    each = max(each - each % encoded.together, encoded.together)
    for start in range(0, rows, each):
        count = min(each, rows - start)
        part, here = encoded.rows(start, count), slice(start, start + count)
        noise = None if uniform is None else uniform[here]
        assert encoded.encode is not None
        codes = encoded.encode(sums[here], part, found.read, noise)
        made.append(codes.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(made)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def with_codes(found: Found, name: str, codes: bytes) -> Tensor:
    """The natural numbers, were the stored codes these."""
    encoded = found.encoded[name]

    def read(info: TensorInfo) -> Tensor:
        if info.name != encoded.stored[0]:
            return found.read(info)
        first = info.start - found.stored[info.name].start
        part = torch.frombuffer(bytearray(codes[first : first + info.nbytes]), dtype=torch.uint8)
        return part.view(info.torch_dtype).reshape(info.shape)

    return evaluate(encoded.natural, read)


def assert_written(found: Found, name: str) -> None:
    """No change gives the same bytes; a change gives one of the two neighbours, whatever rows are done at a time."""
    encoded = found.encoded[name]
    numbers = found.numbers(encoded.natural)
    generator = torch.Generator().manual_seed(7)
    uniform = (torch.randint(0, 1 << 23, numbers.shape, generator=generator) * 2 + 1).double() * 2.0**-24
    old = raw(found.held[encoded.stored[0]])
    assert codes_again(found, name, numbers, uniform) == old
    assert codes_again(found, name, numbers, None) == old
    finite = numbers[numbers.isfinite()]
    sums = numbers + torch.randn(numbers.shape, generator=generator, dtype=torch.float64) * finite.std() / 8
    made = codes_again(found, name, sums, uniform)
    assert codes_again(found, name, sums, uniform, each=encoded.together) == made
    new, near = with_codes(found, name, made), with_codes(found, name, codes_again(found, name, sums, None))
    low, high = with_codes(found, name, codes_again(found, name, sums, torch.full_like(uniform, 1 - 2.0**-24))), None
    high = with_codes(found, name, codes_again(found, name, sums, torch.full_like(uniform, 2.0**-24)))
    bad = numbers.isnan()
    assert bool(((new == low) | (new == high) | bad).all()), "one of the two neighbours"
    nearest = torch.where((sums - low).abs() < (sums - high).abs(), low, high)
    ties = ((sums - low).abs() - (sums - high).abs()).abs() <= (high - low).abs() * 1e-12
    assert bool(((near == nearest) | ties | bad).all())
    assert bool((new != numbers).any())
