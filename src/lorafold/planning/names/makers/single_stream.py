"""The lines for transformers with image and text in one stream: Z-Image, Lumina 2, AuraFlow, Krea 2."""

from __future__ import annotations

from .code_base import Makers

_TRANSFORMER = "transformer_blocks.*"

SINGLE_STREAM: tuple[Makers, ...] = (
    Makers(
        "Z-Image",
        (("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight", "x_embedder.weight"),),
        ("layers.0.attention.to_q.weight", "all_x_embedder.2-1.weight"),
        (
            "{layers|noise_refiner|context_refiner}.*.attention.qkv ="
            " {layers|noise_refiner|context_refiner}.*.attention.to_q +"
            " {layers|noise_refiner|context_refiner}.*.attention.to_k +"
            " {layers|noise_refiner|context_refiner}.*.attention.to_v",
            "{layers|noise_refiner|context_refiner}.*.attention.{out|q_norm|k_norm} ~"
            " {layers|noise_refiner|context_refiner}.*.attention.{to_out.0|norm_q|norm_k}",
            "x_embedder ~ all_x_embedder.2-1",
            "final_layer.** ~ all_final_layer.2-1.**",
        ),
    ),
    Makers(
        "Lumina 2",
        (("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight", "cap_embedder.1.weight"),),
        ("layers.0.attn.to_q.weight", "layers.0.norm1.linear.weight", "time_caption_embed.caption_embedder.1.weight"),
        (
            "{layers|noise_refiner|context_refiner}.*.attention.qkv ="
            " {layers|noise_refiner|context_refiner}.*.attn.to_q[in] +"
            " {layers|noise_refiner|context_refiner}.*.attn.to_k +"
            " {layers|noise_refiner|context_refiner}.*.attn.to_v",
            "{layers|noise_refiner|context_refiner}.*.attention.{out|q_norm|k_norm} ~"
            " {layers|noise_refiner|context_refiner}.*.attn.{to_out.0|norm_q|norm_k}",
            "{layers|noise_refiner|context_refiner}.*.feed_forward.{w1|w2|w3} ~"
            " {layers|noise_refiner|context_refiner}.*.feed_forward.{linear_1|linear_2|linear_3}",
            "{layers|noise_refiner}.*.{adaLN_modulation.1|attention_norm1|attention_norm2} ~"
            " {layers|noise_refiner}.*.{norm1.linear|norm1.norm|norm2}",
            "context_refiner.*.{attention_norm1|attention_norm2} ~ context_refiner.*.{norm1|norm2}",
            "cap_embedder.** ~ time_caption_embed.caption_embedder.**",
            "t_embedder.mlp.{0|2} ~ time_caption_embed.timestep_embedder.{linear_1|linear_2}",
            "final_layer.{adaLN_modulation.1|linear} ~ norm_out.{linear_1|linear_2}",
        ),
    ),
    Makers(
        "AuraFlow",
        (("double_layers.0.attn.w2q.weight",),),
        ("joint_transformer_blocks.0.attn.to_q.weight", "time_step_proj.linear_1.weight"),
        (
            "double_layers.*.attn.{w2q|w2k|w2v|w2o} ~ joint_transformer_blocks.*.attn.{to_q|to_k|to_v|to_out.0}",
            "double_layers.*.attn.{w1q|w1k|w1v|w1o} ~"
            " joint_transformer_blocks.*.attn.{add_q_proj|add_k_proj|add_v_proj|to_add_out}",
            "single_layers.*.attn.{w1q|w1k|w1v|w1o} ~ single_transformer_blocks.*.attn.{to_q|to_k|to_v|to_out.0}",
            "double_layers.*.{mlpX|mlpC}.{c_fc1|c_fc2|c_proj} ~"
            " joint_transformer_blocks.*.{ff|ff_context}.{linear_1|linear_2|out_projection}",
            "single_layers.*.mlp.{c_fc1|c_fc2|c_proj} ~ single_transformer_blocks.*.ff.{linear_1|linear_2|out_projection}",
            "double_layers.*.{modX|modC}.1 ~ joint_transformer_blocks.*.{norm1|norm1_context}.linear",
            "single_layers.*.modCX.1 ~ single_transformer_blocks.*.norm1.linear",
            "modF.1 ~ norm_out.linear halves",
            "t_embedder.mlp.{0|2} ~ time_step_proj.{linear_1|linear_2}",
            "{cond_seq_linear|final_linear|init_x_linear} ~ {context_embedder|proj_out|pos_embed.proj}",
            ":positional_encoding ~ pos_embed.pos_embed",
        ),
    ),
    Makers(
        "Krea 2",
        (("first.weight", "tproj.1.weight", "blocks.0.attn.wq.weight"),),
        ("img_in.weight", "time_mod_proj.weight", "transformer_blocks.0.attn.to_gate.weight"),
        (
            f"blocks.*.attn.{{wq|wk|wv|wo|gate}} ~ {_TRANSFORMER}.attn.{{to_q|to_k|to_v|to_out.0|to_gate}}",
            f":blocks.*.attn.qknorm.{{qnorm|knorm}}.scale ~ {_TRANSFORMER}.attn.{{norm_q|norm_k}}.weight",
            f"blocks.*.mlp.{{gate|up|down}} ~ {_TRANSFORMER}.ff.{{gate|up|down}}",
            f":blocks.*.{{prenorm|postnorm}}.scale ~ {_TRANSFORMER}.{{norm1|norm2}}.weight",
            "txtfusion.{layerwise_blocks|refiner_blocks}.*.attn.{wq|wk|wv|wo|gate} ~"
            " text_fusion.{layerwise_blocks|refiner_blocks}.*.attn.{to_q|to_k|to_v|to_out.0|to_gate}",
            ":txtfusion.{layerwise_blocks|refiner_blocks}.*.attn.qknorm.{qnorm|knorm}.scale ~"
            " text_fusion.{layerwise_blocks|refiner_blocks}.*.attn.{norm_q|norm_k}.weight",
            "txtfusion.{layerwise_blocks|refiner_blocks}.*.mlp.{gate|up|down} ~"
            " text_fusion.{layerwise_blocks|refiner_blocks}.*.ff.{gate|up|down}",
            ":txtfusion.{layerwise_blocks|refiner_blocks}.*.{prenorm|postnorm}.scale ~"
            " text_fusion.{layerwise_blocks|refiner_blocks}.*.{norm1|norm2}.weight",
            "txtfusion.projector ~ text_fusion.projector",
            "first ~ img_in",
            "tmlp.{0|2} ~ time_embed.{linear_1|linear_2}",
            "tproj.1 ~ time_mod_proj",
            "txtmlp.{1|3} ~ txt_in.{linear_1|linear_2}",
            ":txtmlp.0.scale ~ txt_in.norm.weight",
            "last.linear ~ final_layer.linear",
            ":last.norm.scale ~ final_layer.norm.weight",
            ":last.modulation.lin ~ final_layer.scale_shift_table",
        ),
    ),
)
