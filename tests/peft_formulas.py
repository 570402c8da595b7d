"""What PEFT's kinds of LoRA make of a weight, in numpy and from the saved tensors alone; independent of both libraries' code.

A formula takes the base's tensors and the adapter's (with their names as saved, the prefix taken off) and gives the merged tensor
in float64, or the base weight and the updates whose real sum it is, so that `oracle.correctly_rounded` can round that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafold import LowRankUpdate
from lorafold.kernel.rounding import to_nearest
from oracle import correctly_rounded

Held = Mapping[str, Tensor]


@dataclass
class Sum:
    """The real sum of a matrix and updates, seen in another shape."""

    start: Tensor
    updates: list[LowRankUpdate]
    shape: tuple[int, ...]

    def rounded(self, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(correctly_rounded(self.start, self.updates, dtype)).to(dtype).reshape(self.shape)

    def size(self) -> Tensor:
        """The sum of the sizes of all terms, float64."""
        terms = [abs(u.scaling) * u.lora_B.double().abs() @ u.lora_A.double().abs() for u in self.updates]
        return (self.start.double().abs() + sum(terms)).reshape(self.shape)


@dataclass
class Number:
    """Numbers in float64, off by some 2⁻⁵² of their size, to be rounded once."""

    value: np.ndarray
    shape: tuple[int, ...]

    def rounded(self, dtype: torch.dtype) -> Tensor:
        return to_nearest(torch.from_numpy(self.value), dtype).reshape(self.shape)


Formula = Callable[[Held, Held, str], "Sum | Number"]
"""From base, adapter and the tensor's name."""


def low_rank(A: Tensor | np.ndarray, B: Tensor | np.ndarray, s: float) -> LowRankUpdate:
    A, B = (torch.as_tensor(each).double().flatten(1) for each in (A, B))
    return LowRankUpdate(A, B, s)


def linear(s: float, key: str = "", turned: bool = False) -> Formula:
    """W + s·B·A, of a convolution seen as a matrix; of a Conv1D W + s·(B·A)ᵀ."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        module = key or name.removesuffix(".weight")
        update = low_rank(adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"], s)
        W = base[name]
        return Sum(W.flatten(1), [update.T if turned else update], tuple(W.shape))

    return formula


def embedding(s: float) -> Formula:
    """W + s·(B·A)ᵀ."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        module = name.removesuffix(".weight")
        A, B = (adapter[f"{module}.lora_embedding_{part}"] for part in "AB")
        return Sum(base[name], [low_rank(A, B, s).T], tuple(base[name].shape))

    return formula


def bias(s: float) -> Formula:
    """b + s·b_B."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        b = base[name]
        own = adapter[f"{name.removesuffix('.bias')}.lora_B.bias"]
        return Sum(b[:, None], [LowRankUpdate(torch.ones(1, 1), own[:, None], s)], tuple(b.shape))

    return formula


def saved(key: str = "") -> Formula:
    """The adapter's own tensor."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        own = adapter[key or name]
        return Sum(own.reshape(own.shape[0], -1), [], tuple(own.shape))

    return formula


def rows(indices: list[int]) -> Formula:
    """The rows `indices` are the adapter's."""

    def formula(base: Held, adapter: Held, name: str) -> Number:
        W = base[name].double().numpy().copy()
        W[indices] = adapter[f"{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"].double().numpy()
        return Number(W, W.shape)

    return formula


def dora(s: float, strength: float = 1.0, turned: bool = False, embedded: bool = False) -> Formula:
    """W + strength · (m / ‖W + s·B·A‖ · (W + s·B·A) − W), the norm over the weights of one output."""

    def formula(base: Held, adapter: Held, name: str) -> Number:
        module = name.removesuffix(".weight")
        W = base[name].double().numpy()
        columns = turned or embedded
        start = (W.T if columns else W).reshape(W.shape[1] if columns else W.shape[0], -1)
        total = start + s * delta(adapter, module, embedded)
        m = adapter[f"{module}.lora_magnitude_vector"].double().numpy().reshape(-1, 1)
        moved = start + strength * (m / np.linalg.norm(total, axis=1, keepdims=True) * total - start)
        return Number(np.ascontiguousarray(moved.T if columns else moved), W.shape)

    return formula


def delta(adapter: Held, module: str, embedded: bool = False) -> np.ndarray:
    """B·A, (out, in · kernel)."""
    parts = "lora_embedding_{}" if embedded else "lora_{}.weight"
    A, B = (adapter[f"{module}.{parts.format(each)}"].double().numpy() for each in "AB")
    return B.reshape(len(B), -1) @ A.reshape(len(A), -1)


def experts(s: float, key: str, count: int, *, in_out: bool = False, major: bool = False) -> Formula:
    """P[e] + s·B_e·A_e, A expert by expert, B with the expert fastest unless `major`; turned where it is stored (E, in, out)."""

    def formula(base: Held, adapter: Held, name: str) -> Number:
        P = base[name].double().numpy()
        A, B = (adapter[f"{key}.lora_{part}.weight"].double().numpy() for part in "AB")
        r = len(A) // count
        A = A.reshape(count, r, -1)
        B = B.reshape(len(B), count, r).transpose(1, 0, 2) if major else B.reshape(len(B), r, count).transpose(2, 0, 1)
        D = s * np.einsum("eor,eri->eoi", B, A)
        return Number(P + (D.transpose(0, 2, 1) if in_out else D), P.shape)

    return formula


def residual(kind: str, r: int, s: float, turned: bool = False) -> Formula:
    """round(W − what the initialisation took out) + s·B·A, with B·diag(d)·A for KaSA."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        module = name.removesuffix(".weight")
        W = base[name]
        left = torch.from_numpy(left_over(W.double().numpy(), kind, r, s))
        A, B = (adapter[f"{module}.lora_{part}.weight"].double() for part in "AB")
        if kind == "kasa":
            A = A * adapter[f"{module}.lora_diag"].double()[:, None]
        update = low_rank(A, B, s)
        return Sum(to_nearest(left, W.dtype), [update.T if turned else update], tuple(W.shape))

    return formula


def left_over(W: np.ndarray, kind: str, r: int, s: float) -> np.ndarray:
    """W without its r largest singular values (PiSSA) or its r smallest (KaSA), or without s·Q[:, :r]·R[:r] (OLoRA)."""
    if kind == "olora":
        Q, R = np.linalg.qr(W)
        return W - s * Q[:, :r] @ R[:r]
    U, S, V = np.linalg.svd(W, full_matrices=False)
    S = S.copy()
    S[slice(0, r) if kind == "pissa" else slice(len(S) - r, None)] = 0
    return (U * S) @ V


def blocks(s: float, part: str, count: int) -> Formula:
    """W + s·B·A where lora_A or lora_B is stored as `count` blocks one under the other."""

    def formula(base: Held, adapter: Held, name: str) -> Sum:
        module = name.removesuffix(".weight")
        factors = {each: adapter[f"{module}.lora_{each}.weight"] for each in "AB"}
        factors[part] = torch.block_diag(*factors[part].chunk(count))
        return Sum(base[name], [low_rank(factors["A"], factors["B"], s)], tuple(base[name].shape))

    return formula
