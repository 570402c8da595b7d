"""What becomes of the quantised weights of a base: floats, all of them, or the base's own codes, of those that adapters change.

Each asks for steps of its own. Floats: every such weight is decoded, and what says how the base is quantised goes from its
configuration. The same encoding: codes are written anew where adapters add to them, and all else is copied, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.encodings.encoded import Encoded
from ..checkpoints.quantised import quantisation_of, refusal
from ..errors import CheckpointError, PlanError, UnsupportedAdapterError, printable
from ..files.safetensors.info import BITS, TensorInfo
from ..options import DTYPES, SumOptions
from ..text import plural, size
from .from_original import check_original, original_notes
from .plan import Addend, Coded, Step
from .replacements import MERGEABLE


@dataclass(frozen=True)
class Written:
    """The steps of an output, the fields of config.json that it changes and drops, files that it leaves out, and notes."""

    steps: Mapping[str, Step]
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    files_dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def written_as(steps: Mapping[str, Step], checkpoint: Checkpoint, options: SumOptions) -> Written:
    """`steps`, which are those of a base of floats, as `options.output_format` has the quantised weights of `checkpoint`.

    Raises `PlanError` where it does not say what an output needs, `CheckpointError` for a base that cannot be decoded or written.
    """
    _check_config(checkpoint)
    changed = [step for step in steps.values() if step.source in checkpoint.encoded and step.action != "copy"]
    for step in changed:
        _check_residual(step, checkpoint)
    if checkpoint.original is not None:
        check_original(changed, checkpoint, options)
    if options.quantised_as is not None:
        return Written({name: _as_loaded(step, checkpoint, options) for name, step in steps.items()})
    if options.output_format is None:
        if changed:
            raise _unsaid(changed[0], checkpoint)
        return Written(_kept(steps, checkpoint))
    if options.dtype is not None:
        raise PlanError(
            f"`output_format='{options.output_format}'` and `dtype` were given: the first is for a quantised base, the second for"
            " one of floats",
            hint="leave out one of them",
        )
    if options.output_format == "same":
        if changed and (why := refusal(checkpoint)) is not None:
            raise CheckpointError(f"{printable(str(checkpoint.place))}: {why}", hint=f"nothing was written; {UNQUANTISED}")
        for step in changed:
            _check_writable(step, checkpoint)
        return Written(_kept(steps, checkpoint), notes=original_notes(checkpoint))
    return _as_floats(steps, checkpoint, options)


def _check_config(checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` where a configuration says that the weights are quantised, and all are floats."""
    said = checkpoint.quantisation
    if said is None or checkpoint.encoded or checkpoint.live:
        return
    if all(matrix.dtype in MERGEABLE for matrix in checkpoint.tensors.values() if len(matrix.shape) > 1):
        file, where = printable(said.file), printable(str(checkpoint.place))
        raise CheckpointError(
            f"{where}: {file} says that it is quantised ({printable(said.method)}), but no tensor is stored so",
            hint=f"nothing was written; where its weights are meant to be floats, take that out of {file}",
        )


def _check_residual(step: Step, checkpoint: Checkpoint) -> None:
    """Raises `UnsupportedAdapterError` for an adapter that was trained on what its start left of the weight."""
    addend = next((each for each in step.addends if each.residual is not None), None)
    if addend is not None:
        encoding = checkpoint.encoded[str(step.source)].encoding
        raise UnsupportedAdapterError(
            f"{printable(addend.module)} was trained on what {addend.residual} left of {printable(step.tensor)}, and nothing tells"
            f" whether that was quantised again ({printable(encoding)})",
            hint="nothing was written; save the adapter as plain LoRA with PEFT, or merge into the unquantised base",
        )


