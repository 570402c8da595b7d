"""Integers packed into words as the formats have them, in numpy and Python's integers, apart from the library's own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stream(integers: np.ndarray, bits: int) -> Tensor:
    """(rows, words) int32: the integers of each row as one little-endian stream of bits."""
    count = -(-integers.shape[1] * bits // 32)
    rows = [sum(int(value) << (i * bits) for i, value in enumerate(row)) for row in integers]
    words = np.array([[(row >> (32 * i)) & 0xFFFFFFFF for i in range(count)] for row in rows], dtype=np.uint32)
    return torch.from_numpy(words.reshape(-1, count).view(np.int32).copy())


def awq_words(integers: np.ndarray) -> Tensor:
    """(rows, columns / 8) int32: nibble i of a word holds its column (0 2 4 6 1 3 5 7)[i]."""
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), dtype=np.uint32)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= integers[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32).copy())


def nibbles(codes: Tensor, *, high_first: bool) -> np.ndarray:
    """Both halves of each byte, along the last axis."""
    low, high = codes.numpy() & 15, codes.numpy() >> 4
    return np.stack((high, low) if high_first else (low, high), -1).reshape(*codes.shape[:-1], -1)


def as_bytes(value: Any) -> Tensor:
    text = value if isinstance(value, str) else json.dumps(value)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def four_bits(
    shape: tuple[int, ...], *, blocksize: int = 64, nested: bool = True, fields: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """A weight of bitsandbytes with random codes; `fields` stand in its JSON, or go from there where they are None."""
    numel = int(np.prod(shape))
    count = -(-numel // blocksize)
    table = torch.linspace(-1, 1, 16)
    table[7] = 0.0
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape)}
    held = {"a.weight": torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8), "a.weight.quant_map": table}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.5}
        held["a.weight.absmax"] = torch.randint(0, 256, (count,), dtype=torch.uint8)
        held["a.weight.nested_absmax"] = torch.rand(-(-count // 256)) + 0.1
        held["a.weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    else:
        held["a.weight.absmax"] = torch.rand(count) + 0.5
    stated = {name: value for name, value in {**state, **(fields or {})}.items() if value is not None}
    return held | {"a.weight.quant_state.bitsandbytes__nf4": as_bytes(stated)}


def numbers_of_four_bits(held: Mapping[str, Tensor], shape: tuple[int, ...], blocksize: int = 64) -> np.ndarray:
    """quant_map[q] · absmax, a nested absmax in float32."""
    absmax = held["a.weight.absmax"].numpy()
    if "a.weight.nested_absmax" in held:
        largest = np.repeat(held["a.weight.nested_absmax"].numpy(), 256)[: absmax.size]
        absmax = held["a.weight.nested_quant_map"].numpy()[absmax] * largest + np.float32(1.5)
        assert absmax.dtype == np.float32
    numel = int(np.prod(shape))
    codes = nibbles(held["a.weight"].reshape(-1).view(torch.uint8), high_first=True)[:numel]
    return (held["a.weight.quant_map"].numpy().astype(float)[codes] * np.repeat(absmax.astype(float), blocksize)[:numel]).reshape(
        shape
    )
