"""From a checkpoint and adapters to a plan: every adapter tensor used exactly once, or an error before anything is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ..adapters.adapter import Adapter, AdapterModule, Residual, WeightedAdapter
from ..adapters.formats.diffusion.names import PIPELINE
from ..adapters.transform import Transform
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.receipt import receipt_of
from ..errors import SHOWN, AlreadyMergedError, CheckpointError, InputError, PlanError, UnsupportedAdapterError, printable
from ..files import strictjson
from ..options import DTYPES, MatchOptions, SumOptions
from .accounting import check_attention, left_out
from .biases import lacking, with_zeros, without_zeros, zero_steps
from .decomposition import decomposition_notes
from .gguf_files import check_gguf_options
from .output_files import lay_out, metadata_notes
from .output_format import written_as
from .plan import Addend, MergePlan, NewRows, PlannedAdapter, PlannedOriginal, Step
from .quantised_names import trained_notes
from .quantised_training import trained_against
from .replication import replicated
from .resolve import Resolution, resolve
from .targets import Target
from .tied import untie
from .ties import find_ties

_CASTABLE = tuple(DTYPES.values())


def make_plan(
    checkpoint: Checkpoint,
    adapters: Sequence[WeightedAdapter],
    options: SumOptions | None = None,
    match: MatchOptions | None = None,
) -> MergePlan:
    """The merge of `adapters` into `checkpoint`: what is computed as `options` say, what must find a place as `match` says.

    Raises `InputError` of the kind that fits where an adapter cannot be merged whole; `AlreadyMergedError`.
    """
    options, match = options or SumOptions(), match or MatchOptions()
    checkpoint, trained = trained_against(checkpoint, options)
    original = checkpoint.original
    _check(adapters)
    _check_base(checkpoint, adapters, merge_again=match.merge_again)
    bases = [base_note(weighted.adapter, checkpoint, strict=match.strict_base) for weighted in adapters]
    origins, layer_fields, layer_notes = replicated(checkpoint, adapters)
    longer = checkpoint if not layer_notes else replace(checkpoint, tensors={n: checkpoint.tensors[o] for n, o in origins.items()})
    absent = lacking(longer, adapters)
    longer = with_zeros(longer, absent)
    ties = find_ties(checkpoint, options.tied_head)
    resolutions = [resolve(weighted.adapter, longer, ties, allow_partial=match.allow_partial) for weighted in adapters]
    steps = {n: Step(n, "copy", longer.tensors[n].dtype, longer.tensors[n].shape, source=o) for n, o in origins.items()}
    steps |= zero_steps(longer, absent)
    for name, source in ties.aliases.items():  # planned as if stored; taken out again where the tie holds
        steps[name] = replace(steps[source], tensor=name)
    for i, (weighted, resolution) in enumerate(zip(adapters, resolutions, strict=True)):
        _add(steps, i, weighted, resolution)
    steps, biases, bias_notes = without_zeros(steps, absent, live=checkpoint.live)
    steps, config, notes = untie(steps, ties, adapters, checkpoint)
    steps = {name: _with_dtype(step, options.dtype, checkpoint) for name, step in steps.items()}
    written = written_as(steps, checkpoint, options)
    steps, dtype = dict(written.steps), options.dtype or options.float_format
    fields = layer_fields | biases | config | ({} if dtype is None else _dtype_field(checkpoint, dtype)) | dict(written.config)
    if checkpoint.gguf is not None:
        check_gguf_options(options)
        fields = {}  # there is no configuration
    if options.only_changed:
        steps = {name: step for name, step in steps.items() if step.action != "copy"}
        if layer_notes:
            raise PlanError(
                "an output of changed tensors alone cannot say which layers the model is made of (layer_replication)",
                hint="write the whole checkpoint, without `only_changed=True`",
            )
        if changed := [*fields, *written.dropped]:
            raise PlanError(
                f"{', '.join(changed)} of config.json would change, and an output of changed tensors alone has none",
                hint="write the whole checkpoint, without `only_changed=True`",
            )
    shards = lay_out(steps, checkpoint, options.max_shard_size)
    return MergePlan(
        base=str(checkpoint.root if not checkpoint.single_file else checkpoint.shards[0].path),
        fingerprint=fingerprint(checkpoint),
        adapters=tuple(_planned(weighted, resolution) for weighted, resolution in zip(adapters, resolutions, strict=True)),
        options=options,
        shards=shards,
        config=fields,
        notes=(
            *(note for weighted in adapters for note in weighted.adapter.notes),
            *(note for resolution in resolutions for note in resolution.notes),
            *layer_notes,
            *bias_notes,
            *notes,
            *trained,
            *written.notes,
            *_orders(steps),
            *decomposition_notes(steps.values()),
            *metadata_notes(shards, checkpoint, options.max_shard_size),
            *(note for note in bases if note is not None),
            *(note for weighted in adapters for note in trained_notes(weighted.adapter, checkpoint)),
            *(
                note
                for weighted, resolution in zip(adapters, resolutions, strict=True)
                for note in _left_out_notes(weighted.adapter.name, resolution.unmatched)
            ),
        ),
        unmatched=tuple(sorted(name for resolution in resolutions for name in resolution.unmatched)),
        dropped=written.dropped,
        files_dropped=written.files_dropped,
        original=None if original is None else PlannedOriginal(str(original.root), fingerprint(original)),
    )


def _left_out_notes(adapter: str, names: Sequence[str]) -> list[str]:
    """The first of what was left out of an adapter, and how many more; the plan lists them all."""
    words = f"left out of {printable(adapter)}, since the base has no place for it:"
    more = [f"{words} {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [*(f"{words} {printable(name)}" for name in names[:SHOWN]), *more]


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the names, sizes and headers of a checkpoint's files, hexadecimal: which tensors, not which numbers."""
    files = [[shard.name, shard.header.file_size, shard.header.sha256] for shard in checkpoint.shards]
    return hashlib.sha256(strictjson.canonical(files).encode()).hexdigest()


