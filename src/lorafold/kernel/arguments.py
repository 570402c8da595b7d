"""What `merge_weight` and its like refuse before they touch anything: no matrix, shapes that do not fit, memory that overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import UpdateError
from .rounding import MANTISSA_BITS
from .update import LowRankUpdate, shown

_PLAIN = (Tensor, torch.nn.Parameter)


def check_pair(weight: Tensor, out: Tensor, precision: str) -> None:
    """Raises `UpdateError` unless `weight` may be merged into `out`."""
    if not isinstance(precision, str) or precision not in ("fast", "exact"):
        raise UpdateError(f"precision must be 'fast' or 'exact', not {shown(precision)}")
    check_weight(weight)
    _check_matrix(out, "out")
    if out.shape != weight.shape or out.device != weight.device:
        wanted, found = (f"{tuple(each.shape)} on {each.device}" for each in (weight, out))
        raise UpdateError(f"out must be like the weight, {wanted}; found {found}")
    if not _is_apart(out):
        raise UpdateError(
            f"out shares memory among its own elements: shape {tuple(out.shape)}, strides {out.stride()}",
            hint="an expanded tensor cannot be written to; pass out.clone(), or let merge_weight make out",
        )
    if _same_elements(out, weight):
        return
    if _overlap(out, weight):
        raise UpdateError(
            "out overlaps the weight without being the weight itself: elements would be overwritten before they are read",
            hint="pass the weight itself as out, or a tensor of its own",
        )


def check_weight(weight: Tensor) -> None:
    """Raises `UpdateError` unless `weight` is a matrix of numbers that can be merged."""
    _check_matrix(weight, "the weight")
    if weight.dim() != 2:
        raise UpdateError(f"a weight must be (out_features, in_features); found {tuple(weight.shape)}")


def _check_matrix(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise UpdateError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in MANTISSA_BITS:
        raise UpdateError(f"{name} must be bfloat16, float16, float32 or float64, not {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise UpdateError(f"{name} must be dense, not of layout {tensor.layout}", hint="convert it with to_dense()")
    if not _holds_numbers(tensor):
        raise UpdateError(f"{name} is on the meta device or a fake tensor: it holds no numbers", hint="load it first")


def check_updates(weight: Tensor, updates: Sequence[LowRankUpdate], out: Tensor) -> tuple[LowRankUpdate, ...]:
    """`updates`, which can be added to `weight`, none of whose factors is in the memory of `out`; else raises `UpdateError`."""
    if isinstance(updates, (LowRankUpdate, Tensor)) or not isinstance(updates, Iterable):
        raise UpdateError(f"updates must be a sequence of LowRankUpdate values, not {type(updates).__name__}", hint="pass [update]")
    updates = tuple(updates)
    for update in updates:
        if not isinstance(update, LowRankUpdate):
            raise UpdateError(f"updates must be LowRankUpdate values, not {type(update).__name__}")
        if update.shape != tuple(weight.shape):
            raise UpdateError(f"an update of shape {update.shape} does not fit a weight of shape {tuple(weight.shape)}")
        for factor in (update.lora_A, update.lora_B):
            if factor.device != weight.device:
                where = f"the update must be on the weight's device, {weight.device}"
                raise UpdateError(where, hint="move its factors there first")
            if not _holds_numbers(factor):
                raise UpdateError("a factor of the update is a fake tensor: it holds no numbers", hint="load it first")
            if _overlap(out, factor):
                raise UpdateError("out overlaps a factor of an update", hint="pass copies of the factors, or another out")
    return updates


def _holds_numbers(tensor: Tensor) -> bool:
    return not tensor.is_meta and getattr(tensor, "fake_mode", None) is None


def _lattice(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have more than one element, the largest stride first."""
    return sorted(((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), reverse=True)


def _is_apart(tensor: Tensor) -> bool:
    """Whether no two elements share memory, as far as the strides tell."""
    reach = 0
    for stride, size in reversed(_lattice(tensor)):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _same_elements(one: Tensor, other: Tensor) -> bool:
    alike = all(s == t for n, s, t in zip(one.shape, one.stride(), other.stride(), strict=True) if n > 1)
    return alike and one.dtype == other.dtype and _begin(one) == _begin(other)


def _begin(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() + int(tensor.storage_offset()) * tensor.element_size()


def _overlap(out: Tensor, other: Tensor) -> bool:
    """Whether an element of `out`, which is apart, may share memory with one of `other`; certain where their strides agree."""
    if not out.numel() or not other.numel() or type(out) not in _PLAIN or type(other) not in _PLAIN:
        return False
    size = out.element_size()
    ends = [
        (_begin(t), _begin(t) + (1 + sum(stride * (n - 1) for stride, n in _lattice(t))) * t.element_size()) for t in (out, other)
    ]
    if ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]:
        return False
    apart, rest = divmod(ends[1][0] - ends[0][0], size)
    alike = dict(_lattice(out)).keys() == dict(_lattice(other)).keys() and size == other.element_size() and not rest
    return not alike or _meet(apart, [(s, max(n, dict(_lattice(other))[s])) for s, n in _lattice(out)])


def _meet(apart: int, lattice: list[tuple[int, int]]) -> bool:
    """Whether `apart` is Σ stride · k with every |k| < size."""
    if not lattice:
        return apart == 0
    (stride, size), *rest = lattice
    quotient = apart // stride
    return any(abs(k) < size and _meet(apart - k * stride, rest) for k in (quotient, quotient + 1))
