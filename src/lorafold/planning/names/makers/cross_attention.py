"""The lines for transformers with attention to the text in each block: Wan, LTX-Video, Cosmos-Predict2, Sana."""

from __future__ import annotations

from .code_base import Makers

_TRANSFORMER = "transformer_blocks.*"
_FINAL = ("final_layer.linear ~ proj_out",)

CROSS_ATTENTION: tuple[Makers, ...] = (
    Makers(
        "Wan",
        (("blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight", "time_projection.1.weight"),),
        ("blocks.0.attn1.to_q.weight", "condition_embedder.time_embedder.linear_1.weight"),
        (
            "{blocks|vace_blocks}.*.{self_attn|cross_attn}.{q|k|v|o} ~"
            " {blocks|vace_blocks}.*.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}",
            "{blocks|vace_blocks}.*.{self_attn|cross_attn}.{norm_q|norm_k} ~ {blocks|vace_blocks}.*.{attn1|attn2}.{norm_q|norm_k}",
            "blocks.*.cross_attn.{k_img|v_img|norm_k_img} ~ blocks.*.attn2.{add_k_proj|add_v_proj|norm_added_k}",
            "{blocks|vace_blocks}.*.ffn.{0|2} ~ {blocks|vace_blocks}.*.ffn.{net.0.proj|net.2}",
            "{blocks|vace_blocks}.*.norm3 ~ {blocks|vace_blocks}.*.norm2",
            ":{blocks|vace_blocks}.*.modulation ~ {blocks|vace_blocks}.*.scale_shift_table",
            "vace_blocks.*.{before_proj|after_proj} ~ vace_blocks.*.{proj_in|proj_out}",
            ":head.modulation ~ scale_shift_table",
            "head.head ~ proj_out",
            "{time_embedding|text_embedding}.{0|2} ~ condition_embedder.{time_embedder|text_embedder}.{linear_1|linear_2}",
            "time_projection.1 ~ condition_embedder.time_proj",
            "img_emb.proj.{0|1|3|4} ~ condition_embedder.image_embedder.{norm1|ff.net.0.proj|ff.net.2|norm2}",
        ),
    ),
    Makers(
        "LTX-Video",
        (("patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"),),
        ("proj_in.weight", "time_embed.emb.timestep_embedder.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"),
        (
            "patchify_proj ~ proj_in",
            "adaln_single.** ~ time_embed.**",
            f"{_TRANSFORMER}.{{attn1|attn2}}.{{q_norm|k_norm}} ~ {_TRANSFORMER}.{{attn1|attn2}}.{{norm_q|norm_k}}",
        ),
    ),
    Makers(
        "Cosmos-Predict2",
        (("blocks.0.self_attn.q_proj.weight", "blocks.0.adaln_modulation_self_attn.1.weight"),),
        ("transformer_blocks.0.attn1.to_q.weight", "patch_embed.proj.weight", "time_embed.t_embedder.linear_1.weight"),
        (
            f"blocks.*.{{self_attn|cross_attn}}.{{q_proj|k_proj|v_proj|output_proj|q_norm|k_norm}} ~"
            f" {_TRANSFORMER}.{{attn1|attn2}}.{{to_q|to_k|to_v|to_out.0|norm_q|norm_k}}",
            f"blocks.*.mlp.{{layer1|layer2}} ~ {_TRANSFORMER}.ff.{{net.0.proj|net.2}}",
            f"blocks.*.{{adaln_modulation_self_attn|adaln_modulation_cross_attn|adaln_modulation_mlp}}.{{1|2}} ~"
            f" {_TRANSFORMER}.{{norm1|norm2|norm3}}.{{linear_1|linear_2}}",
            "t_embedder.1.** ~ time_embed.t_embedder.**",
            "t_embedding_norm ~ time_embed.norm",
            "x_embedder.proj.1 ~ patch_embed.proj",
            "final_layer.adaln_modulation.{1|2} ~ norm_out.{linear_1|linear_2}",
            *_FINAL,
        ),
    ),
    Makers(
        "Sana",
        (("blocks.0.attn.qkv.weight", "blocks.0.cross_attn.kv_linear.weight", "t_block.1.weight"),),
        ("transformer_blocks.0.ff.conv_inverted.weight", "time_embed.emb.timestep_embedder.linear_1.weight", "caption_norm.weight"),
        (
            f"blocks.*.attn.qkv = {_TRANSFORMER}.attn1.to_q + {_TRANSFORMER}.attn1.to_k + {_TRANSFORMER}.attn1.to_v",
            f"blocks.*.attn.proj ~ {_TRANSFORMER}.attn1.to_out.0",
            f"blocks.*.cross_attn.{{q_linear|proj}} ~ {_TRANSFORMER}.attn2.{{to_q|to_out.0}}",
            f"blocks.*.cross_attn.kv_linear = {_TRANSFORMER}.attn2.to_k + {_TRANSFORMER}.attn2.to_v",
            f"blocks.*.mlp.{{inverted_conv|depth_conv|point_conv}}.conv ~"
            f" {_TRANSFORMER}.ff.{{conv_inverted|conv_depth|conv_point}}",
            f":blocks.*.scale_shift_table ~ {_TRANSFORMER}.scale_shift_table",
            "x_embedder.proj ~ patch_embed.proj",
            "t_embedder.mlp.{0|2} ~ time_embed.emb.timestep_embedder.{linear_1|linear_2}",
            "t_block.1 ~ time_embed.linear",
            "y_embedder.y_proj.{fc1|fc2} ~ caption_projection.{linear_1|linear_2}",
            "attention_y_norm ~ caption_norm",
            *_FINAL,
            ":final_layer.scale_shift_table ~ scale_shift_table",
        ),
    ),
)