def _check(adapters: Sequence[WeightedAdapter]) -> None:
    if not adapters:
        raise PlanError("there is no adapter to merge")
    seen: dict[str, str] = {}
    for weighted in adapters:
        adapter, weight = weighted.adapter, weighted.adapter_weight
        if adapter.on_base is not None:
            raise PlanError(f"{printable(adapter.name)} leaves something to the base: on_base(adapter, base) comes before a plan")
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise PlanError(f"the weight of {printable(adapter.name)} must be a finite number, not {weight!r}")
        if adapter.sha256 in seen:
            raise PlanError(
                f"{printable(str(adapter.path))} and {printable(seen[adapter.sha256])} are the same adapter",
                hint="give it once, with the sum of the weights: adapter@1.5",
            )
        seen[adapter.sha256] = str(adapter.path)


def _check_base(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter], *, merge_again: bool) -> None:
    for name in checkpoint.tensors:
        if ".lora_A" in name or ".base_layer." in name:
            raise CheckpointError(
                f"{printable(str(checkpoint.root))} holds '{printable(name)}': a model saved with its adapter still attached",
                hint="save the plain base model (PEFT: model.unload(), then save_pretrained)",
            )
    receipt = receipt_of(checkpoint)
    if receipt is not None and receipt.options.only_changed:
        raise CheckpointError(
            f"{printable(str(checkpoint.root))} holds only the tensors that a merge changed: it is no whole model",
            hint="merge into the base that it was made from, with both adapters",
        )
    for weighted in adapters:
        for merged in receipt.adapters if receipt is not None else ():
            if merged.sha256 == weighted.adapter.sha256 and not merge_again:
                raise AlreadyMergedError(
                    f"{printable(weighted.adapter.name)} is in {printable(str(checkpoint.root))} already,"
                    f" with weight {merged.adapter_weight:g}: its receipt lists it",
                    hint="merge into the original base, or add `merge_again=True` if it is meant to count twice",
                )


