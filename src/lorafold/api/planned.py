"""What a plan makes of the tensors of a model in memory: new tensors, one after the other, with the bits that files would have."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..adapters.adapter import Base, WeightedAdapter, on_base
from ..adapters.formats.peft.from_model import adapters_of
from ..adapters.numbers import check_numbers
from ..checkpoints.checkpoint import Checkpoint
from ..engine.blocks import block_bytes, block_offset, blocks_of, compute, matrix_shape
from ..engine.live_tensors import LiveTensors
from ..engine.sources import Sources
from ..engine.threads import Buffers
from ..errors import LayerError, LorafoldWarning, printable
from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.info import TORCH_DTYPES
from ..kernel.stats import Kept
from ..nn.layers.ownership import check_all_local
from ..nn.layers.plain_weight import check_plain
from ..options import SumOptions
from ..planning.make import make_plan
from ..planning.names.offers import shapes_of
from ..planning.plan import MergePlan, Step
from .in_memory import Held, Survey, as_checkpoint, survey


def own_adapters(model: nn.Module) -> tuple[list[WeightedAdapter], Checkpoint, Survey]:
    """The active adapters of `model`, a model of PEFT, as they are on its own base, that base, and what else there is."""
    read = adapters_of(model, own_base=True)
    found = survey(model)
    checkpoint = as_checkpoint(found)
    base = Base(checkpoint.config or {}, shapes_of(checkpoint))
    return [WeightedAdapter(on_base(adapter, base)) for adapter in read], checkpoint, found


def value_of(step: Step, sources: Sources, buffers: Buffers) -> tuple[Tensor, Kept]:
    """What `step` makes, on the CPU, of its shape and dtype, and how much of the update that kept."""
    kept, change, blocks = Kept(), sources.change(step), list(blocks_of(step))
    whole = torch.empty(step.shape, dtype=TORCH_DTYPES[step.dtype], device="cpu")
    flat = whole.view(-1)
    for block in blocks:
        base, taken = sources.start(block, buffers)
        rows, share = compute(block, base, change, sources.plan.options)
        if len(blocks) == 1:
            buffers.give(taken)
            return rows.view(step.shape), share
        flat[block.offset : block.offset + block.numel] = rows.view(-1)
        buffers.give(taken)
        kept += share
    return whole, kept


def may_be_put(step: Step, tensor: Tensor, before: Tensor) -> bool:
    """Whether `put_value` can make what `step` makes of `tensor`, of which `before` is a copy."""
    plain = all(type(each) in (Tensor, nn.Parameter) and each.is_contiguous() and not each.is_neg() for each in (tensor, before))
    same = step.source == step.tensor and step.replacement is None and step.action == "merge" and tuple(tensor.shape) == step.shape
    places = {each.device.type for each in (tensor, before)} == {"cpu"} and not tensor.is_inference()
    return plain and same and places and tensor.dtype == before.dtype == TORCH_DTYPES[step.dtype]


def put_value(step: Step, sources: Sources, before: Tensor, out: Tensor) -> Kept:
    """As `value_of`, of the numbers `before`, into the memory of `out`, which gets no copy then; how much of the update that kept.

    Where anything raises, `out` may hold a part of it.
    """
    kept, change = Kept(), sources.change(step)
    matrix, memory = before.detach().view(matrix_shape(step)), bytes_of(out.detach())
    increment_version(out)
    for block in blocks_of(step):
        first = block_offset(block)
        room = memory[first : first + block_bytes(block, step.dtype)]
        kept += compute(block, matrix[block.start : block.start + block.count], change, sources.plan.options, room)[1]
    return kept


@contextmanager
def open_sources(
    plan: MergePlan, checkpoint: Checkpoint, chosen: Sequence[WeightedAdapter], held: Mapping[str, Held]
) -> Iterator[Sources]:
    """What `plan` reads: the model's tensors, and the adapters, whose numbers have been looked at.

    Raises `NonFiniteError` for NaN or infinity in an adapter, and `LayerError` for a tensor of the model that would change and
    is computed from others, or quantised.
    """
    for step in plan.steps:
        source = held.get(str(step.source))
        if step.action != "copy" and source is not None:
            if source.numbers is source.tensor:
                check_plain(source.module, str(step.source).rpartition(".")[0], (source.name,))
            if source.numbers.is_meta:
                raise LayerError(f"{step.source} is on the meta device: it has no numbers", hint="load the weights first")
    for each in chosen:
        check_numbers(each.adapter)
    tensors = {name: each.numbers for name, each in held.items()}
    with Sources(plan, checkpoint, [each.adapter for each in chosen], LiveTensors(tensors, checkpoint.stored)) as sources:
        yield sources


def iter_planned(model: nn.Module, options: Mapping[str, Any], *, untouched: bool) -> Iterator[tuple[str, Tensor]]:
    """As `iter_merged`, of a model of PEFT: each tensor that its active adapters change, under the plain model's name.

    Raises what reading and planning files raise, before anything is yielded.
    """
    with torch.no_grad():
        check_all_local(model)
        chosen, checkpoint, found = own_adapters(model)
        held = found.held
        plan = make_plan(checkpoint, chosen, SumOptions(**options))
        with open_sources(plan, checkpoint, chosen, held):
            pass  # all that it refuses, before the first
    apart = _apart(plan, held)
    told = [f"{name} = {value!r}" for name, value in plan.config.items()]
    if new := [printable(step.tensor) for step in plan.steps if step.source is None]:
        told.append(f"that there is {new[0]}" + (f" and {len(new) - 1} more" if len(new) > 1 else ""))
    told += [f"that {printable(name)} is not tied, and keeps its numbers" for name in sorted(apart)]
    if told:
        warnings.warn(
            f"the merged tensors are for a model whose configuration says {', '.join(told)}", LorafoldWarning, stacklevel=3
        )
    return _values(plan, checkpoint, chosen, held, apart, untouched)


def _apart(plan: MergePlan, held: Mapping[str, Held]) -> frozenset[str]:
    """What shares its memory with a tensor that changes, and does not change with it."""
    changed = {held[step.tensor].tensor.data_ptr() for step in plan.steps if step.action != "copy" and step.tensor in held}
    copied = [step.tensor for step in plan.steps if step.action == "copy" and step.tensor in held]
    return frozenset(name for name in copied if held[name].tensor.numel() and held[name].tensor.data_ptr() in changed)


def _values(
    plan: MergePlan,
    checkpoint: Checkpoint,
    chosen: Sequence[WeightedAdapter],
    held: Mapping[str, Held],
    apart: frozenset[str],
    untouched: bool,
) -> Iterator[tuple[str, Tensor]]:
    steps = {step.tensor: step for step in plan.steps}
    order = OrderedDict.fromkeys([*(name for name in held if name in steps), *steps])
    buffers = Buffers()
    with open_sources(plan, checkpoint, chosen, held) as sources:
        for name in order:
            step = steps[name]
            if step.action != "copy":
                with torch.no_grad():
                    value, _ = value_of(step, sources, buffers)
                beside = name if name in held or step.source is not None else f"{name.removesuffix('bias')}weight"
                yield name, value.to(held[beside].numbers.device if beside in held else value.device)
            elif untouched or name in apart:
                yield name, held[str(step.source)].numbers.detach()
    if untouched:
        yield from ((name, each.numbers.detach()) for name, each in held.items() if name not in steps)
