"""Adapters of any kind merged into a model in memory, and taken out again, through the plan that files are merged by.

The model's tensors stand in for a checkpoint. So everything that the file road reads, resolves and computes (DoRA, experts,
attention's packed projections, trained rows, every format) holds here too, and the weights have the bits that the files would have.
The layers of `lorafold.nn.layers` are the other live road: they can be trained, this can only merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from ..adapters.options import ReadOptions
from ..adapters.reader import check_numbers
from ..checkpoints.checkpoint import Checkpoint, Shard
from ..declared import picked
from ..engine.blocks import blocks_of, compute
from ..engine.live_tensors import LiveTensors, same_change
from ..engine.report import lost_words
from ..engine.sources import Sources
from ..engine.threads import Buffers
from ..errors import InputError, LayerError, UnsupportedAdapterError, printable
from ..files.safetensors.dtypes import NAMES
from ..files.safetensors.info import FileIdentity, Header, TensorInfo
from ..kernel.stats import Kept
from ..nn.layers.ownership import check_local
from ..nn.merging import model_lock
from ..nn.replace import stores_transposed
from ..nn.select import plain_name
from ..options import LiveArguments, MatchOptions, SumOptions
from ..planning.make import make_plan
from ..planning.plan import MergePlan, Step
from ..planning.summary import actions, title
from ..text import Summary, size
from .loading import AdapterLike, loaded, placed
from .telling import tells
from .verbs import takes

_PLACE = Path("the model")


class LiveMerge:
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

    def __init__(self, model: nn.Module, plan: MergePlan) -> None:
        self.model = model
        self.plan = plan
        self.kept: dict[str, Kept] = {}
        self._before: list[tuple[Tensor, Tensor]] = []  # a tensor of the model, and a copy of what it held

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the model's weights."""
        return bool(self._before)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the way back."""
        return sum(copy.nbytes for _, copy in self._before)

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

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary().to_html()

    def unmerge(self) -> None:
        """Give every tensor back what it held, bit for bit; once is enough.

        Raises `LayerError`, with nothing changed, where a tensor of the model has another shape or dtype now.
        """
        with model_lock(self.model), torch.no_grad():
            for tensor, copy in self._before:
                if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
                    raise LayerError(
                        f"a weight was {list(copy.shape)} of {copy.dtype} when it was merged, and is {list(tensor.shape)} of"
                        f" {tensor.dtype} now",
                        hint="turn it back, then unmerge",
                    )
            self._restore()

    def _restore(self) -> None:
        while self._before:
            tensor, copy = self._before.pop()
            tensor.copy_(copy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.unmerge()


@tells
@takes(SumOptions, MatchOptions, live=True)
def merge_into(
    model: nn.Module,
    adapters: Sequence[AdapterLike],
    *,
    read_options: ReadOptions | None = None,
    undo_device: torch.device | str | None = None,
    **options: Unpack[LiveArguments],
) -> LiveMerge:
    """Merge adapters from disk into the weights of `model`, in place; what it returns takes them out again.

    - `adapters`, `read_options`: as for `merge`, of any format and kind that it takes; summed before the one rounding
    - `undo_device`: where the copies of the changed weights are kept; by default beside the weights
    - `**options`: as listed below

    The arithmetic is done on the CPU, a block at a time, whatever the weights' device.

    Raises what `merge` does for adapters that do not fit, `UnsupportedAdapterError` where the model's structure would have to
    change (another vocabulary, tied weights that would come apart), `LayerError` for sharded weights; all tensors are then as
    they were.

    >>> import lorafold, torch
    >>> from lorafold import nn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> _ = nn.attach(model, "all-linear", r=2)
    >>> _ = nn.save_adapter(model, "tiny")
    >>> _ = nn.detach(model)
    >>> with lorafold.merge_into(model, ["tiny"]) as done:
    ...     done.merged  # and what was merged is in the weights
    True
    >>> done.merged  # the base again, bit for bit
    False
    """
    with model_lock(model), torch.no_grad():
        for module in model.modules():
            check_local(module, model)
        tensors = _tensors_of(model)
        checkpoint = _as_checkpoint(model, tensors)
        chosen = placed(loaded(adapters, read_options), checkpoint)
        plan = make_plan(checkpoint, chosen, picked(SumOptions, options), picked(MatchOptions, options))
        shared = _shared(plan, tensors)
        for each in chosen:
            check_numbers(each.adapter)
        result = LiveMerge(model, plan)
        try:
            held = LiveTensors(tensors, checkpoint.stored)
            with Sources(plan, checkpoint, [each.adapter for each in chosen], held) as sources:
                for step in [_one(steps, sources) for steps in shared]:
                    tensor = tensors[step.tensor]
                    result._before.append((tensor, tensor.to(undo_device or tensor.device, copy=True)))
                    result.kept[step.tensor] = _merge(step, tensor, sources)
        except BaseException:
            result._restore()
            raise
    return result


def _merge(step: Step, tensor: Tensor, sources: Sources) -> Kept:
    """Put into `tensor` what `step` makes of it; how much of the update that kept."""
    kept, buffers, change = Kept(), Buffers(), sources.change(step)
    whole = torch.empty(step.shape, dtype=tensor.dtype)
    flat = whole.view(-1)
    for block in blocks_of(step):
        base, taken = sources.start(block, buffers)
        rows, share = compute(block, base, change, sources.plan.options)
        flat[block.offset : block.offset + block.numel] = rows.view(-1)
        buffers.give(taken)
        kept += share
    tensor.copy_(whole)
    return kept


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they are saved under, those that share memory under each of theirs."""
    return {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _as_checkpoint(model: nn.Module, tensors: dict[str, Tensor]) -> Checkpoint:
    """What the rooms that plan know a base by, for a model in memory."""
    infos: dict[str, TensorInfo] = {}
    start = 0
    for name, tensor in tensors.items():
        dtype = NAMES.get(tensor.dtype)
        if dtype is not None:
            infos[name] = TensorInfo(name, dtype, tuple(tensor.shape), start, start + tensor.nbytes, _PLACE)
            start += tensor.nbytes
    if not infos:
        raise InputError("the model has no tensors to merge into")
    names = hashlib.sha256(repr([(info.name, info.dtype, info.shape) for info in infos.values()]).encode()).hexdigest()
    header = Header(_PLACE, infos, {}, 0, start, names, FileIdentity(start, 0, 0, 0))
    turned = frozenset(plain_name(f"{name}.weight") for name, module in model.named_modules() if stores_transposed(module))
    shards = (Shard("model", header),)
    return Checkpoint(_PLACE, shards, infos, _config(model), {}, indexed=False, lone=True, live=True, transposed=turned)


def _config(model: nn.Module) -> dict[str, Any] | None:
    """What transformers or diffusers writes into the model's config.json; None where it is of neither."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):  # diffusers
        return {"_class_name": type(model).__name__, **config}
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return {**found, "architectures": [type(model).__name__]} if isinstance(found, dict) else None


def _shared(plan: MergePlan, tensors: dict[str, Tensor]) -> list[list[Step]]:
    """The steps that change a tensor, those of names that share their memory together.

    Raises `UnsupportedAdapterError` where that cannot be done in place.
    """
    steps = {step.tensor: step for step in plan.steps}
    changed: dict[int, list[Step]] = {}
    for name, step in steps.items():
        if step.action == "copy":
            continue
        if name not in tensors or tuple(tensors[name].shape) != step.shape:
            raise UnsupportedAdapterError(
                f"{printable(name)} would become {list(step.shape)}: a model in memory keeps its structure", hint=_FILES
            )
        changed.setdefault(tensors[name].data_ptr(), []).append(step)
    for name, tensor in tensors.items():
        with_it = changed.get(tensor.data_ptr(), []) if tensor.numel() else []
        if with_it and (name not in steps or steps[name].action == "copy"):
            raise UnsupportedAdapterError(
                f"{printable(with_it[0].tensor)} and {printable(name)} share their memory, and only the first would change",
                hint=_FILES,
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