def _add(steps: dict[str, Step], i: int, weighted: WeightedAdapter, resolution: Resolution) -> None:
    """Put the addends and replacements of adapter number `i` into `steps`."""
    adapter, weight = weighted.adapter, weighted.adapter_weight
    shown = printable(adapter.name)
    check_attention(adapter, resolution)
    for target_name, tensor in resolution.replacements.items():
        info, step = adapter.replacements[target_name], steps[tensor]
        if weight != 1.0 and adapter.format not in PIPELINE:  # where it is no update, and has no strength
            raise PlanError(
                f"{shown} replaces {printable(tensor)} as a whole, so its weight must be 1, not {weight:g}",
                hint="only LoRA updates can be weighted",
            )
        if step.action != "copy":
            raise PlanError(f"{printable(tensor)} is changed twice, the second time by {shown}, which replaces it as a whole")
        steps[tensor] = Step(tensor, "replace", step.dtype, info.shape, source=step.source, adapter=i, replacement=info.name)
    for target_name, tensor in resolution.rows.items():
        trained, step = adapter.rows[target_name], steps[tensor]
        if weight != 1.0:
            raise PlanError(f"{shown} replaces rows of {printable(tensor)}, so its weight must be 1, not {weight:g}")
        taken = {index for new in step.rows for index in new.indices}
        if step.action not in ("copy", "rows") or taken & set(trained.indices):
            raise PlanError(f"{printable(tensor)} is changed twice, the second time by {shown}, which replaces rows of it")
        steps[tensor] = replace(step, action="rows", rows=(*step.rows, NewRows(i, trained.values.name, trained.indices)))
    parts = [(name, "weight", target) for name, several in resolution.targets.items() for target in several]
    parts += [(name, "bias", target) for name, several in resolution.biases.items() for target in several]
    for name, part, target in parts:
        module = adapter.modules[name]
        step, scaling = _dense(steps[target.tensor], module, part, shown), module.scaling
        if (step.replacement is not None and step.adapter != i) or step.rows or _overlap(step, i, target):
            raise PlanError(f"{printable(target.tensor)} is changed twice, the second time by {printable(name)} of {shown}")
        if not math.isfinite(scaling.value * weight):
            raise PlanError(f"{printable(name)} of {shown}: its scaling {scaling.value:g} times weight {weight:g} is not finite")
        transform = adapter.modules[name].transform if part == "weight" else None
        _check_order(step, transform, f"{printable(name)} of {shown}")
        dora = part == "weight" and adapter.modules[name].magnitude is not None
        residual = adapter.modules[name].residual if part == "weight" else None
        if residual is not None:
            _check_residual(step, target, residual, weight, f"{printable(name)} of {shown}")
        why = scaling.why + (f", times adapter_weight {weight:g}" if weight != 1.0 else "") + (", then DoRA" if dora else "")
        if residual is not None:
            taker = "the initial adapter" if residual.kind == "given" else residual.kind
            why += f", on what {taker} left of the weight"
        factor = scaling.value if dora else scaling.value * weight
        kind: Literal["weight", "bias"] = "weight" if part == "weight" else "bias"
        addend = Addend(
            i,
            name,
            kind,
            target.transposed,
            factor,
            why,
            weight if dora else None,
            rows=target.rows,
            section=target.section,
            residual=None if residual is None else residual.kind,
            stored=adapter.modules[name].stored_names(kind),
            transform=None if transform is None else transform.kind,
        )
        steps[target.tensor] = replace(step, action="merge", addends=(*step.addends, addend))


def _dense(step: Step, module: AdapterModule, part: str, shown: str) -> Step:
    """`step` with the dense weight of a convolution in groups, where `module` needs that for its weight."""
    if module.groups == 1 or part == "bias":
        return step
    if step.replacement is not None or step.groups not in (1, module.groups):
        raise PlanError(f"{printable(step.tensor)} is changed twice, the second time by {printable(module.name)} of {shown}")
    return replace(step, shape=module.shape, groups=module.groups)


def _check_order(step: Step, transform: Transform | None, shown: str) -> None:
    """Raises where more than one change is made to the tensor of `step`, and one of them is no sum."""
    kinds = [addend.transform for addend in step.addends] + [None if transform is None else transform.kind]
    if len(kinds) > 1 and any(kinds):
        raise PlanError(
            f"{printable(step.tensor)} is changed twice, the second time by {shown}, and {next(filter(None, kinds))} is no sum",
            hint="the order counts: merge the first, and the other into the result",
        )


