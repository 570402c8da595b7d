"""The names that weights have in the code of a model's makers, for a base that diffusers has saved: FLUX, and the UNet of SDXL.

sd-scripts trains FLUX with its makers' names, most pipelines hold those of diffusers. Projections that the makers fused are several
tensors there, and the last modulation has its halves the other way round. Adapters for SDXL have the names of the original code of
latent diffusion. Names are looked up, none is taken apart; both tables are those of diffusers' conversion of such checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .offers import Offers, Slot

_CLASS = "FluxTransformer2DModel"

_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX_OUTSIDE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SHIFT_AND_SCALE = ("final_layer.adaLN_modulation.1", "norm_out.linear")
"""The makers' has the shift first, diffusers' the scale."""

_FLUX_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")
_HALVES = ((Fraction(1, 2), Fraction(1)), (Fraction(0), Fraction(1, 2)))


def flux_names(tensors: Collection[str], config: Mapping[str, Any] | None) -> dict[str, tuple[Slot, ...]]:
    """By the makers' names of tensors, where a base of diffusers' FLUX stores them; empty for any other base."""
    return dict(_names(set(tensors))) if (config or {}).get("_class_name") == _CLASS else {}


def with_flux(offers: Offers, tensors: Collection[str], config: Mapping[str, Any] | None) -> Offers:
    """`offers` and the makers' names, where the base is diffusers' FLUX."""
    found = flux_names(tensors, config)
    return replace(offers, slots={**found, **offers.slots}) if found else offers


def _names(tensors: set[str]) -> Iterator[tuple[str, tuple[Slot, ...]]]:
    blocks = sorted({found[0] for name in tensors if (found := _FLUX_BLOCK.match(name))})
    for kind in ("weight", "bias"):
        for block in blocks:
            single, number = block.startswith("single_"), block.rstrip(".").rpartition(".")[2]
            for name, parts in (_SINGLE if single else _DOUBLE).items():
                stored = [f"{block}{part}.{kind}" for part in parts]
                if tensors.issuperset(stored):
                    yield f"{'single' if single else 'double'}_blocks.{number}.{name}.{kind}", tuple(Slot(each) for each in stored)
        for name, part in _FLUX_OUTSIDE.items():
            if f"{part}.{kind}" in tensors:
                yield f"{name}.{kind}", (Slot(f"{part}.{kind}"),)
        name, part = _SHIFT_AND_SCALE
        if f"{part}.{kind}" in tensors:
            yield f"{name}.{kind}", tuple(Slot(f"{part}.{kind}", outputs=half) for half in _HALVES)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LDM_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_names(module: str, layers_per_block: int = 2) -> tuple[str, ...]:
    """What the UNet's module may be called in the original code; empty where it is none that is known.

    >>> ldm_names("down_blocks.1.attentions.0.proj_in"), ldm_names("mid_block.resnets.1.conv1")
    (('input_blocks.4.1.proj_in',), ('middle_block.2.in_layers.2',))
    """
    if module in _LDM_OUTSIDE:
        return (_LDM_OUTSIDE[module],)
    if found := _MIDDLE.fullmatch(module):
        kind, number, rest = found[1], int(found[2]), found[3]
        return (f"middle_block.{2 * number + (kind == 'attentions')}.{_inner(kind, rest)}",)
    found = _LDM_BLOCK.fullmatch(module)
    if found is None:
        return ()
    side, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    start = block * (layers_per_block + 1) + (side == "down")
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if kind in ("resnets", "attentions"):
        return (f"{blocks}.{start + number}.{int(kind == 'attentions')}.{_inner(kind, rest)}",)
    if rest != "conv":
        return ()
    last = f"{blocks}.{start + layers_per_block}"
    return (f"{last}.0.op",) if kind == "downsamplers" else (f"{last}.1.conv", f"{last}.2.conv")  # after an attention, or not


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
