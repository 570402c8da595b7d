"""Merging and unmerging, moving, saving and loading of a layer: once, for every type of layer.

What is true of a `Mergeable` between any two calls:

- unmerged, its weight is the base, bit for bit as it was before it was ever merged;
- merged, its weight is round(W + ΔW) of the adapters that were active when it was merged, and `_kept` restores W whatever has
  become of their parameters since. Only after a merged state dict was loaded is `_kept` None, and W unknown;
- its parameters are the same objects, in the same memory, merged and unmerged;
- threads that merge and unmerge it do so one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...errors import LayerError
from ...kernel.merge import Precision, merge_weight
from ...kernel.rounding import Rounding, Stochastic
from ...kernel.undo.keep import Undo, UndoKind, check_undo_kind, merge_keeping
from . import state_dict as loading
from .adapted import Adapted
from .locks import LayerLock, locked
from .lora_layer import check_settings
from .ownership import check_before_merging, check_local
from .plain_weight import check_plain, offloaded


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What restores rows `start` to `start + length` of a layer's matrix."""

    start: int
    length: int
    undo: Undo

    def restored(self, matrix: Tensor) -> Tensor:
        return self.undo.restore(matrix.narrow(0, self.start, self.length))

    def check(self, matrix: Tensor) -> None:
        self.undo.check(matrix.narrow(0, self.start, self.length))

    def put_back(self, matrix: Tensor) -> None:
        self.undo.put_back(matrix.narrow(0, self.start, self.length))

    def write(self, matrix: Tensor, base: Tensor) -> None:
        matrix.narrow(0, self.start, self.length).copy_(base)