def _check_residual(step: Step, target: Target, residual: Residual, weight: float, shown: str) -> None:
    """Raises where the tensor of `step` cannot be replaced by what is left of it."""
    tensor = printable(target.tensor)
    if weight != 1.0:
        raise PlanError(
            f"{shown} was trained on what {residual.kind} left of {tensor}, so its weight must be 1, not {weight:g}",
            hint="only what is added can be weighted; save the adapter as plain LoRA with PEFT to weight it",
        )
    if any(addend.residual is not None for addend in step.addends):
        raise PlanError(f"{tensor} is changed twice, the second time by {shown}, which was trained on a residual of it")
    if target.rows is not None or target.section is not None or (target.transposed and residual.kind not in ("pissa", "given")):
        raise UnsupportedAdapterError(
            f"{shown} was trained on what {residual.kind} left of a weight that {tensor} does not hold as it is",
            hint="nothing was written; merge into a checkpoint that stores this weight as one tensor, (out, in)",
        )


def _overlap(step: Step, adapter: int, target: Target) -> bool:
    """Whether adapter number `adapter` is added to some of the rows of `target` already."""
    return any(
        addend.adapter == adapter
        and (addend.rows is None or target.rows is None or (addend.rows[0] < target.rows[1] and target.rows[0] < addend.rows[1]))
        for addend in step.addends
    )


def _orders(steps: Mapping[str, Step]) -> list[str]:
    """A note where the order of the adapters changes a sum."""
    found = [step for step in steps.values() if len(step.addends) > 1 and any(a.dora is not None for a in step.addends)]
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [f"{printable(found[0].tensor)}{more}: DoRA rescales what the adapters before it made, so their order counts: as given"]


def _with_dtype(step: Step, dtype: str | None, checkpoint: Checkpoint) -> Step:
    if dtype is None or step.dtype not in _CASTABLE or step.dtype == dtype or step.source in checkpoint.encoded:
        return step
    if checkpoint.gguf is not None and len(step.shape) < 2:
        return step  # llama.cpp computes with vectors in float32
    return replace(step, dtype=dtype, action="cast" if step.action == "copy" else step.action)


def _dtype_field(checkpoint: Checkpoint, dtype: str) -> dict[str, str]:
    """The field of config.json that states the dtype: `dtype`, or `torch_dtype` where the base has that."""
    name = next(name for name, stored in DTYPES.items() if stored == dtype)
    return {"torch_dtype" if "torch_dtype" in (checkpoint.config or {}) else "dtype": name}


def _planned(weighted: WeightedAdapter, resolution: Resolution) -> PlannedAdapter:
    adapter = weighted.adapter
    if not adapter.tensor_names:
        raise InputError(f"{printable(str(adapter.path))} holds nothing to merge")
    return PlannedAdapter(
        adapter.name,
        str(adapter.path),
        adapter.sha256,
        weighted.adapter_weight,
        adapter.format,
        adapter.base_model,
        left_out(adapter, resolution),
    )


def base_note(adapter: Adapter, checkpoint: Checkpoint, *, strict: bool = False) -> str | None:
    """A note where `adapter` names another base than `checkpoint`; None where the names agree, or one of the two has none.

    Names agree where their last parts do: an adapter says ``org/name`` or a path on the machine where it was trained. A folder's
    name can agree, but says nothing where it does not.

    Raises `CheckpointError` with `strict`, unless the names are there and agree.
    """
    stated = (checkpoint.config or {}).get("_name_or_path")
    folder = checkpoint.root.resolve().name
    known = [name for name in (checkpoint.name, stated) if isinstance(name, str) and name and name != folder]
    if adapter.base_model is not None and _last(adapter.base_model) in {_last(name) for name in (*known, folder)}:
        return None
    wanted = "names no base model" if adapter.base_model is None else f"was trained on '{printable(adapter.base_model)}'"
    note = f"the adapter {printable(adapter.name)} {wanted}; the base is {printable((known or [folder])[0])}"
    if strict:
        raise CheckpointError(note, hint="nothing was written; give the adapter's own base, or leave out `strict_base=True`")
    return note if known and adapter.base_model is not None else None


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
