"""From an adapter and a checkpoint to targets: for each LoRA pair and each replacement, the base tensor that it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from ..adapters.adapter import Adapter, AdapterModule
from ..checkpoints.checkpoint import Checkpoint
from ..errors import (
    InputError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    nearest_names,
    printable,
)
from ..files.expression import Matrix
from .names.diffusion import named
from .names.makers.slots import maker_slots, with_makers
from .names.offers import Offers, Slot, offers_of, shape_of
from .names.prefix import Rename, find_rename, unmatched
from .names.transformers import renamed, renamings_of
from .orientation import attention_outputs, square_ways, straightened, turned_modules
from .replacements import check_mergeable, check_replacement, check_rows, is_copy, quantised, whole_tensor
from .targets import Target, bias_targets, targets_of
from .ties import Ties, find_ties
from .trained import check_trained


@dataclass(frozen=True)
class Resolution:
    """Where everything in one adapter belongs.

    - `rename`: what was done to its names
    - `targets`: by module name, usually one each; `biases`: where the bias is, of modules with a lora_bias
    - `replacements`: base tensor name by the adapter's name for it; not those that are the base's own numbers
    - `notes`: what a reader should know
    - `unmatched`: modules and replacements that were left out, as the adapter names them
    """

    rename: Rename
    targets: Mapping[str, tuple[Target, ...]]
    biases: Mapping[str, tuple[Target, ...]]
    replacements: Mapping[str, str]
    rows: Mapping[str, str]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Road:
    """From the adapter's names to what the base offers: by the base's spelling and one prefix."""

    offers: Offers
    rename: Rename
    called: Mapping[str, str] = field(default_factory=dict)

    def name(self, own: str) -> str:
        return self.rename(self.offers.spell(self.called.get(own, own)))

    def find(self, own: str, index: int | None = None) -> tuple[Slot, ...]:
        return self.offers.find(self.name(own), index)


def resolve(adapter: Adapter, checkpoint: Checkpoint, ties: Ties | None = None, *, allow_partial: bool = False) -> Resolution:
    """The targets of `adapter` in `checkpoint`, and in what it ties to its tensors (`ties`, looked for where they are not given).

    `allow_partial` leaves out what the base has no place for, if not all.

    Raises `UnmatchedAdapterError`, `AmbiguousNameError`, `ShapeMismatchError`, `UnsupportedAdapterError` for what the base cannot
    hold, and `CheckpointError` for a base tensor of a type that nothing can be added to.
    """
    ties = find_ties(checkpoint) if ties is None else ties
    tensors = dict(checkpoint.tensors)
    tensors |= {name: tensors[source] for name, source in ties.aliases.items()}
    makers = maker_slots({name: info.shape for name, info in checkpoint.tensors.items()})
    offers = with_makers(offers_of(tensors, checkpoint.config), makers)
    whole = adapter.replacements
    adapter, named_notes = named(adapter, checkpoint, makers, allow_partial=allow_partial)
    given = dict(zip(adapter.replacements, whole, strict=True))
    ends = {offers.spell(module): (Slot(name),) for module, name in ties.modules.items() if name in tensors}
    road = _Road(replace(offers, slots=ends | dict(offers.slots)), Rename())
    try:
        road, own = _road(adapter, tensors, road, checkpoint, allow_partial=allow_partial)
        rename = road.rename
        adapter, left_out = _matched(adapter, road, own, checkpoint, allow_partial=allow_partial)
    except UnmatchedAdapterError as error:
        undecoded = None if checkpoint.encoded else quantised(checkpoint)
        raise undecoded or _without_head(adapter, error) or _without_image(error) or error from None
    replaced = {name: whole_tensor(name, road.find(name), adapter) for name in adapter.replacements}
    for name, tensor in replaced.items():
        check_replacement(adapter.replacements[name], tensors[tensor], tensor, adapter, resizable=_weight_of(tensor) in ties.ends)
    copies = {n for n, tensor in replaced.items() if is_copy(adapter, adapter.replacements[n], checkpoint, tensors[tensor])}
    replacements = {name: tensor for name, tensor in replaced.items() if name not in copies}
    present = tensors | {tensor: adapter.replacements[name] for name, tensor in replacements.items()}
    slots = {name: road.find(module.tensor, module.index) for name, module in adapter.modules.items()}
    attention_outputs(adapter, slots, checkpoint)
    squares = square_ways(adapter, slots, present, checkpoint)
    turned = turned_modules(adapter, {name: shape_of(each, present) for name, each in slots.items()})
    told = squares | {name: (turned[around], "") for name, m in adapter.modules.items() if (around := _around(m)) in turned}
    targets = {
        name: targets_of(module, slots[name], present, adapter, checkpoint, told.get(name))
        for name, module in adapter.modules.items()
    }
    rows = {name: whole_tensor(name, road.find(name), adapter) for name in adapter.rows}
    for name, tensor in rows.items():
        check_rows(adapter.rows[name], tensors[tensor], tensor, adapter)
    biases = {
        name: _bias_targets(module, road, tensors, adapter, checkpoint)
        for name, module in adapter.modules.items()
        if module.lora_bias is not None
    }
    changed = {target.tensor for several in targets.values() for target in several} | {*replaced.values(), *rows.values()}
    notes = [] if rename == Rename() else [f"tensor names of {printable(adapter.name)} rewritten: {rename}"]
    if wrappers := sorted({part for name in adapter.tensor_names for part in name.split(".") if part in road.offers.around}):
        notes.append(f"tensor names of {printable(adapter.name)} rewritten: {', '.join(wrappers)} taken out, which wraps modules")
    notes += [*named_notes, *_reasons(targets)]
    return Resolution(
        rename=rename,
        targets=targets,
        biases=biases,
        replacements={given[name]: tensor for name, tensor in replacements.items()},
        rows=rows,
        notes=(*notes, *check_trained(adapter, rename, road.offers, changed, tensors)),
        unmatched=tuple(given.get(name, name) for name in left_out),
    )


def prepared(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter` with the factors exchanged of what it was trained on transposed, which no target can say: parts of stacks of
    experts, and attention's output projections after a Conv1D.

    Raises `AmbiguousNameError` where that may be, and nothing tells; what else is wrong is for `resolve` to say.
    """
    if not any(module.index is not None or name.endswith(".out_proj") for name, module in adapter.modules.items()):
        return adapter
    tensors = dict(checkpoint.tensors)
    road = _Road(offers_of(tensors, checkpoint.config), Rename())
    try:
        road, _ = _road(adapter, tensors, road, checkpoint, allow_partial=True)
    except InputError:
        return adapter
    slots = {name: road.find(module.tensor, module.index) for name, module in adapter.modules.items()}
    adapter = attention_outputs(adapter, slots, checkpoint)
    turned = turned_modules(adapter, {name: shape_of(each, tensors) for name, each in slots.items() if each})
    return straightened(adapter, slots, tensors, checkpoint, turned)


