"""The table: of each family of models how its files are told by their tensors, and its makers' names beside diffusers'.

The lines are those of diffusers' conversion of checkpoints (`loaders/single_file_utils.py`), which the tests hold them to; what is
not in a line is called alike on both sides. The first family that fits counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from . import unets

Side = Literal["makers", "diffusers"]


@dataclass(frozen=True)
class Makers:
    """The models of one code base.

    - `makers`, `diffusers`: tensors that tell a base in these names; of `makers` all of one of several sets
    - `lines`: of the table, or what makes them of the names of a base's tensors
    - `text`: whether it is a text encoder
    """

    name: str
    makers: tuple[tuple[str, ...], ...]
    diffusers: tuple[str, ...]
    lines: tuple[str, ...] | Callable[[Collection[str]], Iterator[str]]
    text: bool = False

    def side(self, names: Collection[str]) -> Side | None:
        """In whose names the base with the tensors `names` is; None where it is of another family."""
        if any(all(name in names for name in each) for each in self.makers):
            return "makers"
        return "diffusers" if all(name in names for name in self.diffusers) else None

    def lines_for(self, names: Collection[str]) -> Iterator[str]:
        """The lines for the base with the tensors `names`; `{last}` in them is the number of its last double block."""
        if callable(self.lines):
            yield from self.lines(names)
            return
        numbers = [int(name.split(".")[1]) for name in names if name.startswith(("joint_blocks.", "transformer_blocks."))]
        for line in self.lines:
            yield line.replace("{last}", str(max(numbers, default=0)))


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

_CLIP = "encoder.layers.*"
_RESBLOCK = "transformer.resblocks.*"
_TRANSFORMER = "transformer_blocks.*"

FAMILIES: tuple[Makers, ...] = (
    Makers("UNet", (unets.MAKERS,), unets.DIFFUSERS, unets.unet_lines),
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
    ),
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
            *_DOUBLE_QKV,  # what ComfyUI calls the same
            *_DOUBLE_MLP,
            *_MODULATIONS,
            *_SINGLE,
            ":single_blocks.*.{q_norm|k_norm}.weight ~ single_transformer_blocks.*.attn.{norm_q|norm_k}.weight",
            "single_blocks.*.modulation.linear ~ single_transformer_blocks.*.norm.linear",
            "img_in.proj ~ x_embedder.proj",
            "{time_in|guidance_in}.mlp.{0|2} ~ time_text_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
            "{time_in|guidance_in}.{in_layer|out_layer} ~"
            " time_text_embed.{timestep_embedder|guidance_embedder}.{linear_1|linear_2}",
            _VECTOR,
            "txt_in.individual_token_refiner.blocks.*.self_attn_qkv ="
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_q +"
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_k +"
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_v",
            "txt_in.individual_token_refiner.blocks.*.self_attn.qkv ="
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_q +"
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_k +"
            " context_embedder.token_refiner.refiner_blocks.*.attn.to_v",
            "txt_in.individual_token_refiner.blocks.*.{self_attn_proj|self_attn.proj} ~"
            " context_embedder.token_refiner.refiner_blocks.*.{attn.to_out.0|attn.to_out.0}",
            "txt_in.individual_token_refiner.blocks.*.mlp.{fc1|fc2} ~"
            " context_embedder.token_refiner.refiner_blocks.*.ff.{net.0.proj|net.2}",
            "txt_in.individual_token_refiner.blocks.*.mlp.{0|2} ~"
            " context_embedder.token_refiner.refiner_blocks.*.ff.{net.0.proj|net.2}",
            "txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1 ~"
            " context_embedder.token_refiner.refiner_blocks.*.norm_out.linear",
            "txt_in.individual_token_refiner.blocks.*.{norm1|norm2} ~"
            " context_embedder.token_refiner.refiner_blocks.*.{norm1|norm2}",
            "txt_in.t_embedder.mlp.{0|2} ~ context_embedder.time_text_embed.timestep_embedder.{linear_1|linear_2}",
            "txt_in.t_embedder.{in_layer|out_layer} ~ context_embedder.time_text_embed.timestep_embedder.{linear_1|linear_2}",
            "txt_in.c_embedder.{linear_1|linear_2} ~ context_embedder.time_text_embed.text_embedder.{linear_1|linear_2}",
            "txt_in.c_embedder.{in_layer|out_layer} ~ context_embedder.time_text_embed.text_embedder.{linear_1|linear_2}",
            "txt_in.input_embedder ~ context_embedder.proj_in",
            *_FINAL,
            *_FINAL_HALVES,
        ),
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
