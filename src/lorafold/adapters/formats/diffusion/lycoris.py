"""LyCORIS: what a layer of a network was given, LoRA, LoCon with a core tensor, LoHa, LoKr or whole differences, one kind a module.

A single file with kohya's names of modules (`lora_unet_…`, `lycoris_…`) or dotted ones; the endings say the kind. On disk the
factor is always alpha / dim: LyCORIS multiplies its rank-stabilised one and its trained scalar in when it saves
(`lycoris/modules`). Its own merge has the factor twice for LoHa and LoKr; what a layer computes, and so this reader, has it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ....errors import AdapterError, printable
from ....files.expression import Zeros
from ....files.safetensors.info import Header
from ...adapter import Adapter, AdapterModule, Rule, Scaling
from ...source import Source
from ..peft.hadamard import own_names
from ..single_file import (
    Parts,
    check_floats,
    check_shape,
    gather,
    missing_among,
    open_one,
    read_alphas,
    scaling_of,
    settle_alphas,
    single_file,
    some,
    tensor_file,
)
from .algebra import AS_IT_IS, WHOLE, FactorPair, hadamard, kronecker, pair, tucker_pair, whole
from .kohya import settle_split, split_modules
from .names import LYCORIS, REFUSED, of_lycoris
from .rotating import read_flags, transform_of


@dataclass(frozen=True)
class _Kind:
    """One way to change a layer: the parts that it needs and may have, and what they make."""

    name: str
    needs: frozenset[str]
    build: Callable[[Parts, str], FactorPair]
    scaled: bool = True


def _kinds() -> Iterator[_Kind]:
    yield _Kind("LoRA", frozenset({"lora_down", "lora_up"}), pair)
    yield _Kind("LoCon with lora_mid", frozenset({"lora_down", "lora_up", "lora_mid"}), tucker_pair)
    factors = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    yield _Kind("LoHa", frozenset(factors), hadamard)
    yield _Kind("LoHa with core tensors", frozenset(factors | {"hada_t1", "hada_t2"}), hadamard)
    for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}):
        for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}):
            yield _Kind("LoKr", frozenset(one | two), kronecker, scaled=one | two != {"lokr_w1", "lokr_w2"})
    yield _Kind("a whole difference", frozenset({"diff"}), lambda parts, shown: whole(parts["diff"], shown), scaled=False)
    yield _Kind("OFT or BOFT", frozenset({"oft_blocks"}), _nothing, scaled=False)
    yield _Kind("OFT or BOFT with a scale", frozenset({"oft_blocks", "rescale"}), _nothing, scaled=False)
    yield _Kind("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), _nothing)
    yield _Kind("IA³", frozenset({"ia3", "on_input"}), _nothing, scaled=False)
    yield _Kind("a norm", frozenset({"w_norm"}), lambda parts, shown: _norm(parts, "w_norm", shown), scaled=False)


def _multiplies(header: Header) -> bool:
    """Whether some of its tensors are IA³'s, whose numbers end in nothing but `.weight`."""
    return any(name.endswith(".on_input") for name in header.tensors)


def _nothing(parts: Parts, shown: str) -> FactorPair:
    """Zeros in the place of factors, of no shape as long as the weight is not known."""
    dim = parts["a2"].shape[0] if "a2" in parts and parts["a2"].shape else None
    return FactorPair(Zeros((1, 1)), Zeros((1, 1)), dim)


_KINDS = {kind.needs: kind for kind in _kinds()}
_BESIDE = frozenset({"alpha", "dora_scale", "diff_b", "b_norm", "diff_m", "set_weight"})
_ALONE = frozenset({"diff_b", "diff_m", "set_weight"})
"""What may also be all that there is of a module."""


def is_lycoris(source: Source) -> bool:
    """Whether it is one file of tensors, some of which only LyCORIS writes."""
    name = tensor_file(source)
    return name is not None and of_lycoris(source.header(name).tensors) and not own_names(source.header(name).tensors)