def _around(module: AdapterModule) -> str:
    """The module that holds the stack which `module` is a matrix of; empty where it is of none."""
    return module.tensor.rpartition(".")[0] if module.index is not None else ""


def _weight_of(tensor: str) -> str:
    """The weight that `tensor` is, or is the bias of."""
    return f"{tensor.removesuffix('bias')}weight" if tensor.endswith(".bias") else tensor


_HEADS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
"""What transformers calls the models of PEFT's task types that have a head of their own."""


def _without_head(adapter: Adapter, error: UnmatchedAdapterError) -> UnmatchedAdapterError | None:
    """`error` with the way to a base that has the head which `adapter` trained whole; None where it is of anything else."""
    heads = {printable(name.rpartition(".")[0]): info for name, info in adapter.replacements.items() if name.count(".") < 3}
    missing = {name.removesuffix(".bias") for name in error.unmatched}
    task = adapter.config.get("task_type")
    if not adapter.modules or not missing or not missing <= heads.keys():
        return None
    head = next(info for name, info in heads.items() if name in missing)
    kind = _HEADS.get(task if isinstance(task, str) else "", "SequenceClassification")
    rows = next((info.shape[0] for info in heads.values() if len(info.shape) == 2), head.shape[0] if head.shape else 1)
    return UnmatchedAdapterError(
        f"{error.message.splitlines()[0].removesuffix(':')}; the adapter holds that head whole, '{printable(head.name)}'"
        f" {list(head.shape)}",
        unmatched=error.unmatched,
        nearest={},
        hint="nothing was written; make the base a model with that head first, and merge into that:"
        f" AutoModelFor{kind}.from_pretrained(BASE, num_labels={rows}).save_pretrained(DIR)",
    )


_OF_IMAGES = re.compile(r"(?:k_img|v_img|add_[kv]_proj|img_emb|image_embedder)\b|_(?:k|v)_img$")
"""What Wan 2.1's image-to-video models have for the picture that they start from, and 2.2's do not."""


def _without_image(error: UnmatchedAdapterError) -> UnmatchedAdapterError | None:
    """`error` with what it is that Wan 2.2 lacks of Wan 2.1; None where it is of anything else."""
    if not error.unmatched or not all(_OF_IMAGES.search(name) for name in error.unmatched):
        return None
    return UnmatchedAdapterError(
        error.message.splitlines()[0].removesuffix(":"),
        unmatched=error.unmatched,
        nearest={},
        hint="nothing was written; these are of attention to the picture that a video starts from, which Wan 2.1's image-to-video"
        " models have and others do not; `allow_partial=True` leaves them out",
    )


