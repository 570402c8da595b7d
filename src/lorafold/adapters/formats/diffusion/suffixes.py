"""What the names of tensors end in, in kohya's files and in LyCORIS's, and the part of a module that each is."""

from __future__ import annotations

from collections.abc import Collection

from ..single_file import split_name
from .components import component_of

KOHYA = {
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "alpha": "alpha",
}
"""Some trainers write PEFT's names of the two after kohya's module."""

_OWN = (
    "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
LYCORIS = {**KOHYA, "lora_mid.weight": "lora_mid", **{name: name for name in _OWN}}

_IA3 = "IA³, which multiplies the base's weights: it is no sum of low rank"
_OFT = "OFT or BOFT, which rotates the base's weights: it is no sum of low rank"
REFUSED = {
    "on_input": _IA3,
    "weight": _IA3,
    "oft_blocks": _OFT,
    "oft_diag": _OFT,
    "rescale": _OFT,
    "lambda_layer": "T-LoRA, whose rank depends on the time step",
    "lokr_t1": "a LoKr with a core tensor for w1, which LyCORIS does not compute with",
    **{f"{name}.weight": "GLoRA" for name in ("a1", "a2", "b1", "b2")},
}
"""Kinds of LyCORIS that are not merged, and why."""

_LYCORIS_ALONE = {*_OWN, "lora_mid.weight", *(ending for ending in REFUSED if ending != "weight")}


def of_lycoris(names: Collection[str]) -> bool:
    """Whether some of the tensors `names` are such as only LyCORIS writes."""
    return any(split_name(name, _LYCORIS_ALONE) for name in names)


def underscored(name: str) -> bool:
    """Whether the path of a module is spelled with underscores in the name of this tensor of it.

    >>> underscored("lora_unet_conv_in.alpha"), underscored("unet.conv_in.lora_A.weight")
    (True, False)
    """
    module = name.partition(".")[0]
    return module.startswith("lycoris_") or component_of(module).startswith("lora_")