def load_lycoris(source: Source) -> Adapter:
    """The adapter in the one file of `source`.

    Raises `AdapterError` where tensors are missing, do not fit each other or are not known, and where the factor cannot be told;
    `UnsupportedAdapterError` for a kind that cannot be merged.
    """
    header = open_one(source)
    shown = printable(str(header.path))
    if own_names(header.tensors):
        raise AdapterError(
            f"{shown} is a LoHa or LoKr of PEFT's, whose alpha is in the adapter_config.json beside it",
            hint="nothing was written; give the folder of both: `ReadOptions(format='peft')`",
        )
    endings = {ending: part for ending, part in LYCORIS.items() if part != "ia3" or _multiplies(header)}
    gathered = gather(header, endings, REFUSED)
    alone = {module: parts for module, parts in gathered.items() if parts.keys() <= _ALONE}
    for module, parts in alone.items():
        check_floats(parts, f"{shown}: {printable(module)}")
    everything, gathered = gathered, {module: parts for module, parts in gathered.items() if module not in alone}
    kinds = {module: _kind(parts, f"{shown}: {printable(module)}") for module, parts in gathered.items()}
    built = {module: kinds[module].build(parts, f"{shown}: {printable(module)}") for module, parts in gathered.items()}
    scaled = [module for module in gathered if kinds[module].scaled]
    alphas, notes = settle_alphas(read_alphas(header, gathered), scaled, source.options.lora_alpha, shown)
    read = read_alphas(header, gathered)
    scalings = {
        module: scaling_of(each.dim, *alphas[module]) if each.dim is not None and module in alphas else _once(kinds[module], each)
        for module, each in built.items()
    }
    scalings = settle_split(scalings, alphas, split_modules(header, gathered), source.options.split_qkv, header)
    inputs = read_flags(header, gathered)
    axis = _axis(gathered, built, shown)
    modules: dict[str, AdapterModule] = {}
    for module, parts in gathered.items():
        factors = built[module]
        magnitude = parts.get("dora_scale")
        transform = transform_of(
            parts, scalings[module], read.get(module, 0.0), inputs.get(module, False), f"{shown}: {printable(module)}"
        )
        modules[module] = AdapterModule(
            module,
            factors.lora_A,
            factors.lora_B,
            scalings[module] if transform is None else Scaling(1.0, 1, 1.0, f"{transform.kind}, computed and rounded once"),
            magnitude=magnitude,
            magnitude_axis=axis if magnitude else 0,
            rule=_rule(parts),
            transform=transform,
            product=factors.product,
        )
    replacements = {}
    for module, parts in everything.items():
        for part, parameter in (("diff_b", "bias"), ("b_norm", "bias"), ("diff_m", "modulation")):
            if part in parts:
                where = f"{shown}: {printable(module)}"
                added = _norm(parts, part, where) if parameter == "bias" else whole(parts[part], where)
                A, B = added.lora_A, added.lora_B
                modules[f"{module}.{part}"] = AdapterModule(f"{module}.{part}", A, B, WHOLE, tensor=f"{module}.{parameter}")
        if "set_weight" in parts:
            replacements[f"{module}.weight"] = parts["set_weight"]
    if alone:
        what = sorted({part for parts in alone.values() for part in parts})
        notes = (*notes, f"{len(alone)} modules have {', '.join(what)} alone, and nothing for their weight: {some(alone)}")
    notes = (*notes, *_notes(gathered, axis))
    return single_file(source, header, modules, "lycoris", notes=notes, replacements=replacements)


def _kind(parts: Parts, shown: str) -> _Kind:
    """What `parts` are; an error where they are no one kind, or not all of it."""
    own = frozenset(parts) - _BESIDE
    kind = _KINDS.get(own)
    if not own:
        raise AdapterError(
            f"{shown} has {some(sorted(info.name for info in parts.values()))}, but nothing to go with it",
            hint="the file is not complete; nothing was written",
        )
    if kind is None:
        near = min(_KINDS.values(), key=lambda each: (len(each.needs ^ own), len(each.needs)))
        lack, extra = sorted(near.needs - own), sorted(own - near.needs)
        words = [f"no {', '.join(lack)}"] if lack else []
        words += [f"{', '.join(extra)} beside it"] if extra else []
        raise AdapterError(
            f"{shown} has {', '.join(sorted(parts))}: {near.name}, but with {' and '.join(words)}",
            hint="the file is not complete, or was put together from two; nothing was written",
        )
    check_floats(parts, shown)
    misplaced = {"b_norm": "w_norm" not in own, "diff_b": "w_norm" in own, "dora_scale": not kind.needs - {"diff", "w_norm"}}
    for part, wrong in misplaced.items():
        if part in parts and wrong:
            raise AdapterError(f"{shown} has {part} beside {', '.join(sorted(own))}, which do not go together")
    return kind


def _once(kind: _Kind, factors: FactorPair) -> Scaling:
    why = "both factors are whole, so there is none" if kind.name == "LoKr" else AS_IT_IS
    return Scaling(1.0, factors.lora_A.shape[0], float(factors.lora_A.shape[0]), why)


def _norm(parts: Parts, part: str, shown: str) -> FactorPair:
    check_shape(parts[part], "a vector", len(parts[part].shape) == 1, shown)
    return whole(parts[part], shown)


def _rule(parts: Parts) -> Rule:
    return "lycoris" if "dora_scale" in parts else "peft"


def _axis(gathered: Mapping[str, Parts], built: Mapping[str, FactorPair], shown: str) -> int:
    """0 where the scales of DoRA are of outputs, (out, 1, …), 1 where of inputs, (1, in, 1, …): one network has one of the two."""
    axes: dict[int, str] = {}
    for module, parts in gathered.items():
        info = parts.get("dora_scale")
        if info is None:
            continue
        A, B = built[module].lora_A, built[module].lora_B
        long = [dim for dim, size in enumerate(info.shape) if size != 1]
        axis = long[0] if long else 0
        sizes = (B.shape[0], A.shape[1])
        fits = len(long) <= 1 and axis in (0, 1) and (info.numel == sizes[axis] or (axis == 1 and sizes[1] % info.numel == 0))
        expected = f"({sizes[0]}, 1, …), or one for each of the inputs, (1, {sizes[1]}, 1, …)"
        check_shape(info, expected, fits, f"{shown}: {printable(module)}")
        if info.numel > 1:
            axes.setdefault(axis, module)
    if len(axes) > 1:
        raise AdapterError(
            f"{shown}: dora_scale of {printable(axes[0])} is of its outputs and that of {printable(axes[1])} of its inputs",
            hint="LyCORIS trains a whole network with one of the two; nothing was written",
        )
    return next(iter(axes), 0)


def _notes(gathered: Mapping[str, Parts], axis: int) -> Iterator[str]:
    for part, among in (("dora_scale", "alpha"), ("diff_b", "diff"), ("b_norm", "w_norm")):
        have, lack = missing_among(gathered, part, among)
        if have and lack:
            yield f"{len(lack)} of {len(have) + len(lack)} modules with {among} have no {part}, which the others have: {some(lack)}"
    if axis == 1:
        yield "dora_scale is of the inputs of each layer, as older versions of LyCORIS trained it"
