"""The lines for transformers with blocks of two streams, image and text: FLUX, Chroma, HunyuanVideo, Stable Diffusion 3."""

from __future__ import annotations

from .code_base import Makers

_DOUBLE = "double_blocks.*"
_QKV = (
    "transformer_blocks.*.attn.{to_q|add_q_proj} + transformer_blocks.*.attn.{to_k|add_k_proj} +"
    " transformer_blocks.*.attn.{to_v|add_v_proj}"
)
_PROJ = "transformer_blocks.*.attn.{to_out.0|to_add_out}"
_DOUBLE_QKV = (
    f"{_DOUBLE}.{{img_attn|txt_attn}}.qkv = {_QKV}",
    f"{_DOUBLE}.{{img_attn|txt_attn}}.proj ~ {_PROJ}",
    f":{_DOUBLE}.img_attn.norm.{{query_norm|key_norm}}.scale ~ transformer_blocks.*.attn.{{norm_q|norm_k}}.weight",
    f":{_DOUBLE}.txt_attn.norm.{{query_norm|key_norm}}.scale ~ transformer_blocks.*.attn.{{norm_added_q|norm_added_k}}.weight",
    ":single_blocks.*.norm.{query_norm|key_norm}.scale ~ single_transformer_blocks.*.attn.{norm_q|norm_k}.weight",
)
_DOUBLE_MLP = (f"{_DOUBLE}.{{img_mlp|txt_mlp}}.{{0|2}} ~ transformer_blocks.*.{{ff|ff_context}}.{{net.0.proj|net.2}}",)
_SINGLE = (
    "single_blocks.*.linear1 = single_transformer_blocks.*.attn.to_q[in] + single_transformer_blocks.*.attn.to_k[in] +"
    " single_transformer_blocks.*.attn.to_v[in] + single_transformer_blocks.*.proj_mlp",
    "single_blocks.*.linear2 ~ single_transformer_blocks.*.proj_out",
)
_MODULATIONS = (
    f"{_DOUBLE}.{{img_mod|txt_mod}}.lin ~ transformer_blocks.*.{{norm1|norm1_context}}.linear",
    "single_blocks.*.modulation.lin ~ single_transformer_blocks.*.norm.linear",
)
_FINAL = ("final_layer.linear ~ proj_out",)
_FINAL_HALVES = ("final_layer.adaLN_modulation.1 ~ norm_out.linear halves",)
_IN = ("{img_in|txt_in} ~ {x_embedder|context_embedder}",)
_VECTOR = "vector_in.{in_layer|out_layer} ~ time_text_embed.text_embedder.{linear_1|linear_2}"


_PARTS = (
    "double_blocks.*.img_attn.qkv.{0|1|2} ~ transformer_blocks.*.attn.{to_q|to_k|to_v}",
    "double_blocks.*.txt_attn.qkv.{0|1|2} ~ transformer_blocks.*.attn.{add_q_proj|add_k_proj|add_v_proj}",
    "single_blocks.*.linear1.{0|1|2|3} ~ single_transformer_blocks.*.{attn.to_q|attn.to_k|attn.to_v|proj_mlp}",
    "single_blocks.*.linear1.qkv = single_transformer_blocks.*.attn.to_q + single_transformer_blocks.*.attn.to_k +"
    " single_transformer_blocks.*.attn.to_v",
)
"""The parts of fused weights as OMI (by number) and x-flux (query, key and value of a single block) have them."""

_REFINER, _REFINED = "txt_in.individual_token_refiner.blocks.*", "context_embedder.token_refiner.refiner_blocks.*"
_HUNYUAN_COMFY = (
    f"{_REFINER}.self_attn.qkv = {_REFINED}.attn.to_q + {_REFINED}.attn.to_k + {_REFINED}.attn.to_v",
    f"{_REFINER}.self_attn.proj ~ {_REFINED}.attn.to_out.0",
    f"{_REFINER}.mlp.{{0|2}} ~ {_REFINED}.ff.{{net.0.proj|net.2}}",
    "{time_in|guidance_in}.{in_layer|out_layer} ~ time_text_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
    "txt_in.{t_embedder|c_embedder}.{in_layer|out_layer} ~"
    " context_embedder.time_text_embed.{timestep_embedder|text_embedder}.{linear_1|linear_2}",
)
"""What ComfyUI calls the weights of HunyuanVideo; adapters have either."""

