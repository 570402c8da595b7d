"""Tiny models of the families in the table of makers' names, in diffusers' names and in their makers'.

`as_makers` is the table's own way; whether it is right shows when diffusers' converter of checkpoints takes its result back.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffusion import flux, quietly, sdxl, unet
from lorafold.planning.names.makers.lines import FAMILIES
from lorafold.planning.names.makers.rules import fitting, rules_of
from lorafold.planning.names.makers.slots import maker_slots
from lorafold.planning.names.offers import Slot


@dataclass(frozen=True)
class Case:
    """A family: its model, diffusers' converter, and constants of real sizes in that one's source with those of the tiny model."""

    make: Callable[[], Any]
    converter: str
    sizes: Mapping[str, str]
    lost: tuple[str, ...] = ()
    """What of the makers' file the converter wants, and diffusers' does not have."""


def _made(name: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers

        torch.manual_seed(0)
        return quietly(lambda: getattr(diffusers, name)(**config))

    return make


_FLUX2 = _made(
    "Flux2Transformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
)  # fmt: skip
_CHROMA = _made(
    "ChromaTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=12,
    approximator_layers=2,
)  # fmt: skip
_SD3 = _made(
    "SD3Transformer2DModel", sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=4,
    dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip
_WAN = _made(
    "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
    ffn_dim=20, num_layers=2, image_dim=6, added_kv_proj_dim=16,
)  # fmt: skip
_HUNYUAN = _made(
    "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
    num_single_layers=1, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 2, 4),
)  # fmt: skip
_ZIMAGE = _made(
    "ZImageTransformer2DModel", in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
    axes_dims=[2, 2, 4], axes_lens=[8, 8, 8],
)  # fmt: skip
_LUMINA = _made(
    "Lumina2Transformer2DModel", sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1,
    num_attention_heads=4, num_kv_heads=2, multiple_of=4, axes_dim_rope=(2, 2, 4), axes_lens=(8, 8, 8), cap_feat_dim=12,
)  # fmt: skip
_LTX = _made(
    "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
    cross_attention_dim=16, num_layers=1, caption_channels=12,
)  # fmt: skip
_AURA = _made(
    "AuraFlowTransformer2DModel", sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4, pos_embed_max_size=4,
)  # fmt: skip
_COSMOS = _made(
    "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=1,
    text_embed_dim=12, adaln_lora_dim=6, max_size=(4, 4, 4), extra_pos_embed_type=None,
)  # fmt: skip
_KREA = _made(
    "Krea2Transformer2DModel", in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=20, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=2, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=14, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
    axes_dims_rope=(2, 2, 4),
)  # fmt: skip
_SANA = _made(
    "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
)  # fmt: skip

CASES: Mapping[str, Case] = {
    "SD 1.5": Case(unet, "convert_ldm_unet_checkpoint", {}),
    "SDXL": Case(sdxl, "convert_ldm_unet_checkpoint", {}),
    "FLUX.1": Case(flux, "convert_flux_transformer_checkpoint_to_diffusers", {"3072": "16"}),
    "FLUX.2": Case(_FLUX2, "convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "Chroma": Case(_CHROMA, "convert_chroma_transformer_checkpoint_to_diffusers", {"3072": "16"}),
    "SD 3.5": Case(_SD3, "convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "Wan": Case(_WAN, "convert_wan_transformer_to_diffusers", {}),
    "HunyuanVideo": Case(_HUNYUAN, "convert_hunyuan_video_transformer_to_diffusers", {"3072": "16"}),
    "Z-Image": Case(_ZIMAGE, "convert_z_image_transformer_checkpoint_to_diffusers", {}),
    "Lumina 2": Case(_LUMINA, "convert_lumina2_to_diffusers", {"2304": "32", "768": "16"}),
    "LTX": Case(_LTX, "convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "AuraFlow": Case(_AURA, "convert_auraflow_transformer_checkpoint_to_diffusers", {}),
    "Cosmos": Case(_COSMOS, "convert_cosmos_transformer_checkpoint_to_diffusers", {}),
    "Krea 2": Case(_KREA, "convert_krea2_transformer_checkpoint_to_diffusers", {}),
    "Sana": Case(_SANA, "convert_sana_transformer_to_diffusers", {}, ("pos_embed", "y_embedder.y_embedding")),
}


@cache
def _converter(name: str, sizes: tuple[tuple[str, str], ...]) -> Callable[..., Any]:
    """diffusers' function `name`, with the constants of real models in its source replaced."""
    from diffusers.loaders import single_file_utils as conversion

    source = inspect.getsource(getattr(conversion, name))
    for real, tiny in sizes:
        source = re.sub(rf"\b{real}\b", tiny, source)
    scope = dict(vars(conversion))
    exec(source, scope)
    return scope[name]


def converted(case: Case, makers: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What diffusers makes of a checkpoint in the makers' names."""
    convert = _converter(case.converter, tuple(case.sizes.items()))
    given = {name: tensor.clone() for name, tensor in makers.items()}
    given |= {name: torch.zeros(1) for name in case.lost}
    if "unet" in case.converter:
        given = {f"model.diffusion_model.{name}": tensor for name, tensor in given.items()}
        return dict(convert(given, config))
    return {name: tensor for name, tensor in convert(given).items() if tensor is not None}


def taken(slots: tuple[Slot, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """The numbers that are stored in `slots`."""
    rows = []
    for slot in slots:
        stored = tensors[slot.tensor].T if slot.turned else tensors[slot.tensor]
        first, last = (int(end * stored.shape[0]) for end in slot.outputs) if stored.dim() else (0, 0)
        rows.append(stored[first:last])
    return torch.cat(rows).contiguous()


def as_makers(diffusers: Mapping[str, Tensor], wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors in the makers' names, by the table: those that it has no other name for as they are."""
    slots = maker_slots({name: tuple(tensor.shape) for name, tensor in diffusers.items()})
    found = {name: taken(each, diffusers) for name, each in slots.items() if wanted(name)}
    moved = {slot.tensor for name, each in slots.items() if wanted(name) for slot in each}
    return found | {name: tensor for name, tensor in diffusers.items() if name not in moved}


def makers_of(name: str, diffusers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the names of files of the makers, not in those that only adapters have."""
    family = next(each for each in FAMILIES if each.side(diffusers))
    only = {rule.maker for rule in rules_of(family.aliases)} - {rule.maker for rule in rules_of(family.lines_for(diffusers))}
    return as_makers(diffusers, lambda each: fitting(each, dict.fromkeys(only)) is None)


def open_clip(width: int = 16, layers: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A text encoder with a projection, as transformers has it and as OpenCLIP stores it."""
    import transformers

    torch.manual_seed(4)
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2, vocab_size=30,
        max_position_embeddings=8, projection_dim=width,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items() if "position_ids" not in name}
    body = {name.removeprefix("text_model."): tensor for name, tensor in held.items()}
    stored = {
        "token_embedding.weight": body["embeddings.token_embedding.weight"],
        "positional_embedding": body["embeddings.position_embedding.weight"],
        "ln_final.weight": body["final_layer_norm.weight"],
        "ln_final.bias": body["final_layer_norm.bias"],
        "text_projection": body["text_projection.weight"].T.contiguous(),
    }
    for i in range(layers):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [body[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            stored[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                                 ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):  # fmt: skip
                stored[f"{new}.{theirs}.{kind}"] = body[f"{old}.{ours}.{kind}"]
    return held, stored
