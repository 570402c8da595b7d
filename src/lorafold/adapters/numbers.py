"""Reading an adapter's numbers: one pair at a time, and once through all of them before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import NonFiniteError, UnsupportedAdapterError, printable
from ..files.evaluation import evaluate
from ..files.expression import Matrix
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.mapped import opened
from ..kernel.elementwise import ElementwiseUpdate, Multiplicand
from ..kernel.update import LowRankUpdate
from .adapter import Adapter, AdapterModule
from .transform import StoredMultiplicand


class AdapterReader:
    """An adapter's tensors, read when asked for; a context manager that holds its file open."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._file = opened(adapter.header)

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.__exit__(exc_type, exc, tb)

    def tensor(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        """The tensor `info` of the adapter's file, or slices of one, in new memory or in `buffer`."""
        return self._file.read(info, buffer=buffer)

    def matrix(self, matrix: Matrix, read: Callable[[TensorInfo], Tensor] | None = None) -> Tensor:
        """The numbers of `matrix`, which is made of tensors of the adapter's file; `read` may give those that are at hand."""
        return evaluate(matrix, read or self.tensor)

    def rows(self, info: TensorInfo, start: int, count: int, *, buffer: bytearray | None = None) -> Tensor:
        """Rows `start` to `start + count` of the tensor `info`, in new memory or in `buffer`."""
        return self._file.read_rows(info, start, count, buffer=buffer)

    def update(self, module: AdapterModule, read: Callable[[TensorInfo], Tensor] | None = None) -> LowRankUpdate:
        """What `module` adds to its base weight, as a matrix: (out, in), an embedding's (num_embeddings, embedding_dim), that of a
        convolution (out_channels, in_channels · kernel).

        For a convolution ΔW[o, i, k] = scaling · Σ_j B[o, j] · A[j, i, k] (PEFT, `tuners/lora/layer.py`), which is the product of
        both seen as matrices, in however many dimensions.
        """
        check_sum(module, self.adapter)
        lora_A, lora_B = self.matrix(module.lora_A, read), self.matrix(module.lora_B, read)
        flat_A, flat_B = (factor.reshape(factor.shape[0], math.prod(factor.shape[1:])) for factor in (lora_A, lora_B))
        update = LowRankUpdate(flat_A, flat_B, module.scaling.value)
        return update.T if module.embedding else update

    def elementwise(self, module: AdapterModule) -> ElementwiseUpdate:
        """The same as a product element by element, where it is one; else `update`."""
        product = module.product
        if product is None:
            return ElementwiseUpdate.of(self.update(module))
        one, other = (self._side(side) for side in (product.one, product.other))
        update = ElementwiseUpdate(one, other, module.scaling.value, product.kronecker)
        return update.T if module.embedding else update

    def _side(self, side: StoredMultiplicand) -> Multiplicand:
        return Multiplicand(self.matrix(side.lora_A), None if side.lora_B is None else self.matrix(side.lora_B))

    def magnitude(self, module: AdapterModule) -> Tensor:
        """DoRA's magnitude of `module`, (outputs,) float64."""
        if module.magnitude is None:
            raise ValueError(f"{module.name} has no magnitude")
        return self.matrix(module.magnitude).double().flatten()

    def bias_update(self, module: AdapterModule) -> LowRankUpdate:
        """What `module` adds to its bias, seen as a column: (out_features, 1)."""
        if module.lora_bias is None:
            raise ValueError(f"{module.name} has no lora_bias")
        column = self.matrix(module.lora_bias)[:, None]  # (out, 1)
        return LowRankUpdate(torch.ones(1, 1, dtype=column.dtype, device=column.device), column, module.scaling.value)


def check_sum(module: AdapterModule, adapter: Adapter) -> None:
    """Raises `UnsupportedAdapterError` where what `module` does is no sum, and has no factors."""
    if module.transform is not None:
        raise UnsupportedAdapterError(
            f"{printable(adapter.name)}: {printable(module.name)} is {module.transform.kind}, which is no sum: it can be merged"
            " into weights, and nothing else",
            hint="merge it into the base, and start from the result",
        )


def check_numbers(adapter: Adapter) -> None:
    """Read every tensor of `adapter` once, and of what it was before training where that is needed.

    Raises `NonFiniteError` where one holds NaN or infinity, naming it, how many and the first index.
    """
    if adapter.initial is not None:
        check_numbers(adapter.initial)
    with AdapterReader(adapter) as reader:
        for info in adapter.header.tensors.values():
            if info.torch_dtype is None or not info.torch_dtype.is_floating_point:
                continue
            tensor = reader.tensor(info)
            if math.isfinite(tensor.sum(dtype=torch.float64)):
                continue  # one pass; NaN and infinity do not vanish from a sum
            bad = ~tensor.isfinite()
            if bad.any():
                index = [int(i) for i in bad.nonzero()[0]]
                value = float(tensor[tuple(index)])
                raise NonFiniteError(
                    f"{printable(str(adapter.header.path))}: tensor '{printable(info.name)}' holds {int(bad.sum())} numbers"
                    f" that are not finite, the first at {index}: {value}",
                    hint="the training run diverged or the file is damaged; nothing was written",
                )
