"""The lines for text encoders: OpenCLIP's names beside those of transformers' CLIP, without `text_model.`."""

from __future__ import annotations

from .code_base import Makers

_CLIP = "encoder.layers.*"
_RESBLOCK = "transformer.resblocks.*"

TEXT_ENCODERS: tuple[Makers, ...] = (
    Makers(
        "OpenCLIP",
        (("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),),
        ("encoder.layers.0.self_attn.q_proj.weight", "embeddings.token_embedding.weight", "final_layer_norm.weight"),
        (
            f":{_RESBLOCK}.attn.{{in_proj_weight|in_proj_bias}} = {_CLIP}.self_attn.q_proj.{{weight|bias}} +"
            f" {_CLIP}.self_attn.k_proj.{{weight|bias}} + {_CLIP}.self_attn.v_proj.{{weight|bias}}",
            f"{_RESBLOCK}.attn.out_proj ~ {_CLIP}.self_attn.out_proj",
            f"{_RESBLOCK}.mlp.{{c_fc|c_proj}} ~ {_CLIP}.mlp.{{fc1|fc2}}",
            f"{_RESBLOCK}.{{ln_1|ln_2}} ~ {_CLIP}.{{layer_norm1|layer_norm2}}",
            "ln_final ~ final_layer_norm",
            ":positional_embedding ~ embeddings.position_embedding.weight",
            "token_embedding ~ embeddings.token_embedding",
            ":text_projection ~ text_projection.weight turned",
        ),
        text=True,
        kohya=lambda names: "diffusers",
    ),
)
