"""Merging into a model in memory by a plan, in place, and the way back.

Merges into one model are a stack: the one that was made last is taken out first. The stack knows the tensors themselves, so that
what was put in another's place meanwhile is seen, and nothing is written to a tensor that is no longer the model's.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapters.adapter import WeightedAdapter
from ..checkpoints.checkpoint import Checkpoint
from ..engine.live_tensors import same_change
from ..engine.report import lost_words
from ..engine.sources import Sources
from ..engine.threads import Buffers
from ..errors import LayerError, LorafoldWarning, UnsupportedAdapterError, printable
from ..kernel.stats import Kept
from ..nn.layers.locks import model_lock
from ..nn.layers.ownership import Places, check_all_local, overlap, storage_of
from ..options import MatchOptions, SumOptions
from ..planning.make import make_plan
from ..planning.plan import MergePlan, Step
from ..planning.summary import actions, title
from ..text import Readable, Summary, size
from .in_memory import Held, Survey, Wrapped, check_plain_model, held_tensors
from .planned import may_be_put, open_sources, own_adapters, put_value, value_of


@dataclass(frozen=True, eq=False)
class _Mark:
    """One merge in the stack of a tensor; `adapters` in words, `hashes` of them."""

    adapters: str
    hashes: tuple[str, ...]
    thread: int
    merge: weakref.ref[LiveMerge]


_stacks: MutableMapping[Tensor, list[_Mark]] = WeakTensorKeyDictionary()  # by tensor, the marks of the merges that are in it
_stacks_lock = threading.RLock()
_versions: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # by tensor, how often it had been written to when we last did


class LiveMerge(Readable):
    """What `merge_into` did to a model, and the way back. A context manager: leaving it unmerges.

    - `plan`: what went where, as for files
    - `kept`: how much of each update survived the rounding, by tensor

    >>> import lorafold, torch
    >>> from lorafold import nn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> _ = nn.attach(model, "all-linear", r=2)
    >>> _ = nn.save_adapter(model, "tiny")
    >>> _ = nn.detach(model)
    >>> done = lorafold.merge_into(model, ["tiny"])
    >>> done.merged, list(done.kept)
    (True, ['0.weight'])
    >>> done.unmerge()
    >>> done.merged
    False
    """

    def __init__(self, model: nn.Module, plan: MergePlan, root: nn.Module) -> None:
        self.model = model
        self.plan = plan
        self._root = root  # which stays, whatever layers it has
        self.kept: dict[str, Kept] = {}
        self._before: list[tuple[str, Tensor, Tensor]] = []  # a tensor of the model with its name, and a copy of what it held
        self._given: list[tuple[str, nn.Module, nn.Parameter]] = []  # biases of layers that had none, with their names
        self._layers: list[Wrapped] = []  # PEFT's, which were taken out
        self._waiting: list[LiveMerge] = []  # those whose threads have left them, and that come out after this one
        self._mark = _Mark(
            ", ".join(printable(adapter.path) for adapter in plan.adapters),
            tuple(adapter.sha256 for adapter in plan.adapters),
            threading.get_ident(),
            weakref.ref(self),
        )

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the model's weights."""
        return bool(self._before) or bool(self._given) or bool(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the way back."""
        return sum(copy.nbytes for _, _, copy in self._before)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should act on."""
        return lost_words(self.plan, self.kept, "`rounding='stochastic'` (unbiased)")

    def summary(self) -> Summary:
        """What was merged, for people."""
        share = sum(self.kept.values(), Kept()).share
        facts = [
            ("merged", actions(self.plan)),
            ("kept", f"{share:.1%} of the update survived the rounding ({self.plan.options})"),
            ("copies", f"{size(self.nbytes)}, for the way back"),
            *(("note", note) for note in self.plan.notes),
        ]
        return Summary(f"{title(self.plan)}, in memory", facts, warnings=self.warnings)

    def unmerge(self) -> None:
        """Give every tensor back what it held, bit for bit, take away biases that layers were given, and give a model of PEFT its
        layers; once is enough.

        Raises `LayerError`, with nothing changed, where adapters were merged after these that are to be taken out first, and where
        a tensor was replaced by another since, was written to by others, as `load_state_dict` and optimizers do, or has another
        shape or dtype. Writing by way of `.data`, which torch does not count, is not seen.
        """
        with model_lock(self.model), _stacks_lock, torch.no_grad():
            if not self.merged:
                return
            self._check_unchanged()
            above = self._above()
            if above:
                mark, name = above[0]
                gone = "" if mark.merge() is not None else ", and what merge_into returned for them is gone"
                raise LayerError(
                    f"{mark.adapters} was merged into {name} after {self._mark.adapters}{gone}",
                    hint="unmerge that first" if not gone else "keep what merge_into returns; load the base anew",
                )
            self._restore()
            while self._waiting:
                self._waiting.pop().unmerge()

    def _check_unchanged(self) -> None:
        held = held_tensors(self._root)
        for name, tensor in self._changed():
            if name not in held or held[name].tensor is not tensor:
                raise LayerError(
                    f"{printable(name)} is another tensor than the one that was merged: it was replaced meanwhile, by"
                    " load_state_dict(assign=True) or by hand",
                    hint="nothing was changed; put the former parameter back, or load the base weights",
                )
        for name, tensor, copy in self._before:
            if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
                raise LayerError(
                    f"{printable(name)} was {list(copy.shape)} of {copy.dtype} when it was merged, and is {list(tensor.shape)} of"
                    f" {tensor.dtype} now",
                    hint="turn it back, then unmerge",
                )
            if _version(tensor) != _versions.get(tensor):
                raise LayerError(
                    f"{printable(name)} was written to since {self._mark.adapters} was merged, as load_state_dict and optimizers"
                    " do: what it held before is not what it would be without the adapters",
                    hint="nothing was changed; load the base weights anew to go on from them",
                )

    def _changed(self) -> list[tuple[str, Tensor]]:
        """The tensors that the merge changed or gave, with their names."""
        return [(name, tensor) for name, tensor, _ in self._before] + [(name, bias) for name, _, bias in self._given]

    def _above(self) -> list[tuple[_Mark, str]]:
        """The merges that were made after this one into the same tensors, the last first, each with the name of one."""
        found: dict[_Mark, str] = {}
        for name, tensor in self._changed():
            stack = _stacks.get(tensor, [])
            for mark in reversed(stack[stack.index(self._mark) + 1 :]):
                found.setdefault(mark, name)
        return list(found.items())

    def _restore(self) -> None:
        while self._before:
            _, tensor, copy = self._before[-1]
            _write(tensor, copy)
            self._unmark(tensor)
            self._before.pop()
        while self._given:
            _, module, bias = self._given[-1]
            module._parameters["bias"] = None
            self._unmark(bias)
            self._given.pop()
        while self._layers:
            each = self._layers[-1]
            each.parent._modules[each.name] = each.layer
            each.layer.train(each.plain.training)
            self._layers.pop()

    def _unmark(self, tensor: Tensor) -> None:
        stack = _stacks.get(tensor, [])
        if self._mark in stack:
            stack.remove(self._mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Unmerge. Where another thread has merged into the same tensors since, that takes this out too when it unmerges."""
        with model_lock(self.model), _stacks_lock:
            above = self._above() if self.merged else []
            mine = threading.get_ident()
            if above and all(mark.thread != mine for mark, _ in above):
                next_above = above[-1][0].merge()
                if next_above is not None:
                    next_above._waiting.append(self)
                    return
            self.unmerge()


def merge_own(
    model: nn.Module,
    options: SumOptions | None = None,
    match: MatchOptions | None = None,
    undo_device: torch.device | str | None = None,
) -> LiveMerge:
    """Merge the active adapters of `model`, a model of PEFT, into its own base; raises as `merge_by_plan` does."""
    with model_lock(model), torch.no_grad():
        check_plain_model(model, "merge_into")
        check_all_local(model)
        chosen, checkpoint, found = own_adapters(model)
        plan = make_plan(checkpoint, chosen, options, match)
        return merge_by_plan(model, plan, checkpoint, chosen, found, undo_device)


def merge_by_plan(
    model: nn.Module,
    plan: MergePlan,
    checkpoint: Checkpoint,
    chosen: Sequence[WeightedAdapter],
    found: Survey,
    undo_device: torch.device | str | None,
) -> LiveMerge:
    """Put into the tensors of `model`, which was `found` so, what `plan` makes of them. PEFT's layers leave it meanwhile.

    Raises `UnsupportedAdapterError` where the model's structure would have to change, and what `open_sources` raises; all is then
    as it was.
    """
    result, held, buffers = LiveMerge(model, plan, found.root), found.held, Buffers()
    with _stacks_lock, open_sources(plan, checkpoint, chosen, held) as sources:
        _warn_of_those_merged(result, held)
        try:
            _give_biases(result, plan, held, sources, buffers)
            for step in [_one(steps, sources) for steps in _shared(plan, held, found.places)]:
                tensor = held[step.tensor].tensor
                before = tensor.to(undo_device or tensor.device, copy=True)
                value = None
                if not may_be_put(step, tensor, before):
                    value, result.kept[step.tensor] = value_of(step, sources, buffers)
                result._before.append((step.tensor, tensor, before))
                _stacks.setdefault(tensor, []).append(result._mark)
                if value is None:
                    result.kept[step.tensor] = put_value(step, sources, before, tensor)
                    _versions[tensor] = _version(tensor)
                else:
                    _write(tensor, value)
            for each in found.wrapped:
                each.plain.train(each.layer.training)
                result._layers.append(each)
                each.parent._modules[each.name] = each.plain
        except BaseException:
            result._restore()
            raise
    return result


def _warn_of_those_merged(merge: LiveMerge, held: Mapping[str, Held]) -> None:
    """Warn where the model has one of the adapters merged already: it would be added twice."""
    for step in merge.plan.steps:
        marks = _stacks.get(held[step.tensor].tensor, ()) if step.action != "copy" and step.tensor in held else ()
        known = {sha256 for mark in marks for sha256 in mark.hashes}
        again = [printable(adapter.path) for adapter in merge.plan.adapters if adapter.sha256 in known]
        if again:
            words = f"{', '.join(again)} is merged into {printable(step.tensor)} a second time, on top of the first"
            warnings.warn(words, LorafoldWarning, stacklevel=4)
            return


def _give_biases(result: LiveMerge, plan: MergePlan, held: Mapping[str, Held], sources: Sources, buffers: Buffers) -> None:
    """Give the layers that have none the biases that `plan` makes."""
    for step in plan.steps:
        if step.source is None:
            beside = held[f"{step.tensor.removesuffix('bias')}weight"]
            value, result.kept[step.tensor] = value_of(step, sources, buffers)
            bias = nn.Parameter(value.to(beside.tensor.device), beside.tensor.requires_grad)
            result._given.append((step.tensor, beside.module, bias))
            _stacks.setdefault(bias, []).append(result._mark)
            beside.module._parameters["bias"] = bias


def _write(tensor: Tensor, value: Tensor) -> None:
    within: AbstractContextManager[object] = torch.inference_mode() if tensor.is_inference() else nullcontext()
    with within, torch.no_grad():
        tensor.copy_(value)
    _versions[tensor] = _version(tensor)


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to, as torch counts it; of those made in inference mode it does not."""
    return 0 if tensor.is_inference() else tensor._version


def _shared(plan: MergePlan, held: Mapping[str, Held], all_places: Places) -> list[list[Step]]:
    """The steps that change a tensor, those of names that are one tensor together.

    Raises `UnsupportedAdapterError` where that cannot be done in place.
    """
    steps = {step.tensor: step for step in plan.steps}
    changed: dict[tuple[object, ...], list[Step]] = {}
    places: dict[tuple[torch.device, int], list[str]] = {}
    for name, step in steps.items():
        if step.action == "copy" or step.source is None:
            continue
        if name not in held or tuple(held[name].tensor.shape) != step.shape:
            raise UnsupportedAdapterError(
                f"{printable(name)} would become {list(step.shape)}: a model in memory keeps its structure", hint=_FILES
            )
        tensor = held[name].tensor
        changed.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(step)
        place = storage_of(tensor)
        if place is not None:
            places.setdefault(place, []).append(name)
    for name, each in held.items():
        for other in places.get(storage_of(each.tensor) or (torch.device("cpu"), 0), ()):
            tensor = held[other].tensor
            whole = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            same = whole == (each.tensor.data_ptr(), each.tensor.shape, each.tensor.stride(), each.tensor.dtype)
            if same and name in steps and steps[name].action != "copy":
                continue
            if name != other and overlap(tensor, each.tensor):
                raise UnsupportedAdapterError(
                    f"{printable(other)} and {printable(name)} share their memory, and only the first would change", hint=_FILES
                )
    known = {id(each.tensor) for each in held.values()}
    for place, names in places.items():  # what no state dict holds
        for name, (_, other, unsaved) in product(names, all_places.get(place, ())):
            if id(unsaved) not in known and overlap(held[name].tensor, unsaved):
                raise UnsupportedAdapterError(
                    f"{printable(name)} and {printable(other)} share their memory, and only the first would change", hint=_FILES
                )
    if plan.config:
        raise UnsupportedAdapterError(f"the adapter changes {', '.join(plan.config)} of the model's configuration", hint=_FILES)
    return list(changed.values())


def _one(steps: list[Step], sources: Sources) -> Step:
    """The step of all names of one tensor.

    Raises `UnsupportedAdapterError` where they would not give it the same numbers.
    """
    first, *others = steps
    for other in others:
        if not same_change(sources, first, other):
            raise UnsupportedAdapterError(
                f"{printable(first.tensor)} and {printable(other.tensor)} share their memory, and would get different updates",
                hint=_FILES,
            )
    return first


_FILES = "nothing was changed; merge the adapter into the model's files, and load those"
