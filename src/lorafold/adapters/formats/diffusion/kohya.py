"""kohya's single file (sd-scripts): `<module>.lora_down.weight`, `<module>.lora_up.weight`, `<module>.alpha`.

A module's name is that of a part of the pipeline and its path there, every dot an underscore: `lora_unet_down_blocks_0_…`. What
it was cannot be read from it, as names have underscores of their own; `resolve` finds it among the names of the base. The factor
is alpha / dim, dim being the rows of lora_down (`networks/lora.py`).
"""

from __future__ import annotations

from ....errors import AdapterError, printable
from ...adapter import Adapter, AdapterModule
from ...source import Source
from ..scales import scaling_of, settle_alphas
from ..single_file import check_floats, gather, open_one, read_alphas, single_file, some, tensor_file
from .algebra import pair
from .qkv import settle_split, split_modules
from .suffixes import KOHYA, of_lycoris, underscored


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
    scalings = settle_split(scalings, alphas, split_modules(header, gathered), source.options.split_qkv, shown)
    modules = {module: AdapterModule(module, each.lora_A, each.lora_B, scalings[module]) for module, each in pairs.items()}
    return single_file(source, header, modules, "kohya", notes=notes)
