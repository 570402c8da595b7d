"""The lines for UNets of latent diffusion, whose blocks the makers count through: SD 1, SD 2, SDXL.

They are those of diffusers' conversion of such checkpoints (`loaders/single_file_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from .code_base import Makers, Side

_MAKERS = ("input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight", "out.2.weight")
_DIFFUSERS = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight")

_OUTSIDE = (
    "input_blocks.0.0 ~ conv_in",
    "out.{0|2} ~ {conv_norm_out|conv_out}",
    "time_embed.{0|2} ~ time_embedding.{linear_1|linear_2}",
)
_LABELS = "label_emb.0.{{0|2}} ~ {}.{{linear_1|linear_2}}"
_RESNET = (
    "{}.{{in_layers.0|in_layers.2|emb_layers.1|out_layers.0|out_layers.3|skip_connection}}"
    " ~ {}.{{norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut}}"
)
_COUNTED = re.compile(r"(down_blocks|input_blocks)\.(\d+)\.(?:resnets\.(\d+)\.conv1|0\.in_layers\.2|0\.op)\.weight")


def unet_lines(names: Collection[str]) -> Iterator[str]:
    """The lines for a UNet with the tensors `names`, in either spelling."""
    layers, blocks = _sizes(names)
    each = layers + 1  # entries of a block
    yield from _OUTSIDE
    yield _LABELS.format("class_embedding" if "class_embedding.linear_1.weight" in names else "add_embedding")
    for block in range(blocks):
        for layer in range(layers):
            k = block * each + layer + 1
            yield _RESNET.format(f"input_blocks.{k}.0", f"down_blocks.{block}.resnets.{layer}")
            yield f"input_blocks.{k}.1.** ~ down_blocks.{block}.attentions.{layer}.**"
        yield f"input_blocks.{(block + 1) * each}.0.op ~ down_blocks.{block}.downsamplers.0.conv"
        for layer in range(each):
            k = block * each + layer
            yield _RESNET.format(f"output_blocks.{k}.0", f"up_blocks.{block}.resnets.{layer}")
            yield f"output_blocks.{k}.1.** ~ up_blocks.{block}.attentions.{layer}.**"
        last = block * each + layers
        attends = any(name.startswith((f"up_blocks.{block}.attentions.", f"output_blocks.{last}.1.norm.")) for name in names)
        yield f"output_blocks.{last}.{2 if attends else 1}.conv ~ up_blocks.{block}.upsamplers.0.conv"
    yield _RESNET.format("middle_block.0", "mid_block.resnets.0")
    yield _RESNET.format("middle_block.2", "mid_block.resnets.1")
    yield "middle_block.1.** ~ mid_block.attentions.0.**"


def _sizes(names: Collection[str]) -> tuple[int, int]:
    """How many layers a block has, and how many blocks there are."""
    found = [match for name in names if (match := _COUNTED.fullmatch(name))]
    counts = [int(match[2]) for match in found]
    if any(match[1] == "down_blocks" for match in found):
        return 1 + max(int(match[3] or 0) for match in found), 1 + max(counts)
    downs = sorted(int(match[2]) for match in found if match[0].endswith(".op.weight"))
    layers = (downs[0] - 1) if downs else max(counts)
    return layers, -(-max(counts) // (layers + 1))


def _kohya(names: Collection[str]) -> Side:
    """SDXL's UNet, which is told by its sizes and crops, is in its makers' names; those before are in diffusers'."""
    return "makers" if any(name.startswith(("label_emb.", "add_embedding.")) for name in names) else "diffusers"


UNETS: tuple[Makers, ...] = (Makers("UNet", (_MAKERS,), _DIFFUSERS, unet_lines, kohya=_kohya),)
