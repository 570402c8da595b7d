"""Numbers made codes again, for all encodings that are codes times scales, with zero points or a table between."""

from __future__ import annotations

import torch
from torch import Tensor

from ...files.evaluation import evaluate
from ...files.expression import Cut, Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .codebook import Valued
from .encoded import Read
from .packed import PackedCodes
from .scaled import BlockScaled
from .zeropoint import BlockShifted


def encode_codes(numbers: Tensor, rows: Matrix, read: Read, uniform: Tensor | None) -> Tensor:
    """The codes of `numbers`, with the scales, zero points and table in `rows`, as `Encode` has it.

    What is kept with all its bits: a code that states its number already, and one whose scale is zero.
    """
    wanted, node = _undone(numbers, rows, read)
    keep = (evaluate(rows, read) == numbers).reshape(wanted.shape) | ~wanted.isfinite()
    codes = node.codes if isinstance(node, Valued) else node
    values, names = _values(node, read)
    uniform = None if uniform is None else uniform.reshape(wanted.shape)
    places = _neighbours(wanted.contiguous(), values, uniform)
    new = places.to(torch.uint8) if isinstance(node, PackedCodes) else names[places]
    if isinstance(codes, PackedCodes):
        words = evaluate(codes.words, read)
        return codes.packed(torch.where(keep, codes.value(words), new), words)
    old = evaluate(codes, read)
    return torch.where(keep, old.view(torch.uint8), new).view(old.dtype)


def beyond(numbers: Tensor, rows: Matrix, read: Read) -> int:
    """How many of float64 `numbers` are so far out of the range of codes that the code at its end is no rounding of them: by more
    than half of the range, as all are whose scale is zero, but for the one number that is stated then."""
    wanted, node = _undone(numbers, rows, read)
    values, _ = _values(node, read)
    low, high = float(values[0]), float(values[-1])
    far = (high - low) / 2
    return int((((wanted > high + far) | (wanted < low - far)) & numbers.isfinite().reshape(wanted.shape)).sum())


def _undone(numbers: Tensor, rows: Matrix, read: Read) -> tuple[Tensor, Matrix]:
    """What the codes of `rows` must stand for so that these state `numbers`, float64, and the node of the codes."""
    wanted, node = numbers, rows
    while not isinstance(node, TensorInfo | PackedCodes | Valued):
        if isinstance(node, BlockShifted):
            wanted, node = wanted + node.spread(evaluate(node.scales, read).double()), node.codes
        elif isinstance(node, BlockScaled):
            scales = node.spread(evaluate(node.scales, read).double())
            wanted, node = wanted * scales if node.divides else wanted / scales, node.codes
        elif isinstance(node, Reshaped | Cut) and node.numel == node.of.numel:
            wanted, node = wanted.reshape(node.of.shape), node.of
        else:
            raise TypeError(f"{type(node).__name__} is not undone")
    return wanted, node


def _values(node: Matrix, read: Read) -> tuple[Tensor, Tensor]:
    """The numbers that codes can stand for, rising, float64, and the code of each, uint8; of equal numbers, the lowest code's."""
    if isinstance(node, Valued):
        table = evaluate(node.table, read).double()
    elif isinstance(node, PackedCodes):
        table = torch.arange(1 << node.bits, dtype=torch.float64, device="cpu")
    else:
        kind = node.torch_dtype if isinstance(node, TensorInfo) else None
        if kind is None or kind.itemsize != 1:
            raise TypeError(f"codes of type {node.dtype} are not written")
        table = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8).view(kind).double()
    return values_of(table)


def values_of(table: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers in `table`, (n,) float64, rising, and the code of each, uint8; of equal numbers, the lowest code's."""
    names = table.isfinite().nonzero().flatten()
    values, places = table[names].sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return values[first], names[places][first].to(torch.uint8)


def _neighbours(wanted: Tensor, values: Tensor, uniform: Tensor | None) -> Tensor:
    """Where in `values` each of `wanted` goes: at random, by its share of the way to the neighbour farther from zero."""
    if uniform is None or values[0] >= 0:  # below which all get the first, seen from either side
        return between(wanted, values, uniform)
    below = values.shape[0] - 1 - between(-wanted, -values.flip(0), uniform)
    return torch.where(wanted < 0, below, between(wanted, values, uniform))


def between(numbers: Tensor, values: Tensor, uniform: Tensor | None) -> Tensor:
    """The place in `values` of the neighbour that each of `numbers` gets, an integer; what is beyond an end gets that end.

    - `numbers`: float64; NaN gets any place
    - `values`: (n,) float64, rising
    - `uniform`: of the shape of `numbers`, in (0, 1): the upper neighbour where the share of the way to it exceeds this number.
      None: the nearer neighbour, of two that are as near the one at an even place

    >>> numbers, values = torch.tensor([0.5, 1.2, 1.6, 9.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0]).double()
    >>> between(numbers, values, None).tolist(), between(numbers, values, torch.full((4,), 0.1)).tolist()
    ([0, 1, 2, 2], [1, 2, 2, 2])
    """
    last = values.shape[0] - 1
    if last > 0 and bool((values.diff() == 1).all()) and float(values[0]).is_integer():  # ten times as fast
        floor = numbers.floor().clamp_(float(values[0]), float(values[-1]) - 1)
        share, low = numbers - floor, floor.sub_(values[0]).to(torch.int32).clamp_(0, last - 1)
        up = ((share > 0.5) | ((share == 0.5) & (low & 1 == 1))) if uniform is None else share > uniform
        return low.add_(up)
    low = torch.bucketize(numbers, values, right=True).sub_(1).clamp_(0, max(0, last - 1))
    below, above = values[low], values[(low + 1).clamp_(max=last)]
    share = (numbers - below) / (above - below)
    up = ((share > 0.5) | ((share == 0.5) & (low & 1 == 1))) if uniform is None else share > uniform
    return low + up.to(low.dtype)
