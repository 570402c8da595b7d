"""What an adapter does to a weight that is no sum of low rank, or of no low one: which kind, and the tensors that say how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..files.expression import Matrix, Permuted
from ..files.safetensors.info import TensorInfo

TransformKind: TypeAlias = Literal["OFT", "BOFT", "GLoRA", "IA³"]


@dataclass(frozen=True)
class Transform:
    """A new weight, computed from the one that is there; see `kernel.rotations`.

    - `parts`: the adapter's tensors by what they are: `oft_blocks` and `rescale`; `a1`, `a2`, `b1`, `b2`; `ia3`
    - `factor`: GLoRA's alpha / r; what is multiplied with the number of outputs is the limit of OFT's and BOFT's Q, 0 for none
    - `on_input`: whether IA³ has a number for each input
    """

    kind: TransformKind
    parts: Mapping[str, TensorInfo]
    factor: float = 1.0
    on_input: bool = False

    def lacks(self, shape: tuple[int, ...]) -> str | None:
        """What a weight of this `shape` would have to be, in words, where it is not; None where it fits."""
        out, rest = shape[0] if shape else 1, math.prod(shape[1:])
        if self.kind in ("OFT", "BOFT"):
            *_, count, size, _ = self.parts["oft_blocks"].shape
            stages = self.parts["oft_blocks"].shape[0] if self.kind == "BOFT" else 0
            if count * size != out or not self._rescales(out):
                return f"{count * size} outputs"
            span = 2**stages * size // 2  # of the last stage
            return f"outputs that {span} divides" if self.kind == "BOFT" and (size % 2 or out % span) else None
        if self.kind == "IA³":
            want = (shape[1] if len(shape) > 1 else 0) if self.on_input else out
            return (
                None if self.parts["ia3"].numel == want else f"{self.parts['ia3'].numel} {'inputs' if self.on_input else 'outputs'}"
            )
        a1, a2, b1, b2 = (self.parts[part].shape for part in ("a1", "a2", "b1", "b2"))
        fits = (a1[0], math.prod(a2[1:]), b1[0], math.prod(b2[1:])) == (rest, rest, out, rest)
        fits = fits and math.prod(a1[1:]) == a2[0] and math.prod(b1[1:]) == b2[0]
        return None if fits else f"[{b1[0]}, {math.prod(b2[1:])}]"

    def _rescales(self, out: int) -> bool:
        return "rescale" not in self.parts or self.parts["rescale"].numel == out


@dataclass(frozen=True)
class StoredMultiplicand:
    """A product of matrices, or a matrix as it is stored: `lora_A` (r, columns) and `lora_B` (rows, r), or the matrix and None."""

    lora_A: Matrix
    lora_B: Matrix | None = None

    def turned(self) -> StoredMultiplicand:
        """That of the transpose."""
        if self.lora_B is None:
            return StoredMultiplicand(Permuted(self.lora_A))
        return StoredMultiplicand(Permuted(self.lora_B), Permuted(self.lora_A))


@dataclass(frozen=True)
class ElementProduct:
    """ΔW as a product of two matrices, element by element, or with `kronecker` of each element with each; see `kernel.elementwise`.

    A module that has one has the factors of low rank that make the same of it, too, for what can do with nothing else.
    """

    one: StoredMultiplicand
    other: StoredMultiplicand
    kronecker: bool = False

    def turned(self) -> ElementProduct:
        """That of the transpose."""
        return replace(self, one=self.one.turned(), other=self.other.turned())
