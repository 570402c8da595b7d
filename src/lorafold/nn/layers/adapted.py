"""The adapters of one layer: its own, whose parameters are `lora_A` and `lora_B`, and any number of named ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import LayerError, NonFiniteError
from ...kernel.update import LowRankUpdate, scaling_factor
from .lora_layer import Branch, BranchFactors, LoRALayer, check_settings
from .plain_weight import offloaded

OWN = "default"
"""The name of the adapter whose parameters are the layer's own `lora_A` and `lora_B`."""


@dataclass(frozen=True)
class RowBlock:
    """Rows `start` to `start + length` of a layer's matrix, and the updates of their shape whose sum is added to them."""

    start: int
    length: int
    updates: Sequence[LowRankUpdate]


class Adapted(LoRALayer, nn.Module):
    """A layer with adapters, of which the active ones count.

    A type of layer defines `factor_shapes`, `init_factors`, `row_blocks`, `add_branches` and `delta`, and where its weight is not
    the matrix that updates are added to, `matrix`.
    """

    weight: Tensor
    weight_name = "weight"  # in the layer's state dict

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.lora_adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self.create_factors()

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shapes of lora_A and lora_B for rank `r`; None where the layer takes no update."""
        raise NotImplementedError

    def init_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Give fresh factors their first values, such that ΔW is zero."""
        raise NotImplementedError

    def row_blocks(self, branches: Sequence[Branch]) -> list[RowBlock]:
        """What `branches` add to the rows of `matrix`."""
        raise NotImplementedError

    def add_branches(self, y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
        """`y`, which the weight made of `x`, with what `branches` make of `x` added, in y's dtype."""
        raise NotImplementedError

    def delta(self, branch: Branch) -> Tensor:
        """ΔW of `branch`, of the weight's shape, in float32 at least, for autograd."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight`, of the layer's weight's shape, as the matrix that updates are added to: a view where its strides allow that."""
        return weight

    @property
    def weight_owner(self) -> nn.Module:
        """The module whose parameter the weight is."""
        return self

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps the weight elsewhere between forward passes, so that nothing can be merged into it."""
        return self.weight.is_meta and offloaded(self.plain, "weight") is not None

    @property
    def plain(self) -> nn.Module:
        """The module that has the weight without the update: the one that `attach` replaced, or the layer itself."""
        found: nn.Module = self.__dict__.get("_plain", self.weight_owner)
        return found

    def create_factors(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        """Make `lora_A` and `lora_B` for the layer's `r`, all zeros, and freeze the weight; nothing for r = 0.

        `dtype` and `device`: by default the weight's.
        """
        shapes = self.factor_shapes(self.r) if self.r > 0 else None
        if shapes is None:
            return
        self.lora_A = nn.Parameter(self.weight.new_zeros(shapes[0], dtype=dtype, device=device))
        self.lora_B = nn.Parameter(self.weight.new_zeros(shapes[1], dtype=dtype, device=device))
        self.scaling = scaling_factor(self.r, self.lora_alpha)
        self.weight.requires_grad = False
        self._active = (OWN,)

    def reset_factors(self) -> None:
        """Give `lora_A` and `lora_B` fresh first values, if they are there."""
        if self.has_factors:
            self.init_factors(self.lora_A, self.lora_B)

    @property
    def has_factors(self) -> bool:
        """Whether the layer has an adapter of its own."""
        return "lora_A" in self._parameters

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that the layer holds, active or not."""
        return [OWN] * self.has_factors + list(self.lora_adapters)

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters that count."""
        return self._active

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        *,
        scaling: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> BranchFactors:
        """Add an adapter of rank `r` under `name` and return its parameters; it does not count until it is made active.

        `scaling` is lora_alpha / r unless given; `dtype` that of lora_A, or of the weight.

        Raises `LayerError` where the name is taken or the layer takes no update.
        """
        check_settings(r, lora_alpha, lora_dropout)
        self.check_new_name(name)
        shapes = self.factor_shapes(r) if r > 0 else None
        if shapes is None:
            raise LayerError(f"an adapter of rank {r} cannot be added to {type(self).__name__}: it would have no parameters")
        like = self.lora_A if self.has_factors else self.weight
        lora_A, lora_B = (like.detach().new_zeros(shape, dtype=dtype) for shape in shapes)
        self.init_factors(lora_A, lora_B)
        factors = BranchFactors(
            lora_A,
            lora_B,
            r=r,
            lora_alpha=lora_alpha,
            scaling=scaling_factor(r, lora_alpha) if scaling is None else scaling,
            dropout=lora_dropout,
        )
        self.weight.requires_grad = False
        self.lora_adapters[name] = factors.train(self.training)
        return factors

    def check_new_name(self, name: str) -> None:
        """Raises `LayerError` unless an adapter could be added under `name`."""
        if name == OWN or name in self.lora_adapters:
            raise LayerError(f"there is an adapter named {name!r} already", hint="remove it first, or choose another name")
        if not name or "." in name or hasattr(self.lora_adapters, name):
            raise LayerError(f"an adapter cannot be named {name!r}", hint="use letters, digits, - and _")

    def remove_adapter(self, name: str) -> None:
        """Remove the named adapter `name`. Raises `LayerError` where it is active or not there."""
        if name in self._active:
            raise LayerError(f"the adapter {name!r} is active", hint="choose others with set_active first")
        if name not in self.lora_adapters:
            raise LayerError(f"there is no named adapter {name!r}; there are {list(self.lora_adapters)}")
        del self.lora_adapters[name]

    def chosen(self, names: Iterable[str]) -> tuple[str, ...]:
        """`names`, checked. Raises `LayerError` for one that the layer does not hold, or that is given twice."""
        chosen = tuple(names)
        if not set(chosen) <= set(self.adapter_names) or len(set(chosen)) < len(chosen):
            raise LayerError(f"adapters must be chosen from {self.adapter_names}, each once; found {list(chosen)}")
        return chosen

    def check_finite(self, names: Iterable[str]) -> None:
        """Raises `NonFiniteError` where one of the adapters `names` holds NaN or infinity."""
        for name in names:
            branch = self.branch(name)
            for factor, tensor in (("lora_A", branch.lora_A), ("lora_B", branch.lora_B)):
                if tensor.is_meta:
                    raise LayerError(f"{factor} of the adapter {name!r} is on the meta device: it has no numbers to merge")
                if not _is_finite(tensor):
                    raise NonFiniteError(
                        f"{factor} of the adapter {name!r} holds NaN or infinity; it was not merged",
                        hint="training diverged, or the file is damaged: take an earlier state of the adapter",
                    )

    def branch(self, name: str) -> Branch:
        """The adapter `name` as the forward pass and merging see it."""
        if name == OWN:
            return Branch(self.lora_A, self.lora_B, self.scaling, self.lora_dropout)
        factors = self.lora_adapters[name]
        return Branch(factors.lora_A, factors.lora_B, factors.scaling, factors.lora_dropout)  # type: ignore[arg-type]

    def unmerged_branches(self) -> list[Branch]:
        """What the forward pass adds to what the weight gives: the active adapters, or nothing where they are merged."""
        return [] if self.merged else [self.branch(name) for name in self._active]

    def updates(self, names: Iterable[str] | None = None) -> list[RowBlock]:
        """What merging adds: the row blocks of the active adapters, or of `names`, away from autograd."""
        branches = [self.branch(name) for name in (self._active if names is None else names)]
        detached = [b._replace(lora_A=b.lora_A.detach(), lora_B=b.lora_B.detach()) for b in branches]
        return self.row_blocks(detached) if detached else []


def _is_finite(x: Tensor) -> bool:
    """Whether all of `x` is: the sum is not where one element is not, and quicker than a look at each."""
    return bool(x.detach().sum(dtype=torch.float64).isfinite()) or bool(x.isfinite().all())