def _as_floats(steps: Mapping[str, Step], checkpoint: Checkpoint, options: SumOptions) -> Written:
    dtype, where = str(options.float_format), printable(str(checkpoint.place))
    why = refusal(checkpoint)
    if why is not None:
        raise CheckpointError(f"{where}: {why}", hint=f"nothing was written; {UNQUANTISED}")
    if not checkpoint.encoded:
        name = next(name for name, stored in DTYPES.items() if stored == dtype)
        method = quantisation_of(checkpoint)
        if method is None:
            raise PlanError(f"{where} is not quantised", hint=f"`dtype='{name}'` is the dtype of the output of a base of floats")
        raise CheckpointError(
            f"{where} is quantised ({printable(method)}), which is not decoded", hint=f"nothing was written; {UNQUANTISED}"
        )
    left = next((name for name, matrix in checkpoint.tensors.items() if matrix.dtype not in _PLAIN), None)
    if left is not None:
        matrix = checkpoint.tensors[left]
        raise CheckpointError(
            f"{printable(str(checkpoint.file_of(matrix)))}: tensor '{printable(left)}' is of type {printable(matrix.dtype)},"
            f" expected one of {', '.join(_PLAIN)}, or what its encoding has beside it",
            hint=f"nothing was written; {UNQUANTISED}",
        )
    found_steps = {name: _as_float(step, dtype, checkpoint) for name, step in steps.items()}
    quantisation = checkpoint.quantisation
    paths = () if quantisation is None else quantisation.paths
    files, aside = () if quantisation is None else quantisation.files, checkpoint.companions
    floats = sum(matrix.numel * BITS[dtype] // 8 for name, matrix in checkpoint.tensors.items() if name in checkpoint.encoded)
    notes = [
        f"{plural(len(checkpoint.encoded), 'quantised weight')} ({', '.join(encodings(checkpoint))}) written as"
        f" {options.output_format}: {size(_coded_bytes(checkpoint))} become {size(floats)}",
        *([f"left out, which mean nothing to floats: {_few(aside)}"] if aside else []),
        *([f"left out, which say how the base is quantised: {_few(files)}"] if files else []),
        AGAIN if checkpoint.gguf is None else AGAIN.replace(_BY_ENGINES, "llama-quantize"),
    ]
    return Written(found_steps, _dtypes_below(checkpoint.config or {}, dtype), paths, files, tuple(notes))


_BY_ENGINES = "load_in_4bit, engines that quantise when loading"
AGAIN = (
    f"serve it in 16 bits: whoever quantises this output to the base's own format again ({_BY_ENGINES}) lands on the base's codes,"
    " and loses most of the adapter"
)
"""What an output of floats must say."""

UNQUANTISED = "merge into the unquantised base, or transformers' model.dequantize() may make one"

_PLAIN = ("F64", "F32", "F16", "BF16", "BOOL", "I64", "I32", "I16", "U64", "U32", "U16")
"""Types of tensors that an output of floats may have as they are: bytes are nearly always codes of something."""


def encodings(checkpoint: Checkpoint) -> list[str]:
    """The encodings of the base, each once."""
    return list(dict.fromkeys(each.encoding for each in checkpoint.encoded.values()))


def _as_float(step: Step, dtype: str, checkpoint: Checkpoint) -> Step:
    encoded = checkpoint.encoded.get(step.source or "")
    if encoded is None:
        return step
    coded = None if step.replacement is not None else _coded(encoded, checkpoint)
    return replace(step, action="cast" if step.action == "copy" else step.action, dtype=dtype, coded=coded)


def _as_loaded(step: Step, checkpoint: Checkpoint, options: SumOptions) -> Step:
    """`step` for a weight of floats that training quantised: what became of it is written in the type that it is stored in."""
    encoded = checkpoint.encoded.get(step.source or "")
    if encoded is None:
        return step
    coded = None if step.replacement is not None else _coded(encoded, checkpoint)
    dtype = options.dtype or checkpoint.stored[str(step.source)].dtype
    return replace(step, action="cast" if step.action == "copy" else step.action, dtype=dtype, coded=coded)


def _coded(encoded: Encoded, checkpoint: Checkpoint) -> Coded:
    nbytes = sum(checkpoint.stored[name].nbytes for name in encoded.stored)
    return Coded(encoded.encoding, nbytes, encoded.natural.shape, encoded.together)


def _coded_bytes(checkpoint: Checkpoint) -> int:
    names = {name for each in checkpoint.encoded.values() for name in each.stored}
    return sum(checkpoint.stored[name].nbytes for name in names)


def _dtypes_below(config: Mapping[str, Any], dtype: str, above: str = "") -> dict[str, str]:
    """The dtypes that the configurations of parts of the model state, by path, as they are now."""
    name = next(name for name, stored in DTYPES.items() if stored == dtype)
    found: dict[str, str] = {}
    for part, value in config.items():
        if isinstance(value, Mapping) and "." not in part and part not in ("quantization_config", "compression_config"):
            found |= {f"{above}{part}.{key}": name for key in ("dtype", "torch_dtype") if isinstance(value.get(key), str)}
            found |= _dtypes_below(value, dtype, f"{above}{part}.")
    return found


def _kept(steps: Mapping[str, Step], checkpoint: Checkpoint) -> dict[str, Step]:
    """`steps` with the stored tensors of each encoded weight in its place, in the order in which the base has them."""
    if not checkpoint.encoded:
        return dict(steps)
    stored = checkpoint.stored
    found: dict[str, Step] = {}
    for name, step in steps.items():
        encoded = checkpoint.encoded.get(step.source or "")
        if encoded is None:
            found[name] = step
            continue
        for i, source in enumerate(encoded.stored):
            called = _called(source, str(step.source), name)
            found[called] = _copy(stored[source], called)
            if i == 0 and step.action != "copy":
                coded, addends = _coded(encoded, checkpoint), step.addends
                if encoded.natural is not encoded.decoded:
                    addends = tuple(_exchanged(each, step) for each in addends)
                found[called] = replace(found[called], action="encode", source=step.source, addends=addends, coded=coded)
        if name != step.source:
            before = f"{str(step.source).rpartition('.')[0]}."
            beside = [each for each in checkpoint.companions if each.startswith(before)]
            found |= {called: _copy(stored[each], called) for each in beside for called in [_called(each, str(step.source), name)]}
    found |= {name: _copy(stored[name], name) for name in checkpoint.companions}
    order = {name: i for i, name in enumerate(stored)}
    return dict(sorted(found.items(), key=lambda each: order.get(each[0], len(order))))


def _copy(info: TensorInfo, called: str) -> Step:
    return Step(called, "copy", info.dtype, info.shape, source=info.name)


def _exchanged(addend: Addend, step: Step) -> Addend:
    """`addend` for a weight whose codes are stored with the last two dimensions exchanged, so that rows of a matrix are columns.

    Raises `UnsupportedAdapterError` where it is for some of these and rescales them, or has them the other way round.
    """
    rows, columns = step.shape[-2:]
    if addend.rows is None:
        return replace(addend, transposed=not addend.transposed)
    first, last = addend.rows[0] // rows, -(-addend.rows[1] // rows)  # of the matrices of a stack
    within = addend.rows[0] - first * rows, addend.rows[1] - first * rows
    whole = addend.rows[0] % rows == addend.rows[1] % rows == 0
    if not whole and (addend.dora is not None or last - first != 1 or addend.transposed):
        raise UnsupportedAdapterError(
            f"{printable(addend.module)} is for a part of {printable(step.tensor)}, whose codes are stored transposed, and"
            f" {'rescales that' if addend.dora is not None else 'has it the other way round'}",
            hint=f"nothing was written; {_FLOATS}",
        )
    several = None if len(step.shape) == 2 else (first * columns, last * columns)
    return replace(addend, transposed=not addend.transposed, rows=several, columns=None if whole else (*within, rows))


def _called(stored: str, weight: str, name: str) -> str:
    """What the tensor `stored` of `weight` is called where that is called `name`: as before, or for a layer that is a copy."""
    if name == weight:
        return stored
    before, after = weight.rpartition(".")[0], name.rpartition(".")[0]
    return f"{after}{stored.removeprefix(before)}"


def _check_writable(step: Step, checkpoint: Checkpoint) -> None:
    encoded = checkpoint.encoded[str(step.source)]
    shown = f"{printable(step.tensor)} ({printable(encoded.encoding)})"
    if encoded.encode is None:
        raise CheckpointError(f"{shown} is decoded, but not written", hint=f"nothing was written; {_FLOATS}")
    if step.action != "merge" or step.rows or step.replacement is not None:
        what = "rows of it" if step.rows else "it as a whole"
        raise UnsupportedAdapterError(f"{shown}: an adapter replaces {what}, which its scales do not fit", hint=_FLOATS)


_FLOATS = "`output_format='bf16'` writes floats"


def _unsaid(step: Step, checkpoint: Checkpoint) -> CheckpointError:
    """The error for a quantised base of which nobody said what becomes of it, with sizes and advice."""
    why = refusal(checkpoint)
    where = printable(str(checkpoint.place))
    if why is not None:
        return CheckpointError(f"{where}: {why}", hint=f"nothing was written; {UNQUANTISED}")
    encoded = checkpoint.encoded[str(step.source)]
    others = sum(matrix.nbytes for name, matrix in checkpoint.tensors.items() if name not in checkpoint.encoded)
    numel = sum(checkpoint.tensors[name].numel for name in checkpoint.encoded)
    few = any(each.bits < 8 for each in checkpoint.encoded.values())
    same = (
        "keeps codes and scales, with noise as large as a small adapter's effect on other texts"
        if few
        else "keeps the format that is served, codes rounded at random, and loses next to nothing of the adapter"
    )
    floats = f"`output_format='bf16'` ({size(others + 2 * numel)}) is the exact sum, rounded once, to be served in 16 bits"
    again = f"`output_format='same'` ({size(checkpoint.nbytes)}) {same}"
    if not all(each.encode is not None for each in checkpoint.encoded.values()):
        again = "this encoding cannot be written back"
    return CheckpointError(
        f"{where}: tensor '{printable(step.tensor)}' is quantised ({printable(encoded.encoding)}), and nothing says in which format"
        " the merged weights are to be written",
        hint=f"nothing was written; {'; '.join((floats, again) if few else (again, floats))}; fp16 and fp32 can be had too",
    )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
