"""kohya's single file (sd-scripts): `<module>.lora_down.weight`, `<module>.lora_up.weight`, `<module>.alpha`.

A module's name is a part of the pipeline and its path there, dots being underscores: `lora_unet_down_blocks_0_…`; `resolve` finds
it among the names of the base. The factor is alpha / dim, dim being the rows of lora_down (`networks/lora.py`).

sd-scripts trains the parts of FLUX's `qkv` and `linear1` apart, each at alpha / dim, and saves them as one pair: lora_down stacked,
(n · dim, in), lora_up block-sparse, alpha as it was (`networks/lora_flux.py`, `split_qkv`). Readers that divide alpha by the rows
of lora_down, as most do, make it n times too weak. musubi-tuner's converters for ComfyUI (Z-Image, HunyuanVideo 1.5) save them
so with alpha already times 3. Which of the two a file is shows where its metadata has the alpha of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ....errors import AdapterError, printable
from ....files.safetensors.info import Header, TensorInfo
from ....files.safetensors.reader import TensorFile
from ...adapter import Adapter, AdapterModule, Scaling
from ...read_options import SplitScale
from ...source import Source
from ..single_file import (
    Alphas,
    Parts,
    check_floats,
    gather,
    open_one,
    read_alphas,
    scaling_of,
    settle_alphas,
    single_file,
    some,
    tensor_file,
)
from .algebra import pair
from .names import KOHYA, of_lycoris, underscored


def is_kohya(source: Source) -> bool:
    """Whether it is one file of tensors with kohya's names of modules, and none that only LyCORIS writes."""
    name = tensor_file(source)
    names = source.header(name).tensors if name is not None else {}
    return any(underscored(each) for each in names) and not of_lycoris(names)


def load_kohya(source: Source) -> Adapter:
    """The adapter in the one file of `source`.

    Raises `AdapterError` where tensors are missing, do not fit each other or are not known, and where the factor cannot be told.
    """
    header = open_one(source)
    shown = printable(str(header.path))
    gathered = gather(header, KOHYA, {})
    pairs = {}
    for module, parts in gathered.items():
        where = f"{shown}: {printable(module)}"
        for lack in ("lora_down", "lora_up"):
            if lack not in parts:
                held = some(sorted(info.name for info in parts.values()))
                raise AdapterError(f"{where} has {held} but no {lack}", hint="the file is not complete; nothing was written")
        check_floats(parts, where)
        pairs[module] = pair(parts, where)
    alphas, notes = settle_alphas(read_alphas(header, gathered), gathered, source.options.lora_alpha, shown)
    scalings = {module: scaling_of(each.lora_A.shape[0], *alphas[module]) for module, each in pairs.items()}
    scalings = settle_split(scalings, alphas, split_modules(header, gathered), source.options.split_qkv, header)
    modules = {module: AdapterModule(module, each.lora_A, each.lora_B, scalings[module]) for module, each in pairs.items()}
    return single_file(source, header, modules, "kohya", notes=notes)


_COUNTS = (4, 3)  # q, k, v and the MLP's input in `linear1`; q, k and v


def split_modules(header: Header, modules: Mapping[str, Parts]) -> dict[str, int]:
    """How many parts lora_up has in each module where it is block-sparse."""
    found = {}
    with TensorFile(header) as file:
        for name, parts in modules.items():
            up = parts.get("lora_up")
            if up is not None and len(up.shape) >= 2 and (count := _count(up, file)):
                found[name] = count
    return found


def settle_split(
    scalings: Mapping[str, Scaling], alphas: Alphas, split: Mapping[str, int], wanted: SplitScale | None, header: Header
) -> dict[str, Scaling]:
    """The factors as they are `wanted` where lora_up is block-sparse; without an alpha, or with 0, they are 1 either way.

    Where it is not said, the metadata's alpha of the training tells: a stored alpha that is the same is of each part, one that is
    as many times as large as there are parts is of the whole.

    Raises `AdapterError` where that is not told and makes a difference.
    """
    changed = {}
    trained = _number(header.metadata.get("ss_network_alpha"))
    asked: list[str] = []
    for name, parts in split.items():
        scaling, alpha = scalings[name], alphas[name][0]
        if not alpha:
            continue
        dim = scaling.r // parts
        each = f"alpha {alpha:g} / dim {dim} of each of {parts} parts, lora_up being block-sparse"
        apart = Scaling(scaling.value * parts, scaling.r, scaling.lora_alpha, each)
        whole = replace(scaling, why=f"{scaling.why} of all {parts} parts of a block-sparse lora_up")
        if wanted is None and header.metadata.get(ALPHA_IS) == AS_STORED:
            changed[name] = replace(whole, why=f"{whole.why}, as {ALPHA_IS} says")
        elif wanted is None and trained in (alpha, alpha / parts):
            told = "ss_network_alpha is the same" if trained == alpha else f"ss_network_alpha is {trained:g}"
            chosen = apart if trained == alpha else whole
            changed[name] = replace(chosen, why=f"{chosen.why}, as {told}")
        elif wanted is None:
            asked.append(name)
            changed[name] = apart
        else:
            changed[name] = apart if wanted == "trained" else scaling
    if asked:
        name = asked[0]
        raise AdapterError(
            f"{printable(str(header.path))}: lora_up is block-sparse in {len(asked)} modules: {some(asked)}. sd-scripts trains such"
            f" parts (FLUX) at alpha / dim each and saves alpha as it was, so that the factor of {printable(name)} is"
            f" {changed[name].value:g} as it was trained; musubi-tuner's converters for ComfyUI (Z-Image, HunyuanVideo 1.5) save an"
            f" alpha for all rows of lora_down, so that it is {scalings[name].value:g} as it is stored. The metadata has no"
            " ss_network_alpha that tells which",
            hint="say which is wanted: `ReadOptions(split_qkv='trained')` or `ReadOptions(split_qkv='stored')`",
        )
    return {**scalings, **changed}


ALPHA_IS, AS_STORED = "lorafold.alpha", "stored"
"""What the metadata of a file says whose alphas are for all rows of lora_down, block-sparse or not: those that are written here."""


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _count(up: TensorInfo, file: TensorFile) -> int:
    """How many blocks `up` (out, r) has down its diagonal, with zeros beside them; 0 where it is not so."""
    for count in _COUNTS:
        if up.shape[1] % count or up.shape[0] < count:
            continue
        width = up.shape[1] // count
        first, last = (file.read_rows(up, row, 1).reshape(-1) for row in (0, up.shape[0] - 1))
        if first[width:].any() or last[:-width].any() or not (first.any() and last.any()):
            continue
        if _descends(file.read(up).reshape(up.shape[:2]), width):
            return count
    return 0


def _descends(up: Tensor, width: int) -> bool:
    """Whether each row has numbers in one block of `width` columns alone, the further right the lower it is, and all have some."""
    used = up.reshape(up.shape[0], -1, width).ne(0).any(dim=2)  # (out, blocks)
    rows = used[used.any(dim=1)]
    place = rows.int().argmax(dim=1)
    return bool((rows.sum(dim=1) == 1).all() and (place.diff() >= 0).all() and used.any(dim=0).all())