class Mergeable(Adapted):
    """A layer that merges its active adapters into its weight, and restores the base bit for bit.

    What is written to the weight itself while it is merged is lost when it is unmerged (with ``"compact"``, that raises).

    - `undo`: what is kept for that, ``"copy"``, ``"copy-cpu"`` or ``"compact"``; see `lorafold.kernel.undo`. It counts when merging
    - `precision`: how merging rounds, ``"fast"`` or ``"exact"``; see `lorafold.kernel`
    """

    def __init__(
        self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, *, undo: UndoKind, precision: Precision
    ) -> None:
        check_undo_kind(undo)
        Adapted.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.undo: UndoKind = undo
        self.precision: Precision = precision
        self._lock = LayerLock()
        self._kept: tuple[KeptRows, ...] | None = None
        self._after_loading: loading.State = "nothing"
        self.register_load_state_dict_post_hook(loading.finish)  # type: ignore[no-untyped-call]

    @locked
    def train(self, mode: bool = True) -> Self:
        """Unmerge for training; merge for evaluation, unless `merge_weights` is false. Returns the layer.

        A weight that accelerate keeps elsewhere between forward passes is not merged; the forward pass adds the update to it.
        Threads may call it at once: each layer then is as one of them left it.

        Raises what `unmerge` and `merge` raise, and `LayerError` where the weight is also that of another module of the model whose
        `eval()` this is part of. The first layer of a model raises for all: then none of them has been merged.
        """
        if mode:
            self.unmerge()
        elif self.merge_weights and not self.merged and not self.offloaded:
            check_before_merging(self)
            self.merge()
        return super().train(mode)

    @locked
    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapters to the weight, in place, with one rounding; nothing where they are merged already.

        Raises `NonFiniteError` for an adapter that holds NaN or infinity, and `LayerError` for a weight that is not this process's
        alone. Whatever is raised, the layer is as it was.
        """
        if self.merged:
            return
        check_local(self)
        self.check_plain()
        self.check_finite(self._active)
        matrix = self.matrix(self.weight.detach())
        kept: list[KeptRows] = []
        try:
            for block in self.updates():
                rows = matrix.narrow(0, block.start, block.length)
                undo = merge_keeping(rows, block.updates, undo=self.undo, precision=self.precision)
                kept.append(KeptRows(block.start, block.length, undo))
        except BaseException:
            for done in kept:
                done.write(matrix, done.restored(matrix))
            raise
        self._written(matrix)
        self._kept = tuple(kept)
        self.merged = True

    @locked
    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weight the bits that it had before merging; nothing where it is not merged.

        Raises `LayerError` where the base is unknown, because a merged state dict was loaded, or cannot be proven to be right.
        The layer then stays merged.
        """
        if not self.merged:
            return
        self.check_plain()
        matrix = self.matrix(self.weight.detach())
        known = self._known()
        if len(known) == 1:
            known[0].put_back(matrix)
        else:
            for kept, base in [(kept, kept.restored(matrix)) for kept in known]:  # all, before the first is written
                kept.write(matrix, base)
        self._written(matrix)
        self._kept = None
        self.merged = False

    def check_plain(self) -> None:
        """Raises `LayerError` unless the weight is a plain parameter, that can be merged into."""
        check_plain(self.weight_owner)
        if self.offloaded:
            check_plain(self.plain)

    @locked
    @torch.no_grad()
    def check_restorable(self) -> None:
        """Raises what `unmerge` would raise of a merged layer, and changes nothing."""
        if self.merged:
            self.check_plain()
        matrix = self.matrix(self.weight.detach())
        for kept in self._known() if self.merged else ():
            kept.check(matrix)

    @locked
    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The weight without adapters, merged or not, in a new tensor; the layer is not touched. Raises as `unmerge` does."""
        stored = offloaded(self.plain, "weight") if self.offloaded else None
        if stored is not None:
            return stored.detach().clone(memory_format=torch.contiguous_format)
        self.check_plain()
        new = self.weight.detach().clone(memory_format=torch.contiguous_format)
        for kept in self._known() if self.merged else ():
            kept.write(self.matrix(new), kept.restored(self.matrix(self.weight.detach())))
        return new

    @locked
    @torch.no_grad()
    def merged_weight(self, *, precision: Precision | None = None, noise: Stochastic | None = None) -> Tensor:
        """The base with the active adapters as they are now, in a new tensor like `weight`; the layer is not touched.

        `precision` is the layer's unless given. With `noise` the rounding is stochastic. Raises as `merge` and `unmerge` do.
        """
        check_local(self)
        self.check_finite(self._active)
        new = self.base_weight()
        matrix = self.matrix(new)
        for block in self.updates():
            rows = matrix.narrow(0, block.start, block.length)
            rounding: Rounding = "nearest"
            if noise is not None:
                rounding = replace(noise, start=noise.start + block.start * matrix.shape[1])
            merge_weight(rows, block.updates, out=rows, precision=precision or self.precision, rounding=rounding)
        return new

    @locked
    def set_active(self, names: Iterable[str]) -> None:
        """Make the adapters `names` the active ones, summed. A merged layer is merged anew, from the base.

        Raises `LayerError` for a name that the layer does not hold or that is given twice, and as `merge` and `unmerge` do.
        """
        chosen = self.chosen(names)
        if self.merged:
            self.check_finite(chosen)
            self.unmerge()
            before, self._active = self._active, chosen
            try:
                self.merge()
            except BaseException:
                self._active = before
                self.merge()
                raise
        self._active = chosen

    @locked
    def take_factors(
        self, lora_A: Tensor, lora_B: Tensor, *, r: int, lora_alpha: float, lora_dropout: float, scaling: float
    ) -> None:
        """Make `lora_A` and `lora_B` the layer's own adapter, in the place of the one it has. A merged layer is merged anew.

        Raises `LayerError` where a setting is none or the shapes are not those for `r`, and as `merge` and `unmerge` do.
        """
        check_settings(r, lora_alpha, lora_dropout)
        if (tuple(lora_A.shape), tuple(lora_B.shape)) != self.factor_shapes(r):
            raise LayerError(f"lora_A and lora_B of rank {r} must be {self.factor_shapes(r)}")
        again = self.merged
        self.unmerge()
        self.lora_A, self.lora_B = (nn.Parameter(factor.to(self.weight.device)) for factor in (lora_A, lora_B))
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, scaling
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training) if lora_dropout > 0 else nn.Identity()
        self.weight.requires_grad = False
        if again:
            self.merge()

    @property
    def kept_nbytes(self) -> int:
        """Bytes of memory that are kept to restore the base; 0 where the layer is not merged."""
        return sum(kept.undo.nbytes for kept in self._kept or ())

    def _known(self) -> tuple[KeptRows, ...]:
        if self._kept is None:
            raise LayerError(
                "the base weight of this layer is not known: it was loaded from a state dict that was saved merged",
                hint="load the base weights (load_state_dict(base, strict=False)), or use the model as it is, in eval mode",
            )
        return self._kept

    def _written(self, matrix: Tensor) -> None:
        """`matrix` has been written to: bring it to the weight, where it is not a view of it."""
        if matrix.data_ptr() != self.weight.data_ptr():
            self.weight.detach().copy_(matrix.view(self.weight.shape))

    @locked
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moving a merged layer moves what restores it. Changing its dtype is: unmerge, change the base, merge anew."""
        like = fn(self.weight.detach().new_empty(0)) if self._kept else self.weight
        merge_anew = like.dtype != self.weight.dtype
        if merge_anew:
            self.unmerge()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if merge_anew:
            self.merge()
        elif self._kept:
            self._kept = tuple(KeptRows(kept.start, kept.length, kept.undo.to(like.device)) for kept in self._kept)
        return self

    @locked
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        loading.note(destination, prefix, merged=self.merged and self._kept != ())  # (): merged, and nothing was added

    @locked
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        self._after_loading = loading.prepare(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        own = f"r={self.r}, lora_alpha={self.lora_alpha}" if self.has_factors else ""
        return ", ".join(part for part in (super().extra_repr(), own, "merged" if self.merged else "") if part)