def _road(
    adapter: Adapter, tensors: Mapping[str, Matrix], road: _Road, checkpoint: Checkpoint, *, allow_partial: bool
) -> tuple[_Road, dict[str, str]]:
    """The renaming that takes all names of `adapter` to `tensors`, and these names by how the base spells them.

    The names that transformers gives to the tensors of other makers' files are tried where the files' own do not fit as they are:
    for the base's tensors, or for the adapter's, which may have been trained with an older version. What is looked up so comes
    before another prefix.

    Raises `UnmatchedAdapterError` where none does.
    """
    find = partial(find_rename, adapter=adapter.path, base=checkpoint.root)
    own = {road.name(name): name for name in adapter.tensor_names}
    try:
        found = find(own, road.offers)
        if found != Rename():
            for offers, called in _respelled(adapter, tensors, checkpoint):
                other = _Road(offers, Rename(), called)
                names = {other.name(name): name for name in adapter.tensor_names}
                if offers.names.issuperset(names):
                    return other, names
        return replace(road, rename=found), own
    except UnmatchedAdapterError as error:
        for offers, called in _respelled(adapter, tensors, checkpoint):
            other = _Road(offers, Rename(), called)
            names = {other.name(name): name for name in adapter.tensor_names}
            with suppress(UnmatchedAdapterError):
                return replace(other, rename=find(names, offers)), names
        if not allow_partial:
            raise error
    return replace(road, rename=find(own, road.offers, partial=True)), own


def _respelled(
    adapter: Adapter, tensors: Mapping[str, Matrix], checkpoint: Checkpoint
) -> Iterator[tuple[Offers, Mapping[str, str]]]:
    """The base in transformers' names, then the adapter, then both."""
    for steps in renamings_of(checkpoint.config):
        new, called = offers_of(tensors, checkpoint.config, steps), renamed(adapter.tensor_names, steps)
        yield from ((new, {}), (offers_of(tensors, checkpoint.config), called), (new, called))


def _matched(
    adapter: Adapter, road: _Road, own: Mapping[str, str], checkpoint: Checkpoint, *, allow_partial: bool
) -> tuple[Adapter, tuple[str, ...]]:
    """`adapter` with what the base has a place for, and the names of the rest.

    Raises `UnmatchedAdapterError` where there is a rest and `allow_partial` is not given.
    """
    modules = {name: module for name, module in adapter.modules.items() if road.find(module.tensor, module.index)}
    replacements = {name: info for name, info in adapter.replacements.items() if road.find(name)}
    rows = {name: trained for name, trained in adapter.rows.items() if road.find(name)}
    left = [name for name in adapter.modules if name not in modules]
    left += [name for name in adapter.replacements if name not in replacements]
    left += [name.removesuffix(".weight") for name in adapter.rows if name not in rows]
    if left and not allow_partial:
        experts = {name: f"{name}.weight" for name in left}  # of a weight that is there, but has no such expert
        raise unmatched(experts, {**experts, **own}, road.rename, road.offers, adapter.path, checkpoint.root)
    return replace(adapter, modules=modules, replacements=replacements, rows=rows), tuple(dict.fromkeys(left))


def _reasons(targets: Mapping[str, tuple[Target, ...]]) -> list[str]:
    """Why targets are what they are, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, target in ((name, target) for name, several in targets.items() for target in several):
        if target.why and name not in by_reason.setdefault(target.why, []):
            by_reason[target.why].append(name)
    return [
        f"{printable(names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


def _bias_targets(
    module: AdapterModule, road: _Road, tensors: Mapping[str, Matrix], adapter: Adapter, checkpoint: Checkpoint
) -> tuple[Target, ...]:
    own = f"{module.tensor.removesuffix('weight')}bias"
    name, slots = road.name(own), road.find(own)
    where = f"{printable(adapter.name)}: {printable(module.name)} has a lora_bias"
    if not slots:
        raise UnmatchedAdapterError(
            f"{where}, but the base has no {printable(name)} to add it to",
            unmatched=[name],
            nearest={name: nearest_names(name, tensors.keys())},
            hint="nothing was changed; the module there is none that takes a bias"
            if checkpoint.live
            else "nothing was written; no field of config.json is known that gives the model this bias, so that it would be loaded:"
            " `lorafold.merge_into(model, …)` gives it to a model in memory",
        )
    found = [tensors[slot.tensor] for slot in slots]
    for slot, info in zip(slots, found, strict=True):
        check_mergeable(info, slot.tensor, checkpoint)
    bias = module.lora_bias
    if bias is None or any(len(info.shape) != 1 for info in found) or shape_of(slots, tensors) != bias.shape:
        shown = ", ".join(f"{printable(slot.tensor)} is {list(info.shape)}" for slot, info in zip(slots, found, strict=True))
        raise ShapeMismatchError(f"{where} of {module.lora_B.shape[0]} numbers, but {shown}")
    return bias_targets(slots, tensors)
