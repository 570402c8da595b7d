"""The names that a UNet's modules have in checkpoints of the original latent diffusion code, from those that diffusers gives them.

Adapters for SDXL are trained with the original names, most base models are stored with the other ones. Only names are looked up:
no name of the original is taken apart. The correspondence is that of diffusers' conversion of such checkpoints.
"""

from __future__ import annotations

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_names(module: str, layers_per_block: int = 2) -> tuple[str, ...]:
    """What the UNet's module may be called in the original code; empty where it is none that is known.

    >>> ldm_names("down_blocks.1.attentions.0.proj_in"), ldm_names("mid_block.resnets.1.conv1")
    (('input_blocks.4.1.proj_in',), ('middle_block.2.in_layers.2',))
    """
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    if found := _MIDDLE.fullmatch(module):
        kind, number, rest = found[1], int(found[2]), found[3]
        return (f"middle_block.{2 * number + (kind == 'attentions')}.{_inner(kind, rest)}",)
    found = _BLOCK.fullmatch(module)
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
