"""Merging and unmerging of a whole model: all of its layers, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..errors import LayerError, LorafoldError, NonFiniteError
from .foreign import own_layers
from .layers.locks import model_lock
from .layers.mergeable import Mergeable
from .layers.ownership import check_local, check_not_shared, places_of, sharded_modules


def merge(model: nn.Module) -> None:
    """Merge the active adapters of every LoRA layer of `model`; those that are merged stay so.

    Where anything raises, every layer is as it was: `NonFiniteError` for NaN or infinity in an adapter and `LayerError` for a
    weight that another module has too, before the first write.

    `model.eval()` merges as well, where `merge_weights` is set, and checks the same before it does.
    """
    with model_lock(model):
        layers = {name: layer for name, layer in own_layers(model, "merge").items() if not layer.merged}
        _check(layers, {name: layer.active_adapters for name, layer in layers.items()}, model)
        _each(layers, Mergeable.merge, back=Mergeable.unmerge)


def unmerge(model: nn.Module) -> None:
    """Give every LoRA layer of `model` its base weight back, bit for bit; where one cannot, every layer is as it was.

    Raises `LayerError` as `Mergeable.unmerge` does.
    """
    with model_lock(model):
        layers = {name: layer for name, layer in own_layers(model, "unmerge").items() if layer.merged}
        _each(layers, Mergeable.check_restorable, back=lambda layer: None)
        _each(layers, Mergeable.unmerge, back=Mergeable.merge)


@contextmanager
def merged_layers(model: nn.Module) -> Iterator[nn.Module]:
    """`merged` of a model whose LoRA layers are ours."""
    ours = [layer for layer in own_layers(model, "merged").values() if not layer.merged]
    merge(model)
    try:
        yield model
    finally:
        with model_lock(model):
            for layer in ours:
                layer.unmerge()


def set_active(model: nn.Module, adapters: str | Iterable[str]) -> None:
    """Make `adapters`, one name or several, the active ones in every LoRA layer that holds any of them; the others use none.

    Merged layers are merged anew from their bases, so the bits are those of a fresh merge. Where anything raises, every layer is
    as it was.

    Raises `LayerError` for a name that no layer holds, and what `merge` raises, before the first write.
    """
    with model_lock(model):
        layers = own_layers(model, "set_active")
        after = _chosen(layers, adapters)
        _check({name: layer for name, layer in layers.items() if layer.merged}, after, model)
        before = {name: layer.active_adapters for name, layer in layers.items()}
        names = {id(layer): name for name, layer in layers.items()}
        _each(
            layers,
            lambda layer: layer.set_active(after[names[id(layer)]]),
            back=lambda layer: layer.set_active(before[names[id(layer)]]),
        )


def swap(model: nn.Module, adapters: str | Iterable[str]) -> None:
    """Go from one merged adapter to another: `set_active`, and after it every layer is merged, whatever it was before.

    Threads that hold `model_lock` for their forward passes see the old weights or the new. Raises as `set_active` does.
    """
    with model_lock(model):
        layers = own_layers(model, "swap")
        after = _chosen(layers, adapters)
        _check(layers, after, model)
        before = {name: layer.active_adapters for name, layer in layers.items()}
        set_active(model, adapters)
        try:
            merge(model)
        except BaseException:
            for name, layer in layers.items():
                layer.set_active(before[name])
            raise


def _chosen(layers: dict[str, Mergeable], adapters: str | Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By layer, those of `adapters` that it holds."""
    wanted = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    held = {name for layer in layers.values() for name in layer.adapter_names}
    for name in wanted:
        if name not in held:
            raise LayerError(f"no layer has an adapter named {name!r}; there are {sorted(held)}")
    return {name: layer.chosen(a for a in wanted if a in layer.adapter_names) for name, layer in layers.items()}


def _check(layers: Mapping[str, Mergeable], adapters: Mapping[str, Iterable[str]], model: nn.Module) -> None:
    """What can be known of `layers`, which are to have `adapters` merged, before anything is written."""
    places, sharded = places_of(model), sharded_modules(model)
    for name, layer in layers.items():
        try:
            check_local(layer, sharded)
            layer.check_plain()
            layer.check_finite(adapters[name])
        except (LayerError, NonFiniteError) as error:
            raise _named(error, name) from error
        if layer.adapter_names:
            check_not_shared(layer.weight_owner, model, places)


def _each(layers: dict[str, Mergeable], action: Callable[[Mergeable], None], back: Callable[[Mergeable], None]) -> None:
    """Do `action` to each layer; where one raises, undo those that were done, in reverse."""
    done: list[Mergeable] = []
    try:
        for name, layer in layers.items():
            try:
                action(layer)
            except LorafoldError as error:
                raise _named(error, name) from error
            done.append(layer)
    except BaseException:
        for layer in reversed(done):
            back(layer)
        raise


def _named(error: LorafoldError, name: str) -> LorafoldError:
    """The same error, saying which layer it is about."""
    return type(error)(f"{name}: {error.message}" if name else error.message, hint=error.hint)
