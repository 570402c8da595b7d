"""One LoRA pair of PEFT's, in each of its variants, as a module: plain, DoRA, KaSA, BD-LoRA, QA-LoRA, and attention's two.

What the variants store is made `lora_A` (r, in, …) and `lora_B` (out, r, …) here. Formulas are those of PEFT's layers
(`tuners/lora/layer.py`, `tuners/lora/variants.py`), which their tests hold them to.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Cut, Diagonal, Joined, Matrix, Reshaped
from ....files.products import Times
from ....files.safetensors.info import TensorInfo
from ...adapter import AdapterModule, Scaling
from ..single_file import Parts, check_floats
from .config import Blocks, PeftConfig


def pair_of(
    name: str, parts: Parts, config: PeftConfig, weights: Path, *, dense_groups: bool = False, within: str | None = None
) -> AdapterModule:
    """The pair of the module `name`, made of `parts`; with `dense_groups` that of a convolution in groups for a dense one.

    `within`: the module by whose name PEFT looked up rank and alpha, where that is not its own: an attention, of its out_proj.

    Raises `AdapterError` where parts are missing, too many or do not fit each other.
    """
    shown = f"{printable(str(weights))}: {printable(name)}"
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for have, lack in ((first, second), (second, first)):
        if lack not in parts:
            raise AdapterError(f"{shown} has {have} but no {lack}", hint="the file is not complete; nothing was written")
    extra = parts.keys() - {first, second, "lora_B.bias", "lora_magnitude_vector", "lora_diag"}
    if extra or (embedding and "lora_B.bias" in parts):
        raise AdapterError(f"{shown} has {', '.join(sorted(parts))}, which is not one LoRA pair")
    check_floats(parts, shown)
    lora_A, lora_B, why = _factors(name, parts[first], parts[second], parts.get("lora_diag"), config, shown)
    groups = _groups(lora_A, lora_B)
    if dense_groups and groups > 1 and "lora_magnitude_vector" not in parts:
        lora_B, why = _dense(lora_B, groups), f"written as a dense convolution of what were {groups} groups"
    else:
        groups = 1
    _check_shapes(lora_A, lora_B, first, second, shown)
    lora_bias = parts.get("lora_B.bias")
    if lora_bias is not None and lora_bias.shape != (lora_B.shape[0],):
        raise AdapterError(f"{shown}: lora_B.bias must be [{lora_B.shape[0]}], found {list(lora_bias.shape)}")
    if not embedding and config.lora_bias != (lora_bias is not None):
        said, found = ("true", "is missing") if config.lora_bias else ("false", "is there")
        raise AdapterError(f"{shown}: lora_bias is {said}, but lora_B.bias {found}")
    magnitude = parts.get("lora_magnitude_vector")
    if config.use_dora != (magnitude is not None):
        said, found = ("true", "is missing") if config.use_dora else ("false", "is there")
        raise AdapterError(f"{shown}: use_dora is {said}, but lora_magnitude_vector {found}")
    if magnitude is not None and magnitude.numel != lora_B.shape[0]:
        raise AdapterError(f"{shown}: lora_magnitude_vector must hold {lora_B.shape[0]} numbers, found {list(magnitude.shape)}")
    scaling = config.scaling(within or name, lora_A.shape[0])
    if why:
        scaling = replace(scaling, why=f"{scaling.why}, {why}")
    residual = config.residual(scaling) if len(lora_A.shape) == 2 and not embedding else None
    return AdapterModule(name, lora_A, lora_B, scaling, embedding, lora_bias, magnitude, residual=residual, groups=groups)


def attention_output(module: AdapterModule, config: PeftConfig, given: Literal[1, 2] | None, weights: Path) -> AdapterModule:
    """`module`, the output projection of a MultiheadAttention, with the factor that it was trained with.

    PEFT adds its update twice, in the forward that trains and in the merge, up to 0.21.2 (huggingface/peft#3774); `given` by the
    user counts more.

    Raises `UnsupportedAdapterError` where the version is another, so that the factor is not known.
    """
    shown = f"{printable(str(weights))}: {printable(module.name)}"
    if module.lora_bias is not None:
        raise UnsupportedAdapterError(
            f"{shown} is attention's output projection with a lora_bias, which PEFT adds in another way than it trains in_proj's",
            hint="nothing was written",
        )
    if given is not None:
        factor, why = given, f"times {given} as given"
    else:
        version = _version(config.peft_version)
        if version is None:
            factor, why = 2, "times 2 as PEFT trained attention's out_proj (no peft_version)"
        elif version <= _TWICE:
            factor, why = 2, f"times 2 as PEFT {printable(str(config.peft_version))} trained attention's out_proj"
        else:
            raise UnsupportedAdapterError(
                f"{shown} is the output projection of a MultiheadAttention, trained by PEFT {printable(str(config.peft_version))}:"
                " PEFT up to 0.21.2 added its update twice, and whether this one did is not known",
                hint="nothing was written; `ReadOptions(out_proj_factor=…)` says how often it was added",
            )
    scaling = replace(module.scaling, value=module.scaling.value * factor, why=f"{module.scaling.why}, {why}")
    return replace(module, scaling=scaling)


_TWICE = (0, 21, 2)


def _version(text: str | None) -> tuple[int, ...] | None:
    """The numbers of a version; one in development counts as that to come.

    >>> _version("0.21.2"), _version("0.21.3.dev0@main"), _version(None)
    ((0, 21, 2), (0, 21, 3), None)
    """
    found = re.match(r"\d+(?:\.\d+)*", text or "")
    return None if found is None else tuple(int(part) for part in found[0].split("."))


def _factors(
    name: str, lora_A: TensorInfo, lora_B: TensorInfo, diagonal: TensorInfo | None, config: PeftConfig, shown: str
) -> tuple[Matrix, Matrix, str]:
    """lora_A and lora_B as plain LoRA has them, and what they were made of."""
    if (config.init == "kasa") != (diagonal is not None):
        said, found = ("is set", "is missing") if config.init == "kasa" else ("is not set", "is there")
        raise AdapterError(f"{shown}: kasa_config {said}, but lora_diag {found}")
    if diagonal is not None:
        if len(lora_A.shape) != 2 or diagonal.shape != lora_A.shape[:1]:
            raise AdapterError(f"{shown}: lora_diag must be [{lora_A.shape[0]}], found {list(diagonal.shape)}")
        return Times(lora_A, Reshaped(diagonal, (lora_A.shape[0], 1))), lora_B, "KaSA's lora_diag between B and A"
    if config.blocks is not None and len(lora_A.shape) == 2 == len(lora_B.shape):
        return _block_diagonal(name, lora_A, lora_B, config.blocks, shown)
    return lora_A, lora_B, ""


def _block_diagonal(name: str, lora_A: TensorInfo, lora_B: TensorInfo, blocks: Blocks, shown: str) -> tuple[Matrix, Matrix, str]:
    """BD-LoRA: of n blocks, stored one under the other, the factor is the matrix with the blocks down its diagonal."""
    count = blocks.count
    in_A, in_B = (any(part in name for part in parts) for parts in (blocks.in_A, blocks.in_B))
    if in_A and in_B:
        raise AdapterConfigError(f"{shown} is named by target_modules_bd_a and by target_modules_bd_b")
    stored = lora_A if in_A else lora_B
    if (in_A or in_B) and (not stored.shape or stored.shape[0] % count):
        raise AdapterError(f"{shown}: '{printable(stored.name)}' must hold {count} blocks, found {list(stored.shape)}")
    if in_A:
        return _expanded(lora_A, count), lora_B, f"lora_A of {count} blocks"
    if in_B:
        return lora_A, _expanded(lora_B, count), f"lora_B of {count} blocks"
    return lora_A, lora_B, ""


def _expanded(stored: TensorInfo, count: int) -> Matrix:
    each = stored.shape[0] // count
    return Diagonal(tuple(Cut(stored, 0, i * each, (i + 1) * each) for i in range(count)))


def pooled(module: AdapterModule, group: int, columns: int | None) -> AdapterModule:
    """`module` of QA-LoRA, whose lora_A is for inputs that were pooled in groups of `group`.

    Each pooled input is the mean of its group times the number of groups, so that ΔW[o, i] = s · (in / group) / group ·
    (B A)[o, i // group]. PEFT pools for the layers of GPTQ alone: where lora_A has all `columns` of the base weight, it is plain.

    Raises `UnsupportedAdapterError` for groups of one input, which look the same either way.
    """
    if len(module.lora_A.shape) != 2 or module.embedding or (group > 1 and columns == module.lora_A.shape[1]):
        return module
    if group == 1:
        raise UnsupportedAdapterError(
            f"{printable(module.name)}: with a qalora_group_size of 1 nothing tells whether its inputs were pooled, and so"
            " multiplied by their number",
            hint="nothing was written; set use_qalora to false in the adapter's configuration if its base was not in GPTQ's format",
        )
    r, groups = module.lora_A.shape
    column = Reshaped(module.lora_A, (r, groups, 1))
    spread = Reshaped(Joined((column,) * group, 2), (r, groups * group))
    factor = module.scaling.value * groups / group
    why = f"{module.scaling.why}, times {groups} groups / {group} inputs in each (QA-LoRA)"
    return replace(module, lora_A=spread, scaling=Scaling(factor, module.scaling.r, module.scaling.lora_alpha, why))


def _groups(lora_A: Matrix, lora_B: Matrix) -> int:
    """How many groups a convolution has whose lora_B sees the part of the rank that is its group's; 1 where it is none."""
    if len(lora_A.shape) < 3 or len(lora_B.shape) < 2 or not lora_B.shape[1] or lora_A.shape[0] % lora_B.shape[1]:
        return 1
    groups = lora_A.shape[0] // lora_B.shape[1]
    return groups if lora_B.shape[0] % groups == 0 else 1


def _dense(lora_B: Matrix, groups: int) -> Matrix:
    """lora_B (out, r / groups, 1, …) as (out, r, 1, …): the outputs of a group see its part of the rank."""
    out, inner = lora_B.shape[:2]
    flat, each = Reshaped(lora_B, (out, inner)), out // groups
    blocks = Diagonal(tuple(Cut(flat, 0, i * each, (i + 1) * each) for i in range(groups)))
    return Reshaped(blocks, (out, inner * groups, *lora_B.shape[2:]))


def _check_shapes(lora_A: Matrix, lora_B: Matrix, first: str, second: str, shown: str) -> None:
    """lora_A is (r, in, *kernel) and lora_B (out, r, 1, …), with no kernel where the layer is not a convolution."""
    found = f"found {list(lora_A.shape)} and {list(lora_B.shape)}"
    if len(lora_A.shape) < 2 or len(lora_A.shape) != len(lora_B.shape):
        raise AdapterError(f"{shown}: {first} must be (r, …) and {second} (…, r), {found}")
    if any(size != 1 for size in lora_B.shape[2:]):
        raise AdapterError(f"{shown}: {second} of a convolution must be (out, r, 1, …), {found}")
    if lora_A.shape[0] == lora_B.shape[1]:
        return
    if (groups := _groups(lora_A, lora_B)) > 1:
        raise UnsupportedAdapterError(
            f"{shown} belongs to a convolution in {groups} groups, {found}: its update mixes the groups, which the grouped weight"
            " cannot hold",
            hint="nothing was written; serve this adapter unmerged, or write a dense convolution (not with DoRA):"
            " `ReadOptions(dense_groups=True)`",
        )
    raise AdapterError(f"{shown}: {first} must be (r, …) and {second} (…, r), {found}")
