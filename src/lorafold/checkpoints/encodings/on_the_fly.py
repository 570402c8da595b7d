"""What bitsandbytes makes of a weight of floats when a model is loaded with ``load_in_4bit`` or ``load_in_8bit``, as numbers.

An adapter that was trained so was trained against these numbers, and no file holds them. Four bits: of each 64 numbers, row after
row over the whole tensor, the largest, and for each the nearest of 16 shares of it (`csrc/kernels.cu`, `kQuantizeBlockwise`);
with double quantisation the largest, less their mean, are codes of eight bits in blocks of 256 (`functional.quantize_4bit`). The
layer then computes with the product in the type that the model was loaded in, so that this one is rounded twice: in float32 and
to that type. Eight bits: a scale for each row (`functional.int8_vectorwise_quant`), and the number is the exact quotient.

The mean depends in its last bit on the machine; here it is the exact one, rounded once. A GPU's approximate reciprocal changes no
code of NF4 where the model was loaded in bfloat16, and hardly any in float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ...files.evaluation import evaluate, footprint
from ...files.expression import Cut, Matrix, Node, Permuted, Reshaped, narrow
from ...files.safetensors.info import TORCH_DTYPES, TensorInfo
from .codebook import Constant
from .encoded import Encoded, Read

EACH, OUTER = 64, 256
"""Numbers of a block; blocks of which the largest are quantised together."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 numbers of NF4 (Dettmers et al. 2023, appendix E, in float32)."""

_FP4 = (0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0)
FP4 = (*(-each for each in reversed(_FP4)), 0.0, *_FP4)
"""The 15 numbers of bitsandbytes' FP4, in float32."""


@cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 numbers of bitsandbytes' codes of eight bits, rising, in float32 (`functional.create_dynamic_map`).

    >>> len(dynamic_map()), dynamic_map()[-2:]
    (256, (0.992968738079071, 1.0))
    """
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2.0)
        found += [*means.tolist(), *(-means).tolist()]
    return tuple(torch.tensor(sorted(found), dtype=torch.float32, device="cpu").tolist())


@dataclass(frozen=True)
class FourBits(Node):
    """The numbers that a layer in four bits computes with in the place of `of`, (n,), of which these are whole blocks or the last.

    - `table`: the numbers of codes, rising; `loaded`: safetensors' name of the type that the model was loaded in
    - `mean`: of the largest numbers of all blocks of the tensor, (1,); None where these are not quantised
    """

    of: Matrix
    table: tuple[float, ...]
    loaded: str
    mean: Matrix | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> str:
        return self.loaded

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,) if self.mean is None else (self.of, self.mean)

    @property
    def taken(self) -> int:
        return footprint(self.of) + _EACH_TAKES * self.numel + (0 if self.mean is None else footprint(self.mean))

    def value(self, *parts: Tensor) -> Tensor:
        dtype = TORCH_DTYPES[self.loaded]
        numbers, largest = _in_blocks(parts[0], dtype)
        table = torch.tensor(self.table, dtype=torch.float32, device="cpu")
        codes = torch.bucketize(numbers * _inverse(largest), _middles(table), out_int32=True)
        scales = largest if self.mean is None else _as_eight_bits(largest[:, 0], parts[1].float())[:, None]
        found = table.index_select(0, codes.view(-1)).view(codes.shape).mul_(scales)
        return found.view(-1)[: parts[0].numel()].to(dtype)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        unit = EACH if self.mean is None else EACH * OUTER
        low, high = start - start % unit, min(-(-(start + count) // unit) * unit, self.shape[0])
        return Cut(replace(self, of=narrow(self.of, 0, low, high - low)), 0, start - low, start - low + count)


@dataclass(frozen=True)
class MeanOfLargest(Node):
    """(1,) float32: the mean of the largest of each block of `of`, (n,), loaded as `loaded`; exact, then rounded once."""

    of: Matrix
    loaded: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)

    @property
    def taken(self) -> int:
        return _EACH_TAKES * min(_CHUNK, self.of.numel)  # as `with_its_mean` finds it

    def value(self, *parts: Tensor) -> Tensor:
        return self.found(lambda start, count: parts[0][start : start + count])

    def found(self, numbers: Callable[[int, int], Tensor]) -> Tensor:
        """The same, of what `numbers` gives for a start and a count."""
        size, sums = self.of.shape[0], []
        for start in range(0, size, _CHUNK):
            _, largest = _in_blocks(numbers(start, min(_CHUNK, size - start)), TORCH_DTYPES[self.loaded])
            wide = torch.nn.functional.pad(largest[:, 0].double(), (0, -largest.shape[0] % EACH))
            sums += wide.view(-1, EACH).sum(1).tolist()  # exact, where the largest of these are within 2³⁹ of the smallest
        if not all(map(math.isfinite, sums)):
            return torch.full((1,), math.nan, dtype=torch.float32, device="cpu")
        return torch.tensor([math.fsum(sums) / -(-size // EACH)], dtype=torch.float64, device="cpu").float()


_CHUNK = 1 << 20
"""Numbers that are looked at together for a mean; whole blocks."""

_EACH_TAKES = 28
"""Bytes of all that is between a number and its code, and what that stands for."""


@dataclass(frozen=True)
class EightBits(Node):
    """q · SCB / 127 for rows `of`, (rows, columns), loaded as `loaded`: what a layer of LLM.int8 multiplies by, float64."""

    of: Matrix
    loaded: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)

    @property
    def taken(self) -> int:
        return footprint(self.of) + _EACH_TAKES * self.numel

    def value(self, *parts: Tensor) -> Tensor:
        numbers = parts[0].to(TORCH_DTYPES[self.loaded]).half().float()
        largest = numbers.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, 127.0 / largest, largest)
        codes = (numbers * scale).round_().add_(0.0)  # integers have one zero
        return codes.double().mul_(largest.double()).div_(127.0)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim:
            return super().narrow(dim, start, count)
        return replace(self, of=narrow(self.of, 0, start, count))


def _in_blocks(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`numbers`, (n,), as `dtype` has them, in rows of a block each, and the largest of each; float32, filled up with zeros."""
    loaded = numbers.to(dtype).float()
    rows = torch.nn.functional.pad(loaded, (0, -loaded.numel() % EACH)).view(-1, EACH)
    return rows, rows.abs().amax(1, keepdim=True)


