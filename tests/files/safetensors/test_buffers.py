"""The bytes of a tensor share its memory and keep it alive."""

from __future__ import annotations

import gc

import pytest
import torch

from lorafold.errors import UpdateError
from lorafold.files.safetensors.buffers import bytes_of, tensor_over
from lorafold.files.safetensors.info import TORCH_DTYPES


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_bytes_are_the_tensors_own(dtype: torch.dtype) -> None:
    raw = bytes(i % 2 for i in range(48))
    tensor = tensor_over(bytearray(raw), dtype, (48 // dtype.itemsize,))
    view = bytes_of(tensor)
    assert bytes(view) == raw
    view[0] = 1 - raw[0]
    assert tensor.view(torch.uint8)[0].item() == 1 - raw[0]


def test_the_view_keeps_the_tensor_alive() -> None:
    view = bytes_of(torch.full((100_000,), 7, dtype=torch.uint8))[10:20]
    gc.collect()
    others = [torch.zeros(100_000, dtype=torch.uint8) for _ in range(10)]
    assert bytes(view) == b"\x07" * 10, len(others)


def test_empty_scalar_and_row() -> None:
    assert len(bytes_of(torch.zeros(0, 3))) == 0
    assert len(bytes_of(torch.tensor(1.0))) == 4
    assert bytes(bytes_of(torch.arange(6, dtype=torch.uint8).reshape(2, 3)[1:])) == b"\x03\x04\x05"
    assert tensor_over(bytearray(), torch.float32, (0, 3)).shape == (0, 3)


def test_a_view_with_strides_or_elsewhere_is_refused() -> None:
    for tensor in (torch.zeros(2, 3).T, torch.zeros(3, device="meta")):
        with pytest.raises(UpdateError, match="only a contiguous tensor on the CPU"):
            bytes_of(tensor)