DOUBLE_STREAM: tuple[Makers, ...] = (
    Makers(
        "HunyuanVideo",
        (
            ("double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight"),
            ("double_blocks.0.img_attn.qkv.weight", "txt_in.input_embedder.weight"),
        ),
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"),
        (
            f"{_DOUBLE}.{{img_attn_qkv|txt_attn_qkv}} = {_QKV}",
            f"{_DOUBLE}.{{img_attn_proj|txt_attn_proj}} ~ {_PROJ}",
            f":{_DOUBLE}.img_attn_{{q|k}}_norm.weight ~ transformer_blocks.*.attn.norm_{{q|k}}.weight",
            f":{_DOUBLE}.txt_attn_{{q|k}}_norm.weight ~ transformer_blocks.*.attn.norm_added_{{q|k}}.weight",
            f"{_DOUBLE}.{{img_mod|txt_mod}}.linear ~ transformer_blocks.*.{{norm1|norm1_context}}.linear",
            f"{_DOUBLE}.{{img_mlp|txt_mlp}}.{{fc1|fc2}} ~ transformer_blocks.*.{{ff|ff_context}}.{{net.0.proj|net.2}}",
            *_SINGLE,
            ":single_blocks.*.{q_norm|k_norm}.weight ~ single_transformer_blocks.*.attn.{norm_q|norm_k}.weight",
            "single_blocks.*.modulation.linear ~ single_transformer_blocks.*.norm.linear",
            "img_in.proj ~ x_embedder.proj",
            "{time_in|guidance_in}.mlp.{0|2} ~ time_text_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
            _VECTOR,
            f"{_REFINER}.self_attn_qkv = {_REFINED}.attn.to_q + {_REFINED}.attn.to_k + {_REFINED}.attn.to_v",
            f"{_REFINER}.self_attn_proj ~ {_REFINED}.attn.to_out.0",
            f"{_REFINER}.mlp.{{fc1|fc2}} ~ {_REFINED}.ff.{{net.0.proj|net.2}}",
            f"{_REFINER}.adaLN_modulation.1 ~ {_REFINED}.norm_out.linear",
            f"{_REFINER}.{{norm1|norm2}} ~ {_REFINED}.{{norm1|norm2}}",
            "txt_in.t_embedder.mlp.{0|2} ~ context_embedder.time_text_embed.timestep_embedder.{linear_1|linear_2}",
            "txt_in.c_embedder.{linear_1|linear_2} ~ context_embedder.time_text_embed.text_embedder.{linear_1|linear_2}",
            "txt_in.input_embedder ~ context_embedder.proj_in",
            *_FINAL,
            *_FINAL_HALVES,
        ),
        aliases=(*_DOUBLE_QKV, *_DOUBLE_MLP, *_MODULATIONS, *_HUNYUAN_COMFY, *_PARTS),
    ),
    Makers(
        "FLUX.2",
        (("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),),
        ("double_stream_modulation_img.linear.weight", "transformer_blocks.0.attn.to_q.weight"),
        (
            *_DOUBLE_QKV,
            f"{_DOUBLE}.{{img_mlp|txt_mlp}}.{{0|2}} ~ transformer_blocks.*.{{ff|ff_context}}.{{linear_in|linear_out}}",
            "single_blocks.*.{linear1|linear2} ~ single_transformer_blocks.*.attn.{to_qkv_mlp_proj|to_out}",
            "{double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation}.lin ~"
            " {double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation}.linear",
            "{time_in|guidance_in}.{in_layer|out_layer} ~"
            " time_guidance_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
            *_IN,
            *_FINAL,
            *_FINAL_HALVES,
        ),
        aliases=_PARTS,
    ),
    Makers(
        "Chroma",
        (("distilled_guidance_layer.layers.0.in_layer.weight", "double_blocks.0.img_attn.qkv.weight"),),
        ("distilled_guidance_layer.layers.0.linear_1.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        (
            *_DOUBLE_QKV,
            *_DOUBLE_MLP,
            *_SINGLE,
            "distilled_guidance_layer.layers.*.{in_layer|out_layer} ~ distilled_guidance_layer.layers.*.{linear_1|linear_2}",
            ":distilled_guidance_layer.norms.*.scale ~ distilled_guidance_layer.norms.*.weight",
            *_IN,
            *_FINAL,
        ),
        aliases=_PARTS,
    ),
    Makers(
        "FLUX.1",
        (
            (
                "double_blocks.0.img_attn.qkv.weight",
                "double_blocks.0.img_mod.lin.weight",
                "txt_in.weight",
                "time_in.in_layer.weight",
            ),
        ),
        (
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.norm1.linear.weight",
            "context_embedder.weight",
            "x_embedder.weight",
            "time_text_embed.timestep_embedder.linear_1.weight",
        ),
        (
            *_DOUBLE_QKV,
            *_DOUBLE_MLP,
            *_SINGLE,
            *_MODULATIONS,
            "{time_in|guidance_in}.{in_layer|out_layer} ~"
            " time_text_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
            _VECTOR,
            *_IN,
            *_FINAL,
            *_FINAL_HALVES,
        ),
        aliases=_PARTS,
    ),
    Makers(
        "Stable Diffusion 3",
        (("joint_blocks.0.x_block.attn.qkv.weight",),),
        (
            "transformer_blocks.0.attn.add_q_proj.weight",
            "pos_embed.proj.weight",
            "time_text_embed.timestep_embedder.linear_1.weight",
        ),
        (
            f"joint_blocks.*.{{x_block|context_block}}.attn.qkv = {_QKV}",
            "joint_blocks.*.x_block.attn2.qkv ="
            " transformer_blocks.*.attn2.to_q + transformer_blocks.*.attn2.to_k + transformer_blocks.*.attn2.to_v",
            f"joint_blocks.*.{{x_block|context_block}}.attn.proj ~ {_PROJ}",
            "joint_blocks.*.x_block.attn2.proj ~ transformer_blocks.*.attn2.to_out.0",
            "joint_blocks.*.{x_block|context_block}.mlp.{fc1|fc2} ~ transformer_blocks.*.{ff|ff_context}.{net.0.proj|net.2}",
            "joint_blocks.*.{x_block|context_block}.adaLN_modulation.1 ~ transformer_blocks.*.{norm1|norm1_context}.linear",
            "joint_blocks.{last}.context_block.adaLN_modulation.1 ~ transformer_blocks.{last}.norm1_context.linear halves",
            ":joint_blocks.*.x_block.attn.{ln_q|ln_k}.weight ~ transformer_blocks.*.attn.{norm_q|norm_k}.weight",
            ":joint_blocks.*.x_block.attn2.{ln_q|ln_k}.weight ~ transformer_blocks.*.attn2.{norm_q|norm_k}.weight",
            ":joint_blocks.*.context_block.attn.{ln_q|ln_k}.weight ~ transformer_blocks.*.attn.{norm_added_q|norm_added_k}.weight",
            "{t_embedder|y_embedder}.mlp.{0|2} ~ time_text_embed.{timestep_embedder|text_embedder}.{linear_1|linear_2}",
            "x_embedder.proj ~ pos_embed.proj",
            ":pos_embed ~ pos_embed.pos_embed",
            *_FINAL,
            *_FINAL_HALVES,
        ),
    ),
)