def _inverse(largest: Tensor) -> Tensor:
    """1 / `largest`, in float32; of zero zero."""
    return torch.where(largest > 0, 1.0 / largest, largest)


def _middles(table: Tensor) -> Tensor:
    """The numbers half way between neighbours, in float32; of what is there itself the lower code is taken."""
    return (table[:-1] + table[1:]) / 2


def _as_eight_bits(largest: Tensor, mean: Tensor) -> Tensor:
    """What is left of `largest`, (blocks,), once they are codes of eight bits themselves: whole blocks of 256, or the last."""
    table = torch.tensor(dynamic_map(), dtype=torch.float32, device="cpu")
    rows = torch.nn.functional.pad(largest - mean, (0, -largest.numel() % OUTER)).view(-1, OUTER)
    scale = rows.abs().amax(1, keepdim=True)
    codes = torch.bucketize(rows * _inverse(scale), _middles(table), out_int32=True)
    found = table.index_select(0, codes.view(-1)).view(codes.shape).mul_(scale).add_(mean)
    return found.view(-1)[: largest.numel()]


WORDS = {
    "nf4": "bitsandbytes NF4, double quantised",
    "nf4-single": "bitsandbytes NF4",
    "fp4": "bitsandbytes FP4",
    "int8": "bitsandbytes int8",
}
"""What people call each."""


def on_the_fly(info: TensorInfo, kind: str, loaded: str, *, transposed: bool = False) -> Encoded:
    """The weight `info`, of floats, as training saw it that loaded it as `loaded`, safetensors' name, and quantised it as `kind`.

    - `transposed`: whether it is stored (in_features, out_features), and was turned before it was quantised
    """
    rows: Matrix = Permuted(info) if transposed else info
    label = f"{WORDS[kind]}, as it was loaded in {loaded}"
    if kind == "int8":
        decoded: Node = EightBits(rows, loaded)
    else:
        flat = Reshaped(rows, (info.numel,)).settled()
        mean = MeanOfLargest(flat, loaded) if kind == "nf4" else None
        decoded = Reshaped(FourBits(flat, FP4 if kind == "fp4" else NF4, loaded, mean), rows.shape)
    decoded = Permuted(decoded) if transposed else decoded
    return Encoded(label, (info.name,), decoded, 8 if kind == "int8" else 4, of_floats=True)


def with_its_mean(matrix: Matrix, read: Read) -> Matrix:
    """`matrix`, or what it becomes where a mean in it is that of the whole tensor: with the number in its place, found a part at a
    time."""
    if isinstance(matrix, FourBits) and isinstance(matrix.mean, MeanOfLargest):
        of = matrix.mean.of
        mean = matrix.mean.found(lambda start, count: evaluate(narrow(of, 0, start, count), read))
        return replace(matrix, mean=Constant((float(mean),)))
    if isinstance(matrix, Reshaped | Permuted):
        return replace(matrix, of=with_its_mean(matrix.of, read))
    return matrix
