"""What is known of families of models, as one table. A new family is a new row, not a new branch.

Older and newer names are those of transformers 4 and 5 (`conversion_mapping.py` there). A checkpoint may hold either, and an
adapter may have been trained on either. What most families have in common stands in `spelling` and `slots`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoints.conv1d import CONV1D, model_types
from .names.renames import Rule


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`.

    - `spellings`: older names and newer ones
    - `conv1d`: the modules whose weight is stored (in_features, out_features), transformers' Conv1D
    - `fused`: how the parts of a fused weight lie in it: ``"joined"`` one after the other (gate before up, query before key before
      value), ``"interleaved"`` row by row; None where it is not known
    - `experts`: how a stack of experts is stored: ``"out-in"`` (E, out, in), ``"in-out"`` (E, in, out); None where either is met
    - `is_transposed`: whether the module of the experts says so to PEFT
    """

    spellings: tuple[Rule, ...] = ()
    conv1d: tuple[str, ...] = ()
    fused: Literal["joined", "interleaved"] | None = "joined"
    experts: Literal["out-in", "in-out"] | None = "out-in"
    is_transposed: bool = False


_LANGUAGE = (
    ("^language_model.lm_head", "lm_head"),
    ("^language_model.model", "model.language_model"),
    ("^language_model", "model.language_model"),
    ("^model.language_model.model", "model.language_model"),
)
_LLAVA = Family(
    (
        ("vision_tower.vision_model", "vision_tower"),
        *_LANGUAGE,
        *(
            (f"^{name}", f"model.{name}")
            for name in (
                "vision_tower",
                "vision_model",
                "image_tower",
                "video_tower",
                "audio_tower",
                "multi_modal_projector",
                "image_newline",
                "vision_embed_tokens",
            )
        ),
    )
)
_QWEN_VL = Family(
    (
        ("^thinker", ""),
        ("^visual", "model.visual"),
        ("^audio_tower", "model.audio_tower"),
        *((f"^model.{name}", f"model.language_model.{name}") for name in ("layers", "embed_tokens", "norm")),
    )
)
_VIT = Family(
    (
        ("encoder.layer", "layers"),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
)
_SWIN = Family(
    (
        *((f"attention.self.{old}", f"attention.{new}_proj") for old, new in (("query", "q"), ("key", "k"), ("value", "v"))),
        *_VIT.spellings[4:],
    )
)
_SEGFORMER = Family(
    (
        ("encoder.patch_embeddings.*", "stages.*.patch_embeddings"),
        ("encoder.block.*", "stages.*.blocks"),
        ("encoder.layer_norm.*", "stages.*.layer_norm"),
        *_SWIN.spellings[:4],
        ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
        ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
        ("mlp.dense1", "mlp.fc1"),
        ("mlp.dense2", "mlp.fc2"),
        ("layer_norm_1", "layernorm_before"),
        ("layer_norm_2", "layernorm_after"),
        ("decode_head.linear_c", "decode_head.linear_projections"),
    )
)
_DETR = Family(
    (
        ("backbone.conv_encoder", "backbone"),
        ("out_proj", "o_proj"),
        ("layers.*.fc1", "layers.*.mlp.fc1"),
        ("layers.*.fc2", "layers.*.mlp.fc2"),
    )
)
_RT_DETR = Family((*_DETR.spellings[1:], ("encoder.encoder.*.layers", "encoder.aifi.*.layers")))
_DINOV2 = Family((*_VIT.spellings[1:5], ("mlp.weights_out", "mlp.down_proj")))
_ARIA = Family(
    (("experts.fc1.weight", "experts.gate_up_proj"), ("experts.fc2.weight", "experts.down_proj")),
    experts="in-out",
    is_transposed=True,
)
_MIXTRAL = Family((("block_sparse_moe", "mlp"),))
_GRANITE_MOE = Family(
    (
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
    )
)
_NOMIC_BERT = Family(
    (
        ("encoder.layers", "layers"),
        ("emb_ln", "embeddings.LayerNorm"),
        ("attn.Wqkv", "self_attn.qkv_proj"),
        ("attn.out_proj", "self_attn.o_proj"),
        ("fc11", "up_proj"),
        ("fc12", "gate_proj"),
        ("fc2", "down_proj"),
        ("norm1", "post_attention_layernorm"),
        ("norm2", "post_mlp_layernorm"),
    )
)
_GTE = Family(
    (
        ("^new", ""),
        ("encoder.layer", "layers"),
        ("attention.qkv_proj", "self_attn.qkv_proj"),
        ("attention.o_proj", "self_attn.o_proj"),
        ("attn_ln", "post_attention_layernorm"),
        ("mlp_ln", "post_mlp_layernorm"),
        ("lm_head.norm", "lm_head.layer_norm"),
    )
)
_EXAONE = Family(
    (
        ("^transformer.wte", "model.embed_tokens"),
        ("^transformer.h", "model.layers"),
        ("^transformer.ln_f", "model.norm"),
        ("attn.attention.out_proj", "self_attn.o_proj"),
        ("attn.attention", "self_attn"),
        ("ln_1", "input_layernorm"),
        ("ln_2", "post_attention_layernorm"),
        ("mlp.c_fc_0", "mlp.gate_proj"),
        ("mlp.c_fc_1", "mlp.up_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
    )
)
FAMILIES: Mapping[str, Family] = {
    # plain decoders, and those that fuse projections
    **dict.fromkeys(
        (
            "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi4_multimodal", "glm",
            "glm4", "olmo", "olmo2", "olmo3", "granite", "smollm3", "starcoder2", "cohere", "cohere2", "stablelm", "exaone4",
        ),
        Family(),
    ),
    "gpt_neox": Family((("^embed_out", "lm_head"),)),
    "exaone": _EXAONE,
    **{name: Family(conv1d=modules) for name, modules in CONV1D.items()},
    # mixtures of experts
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "kimi_linear": Family(
        (
            *_MIXTRAL.spellings,
            ("self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj"),
            ("self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj"),
        )
    ),
    "nemotron_h": Family((("^backbone", "model"),)),
    "phimoe": Family((*_MIXTRAL.spellings, ("mlp.gate.weight", "mlp.router.weight"))),
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo",
            "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
            "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "solar_open", "exaone_moe", "cohere2_moe", "jamba", "lfm2_moe",
            "afmoe", "kimi_k2",
        ),
        Family(),
    ),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE_MOE),
    "gpt_oss": Family(fused="interleaved", experts="in-out", is_transposed=True),
    "llama4": Family(_LANGUAGE, experts="in-out"),
    "llama4_text": Family(experts="in-out"),
    "qwen3_vl_moe": Family(experts=None),  # transformers 5 turns it round when it loads
    # encoders, and encoders with decoders
    **dict.fromkeys(
        ("bert", "deberta-v2", "roberta", "xlm-roberta", "camembert", "albert", "distilbert", "electra", "whisper"), Family()
    ),
    **dict.fromkeys(("t5", "mt5", "bart", "mbart"), Family()),
    "nomic_bert": _NOMIC_BERT,
    "gte": _GTE,
    # images, sound, and text with either
    **dict.fromkeys(("vit", "deit", "beit", "ijepa", "vit_mae", "vit_msn", "vivit", "audio-spectrogram-transformer"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "dinov3_vit": Family((("^layer", "model.layer"),)),
    "swin": _SWIN,
    "segformer": _SEGFORMER,
    "detr": _DETR,
    **dict.fromkeys(("rt_detr", "rt_detr_v2"), _RT_DETR),
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_vision_model"), Family()),
    **dict.fromkeys(
        (
            "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "paligemma", "aya_vision", "got_ocr2",
            "gemma3", "internvl", "mistral3", "mllama", "fuyu", "voxtral", "voxtral_realtime", "qwen2_audio",
            "video_llava",
        ),
        _LLAVA,
    ),
    "aria": Family((*_LLAVA.spellings, *_ARIA.spellings), experts="in-out", is_transposed=True),
    "aria_text": _ARIA,
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker"), _QWEN_VL
    ),
}  # fmt: skip
"""By `model_type`. A family that is not here is taken as its configuration and its tensors say, and nothing is guessed of it."""

WRAPPERS = frozenset(
    {
        "base_model", "model", "module", "_orig_mod", "transformer", "language_model", "text_model", "backbone", "bert", "roberta",
        "vit", "vision_model", "vision_tower", "thinker", "llm",
    }
)  # fmt: skip
"""Names that wrap a model without changing it: the ones in which the same model's tensor names may differ."""

VISION = frozenset({"vit", "vision_model", "vision_tower"})
"""Those of them that wrap a model of pictures."""


def families_of(config: Mapping[str, Any] | None) -> list[Family]:
    """What is known of the model with this configuration and of its parts; empty where nothing is."""
    return [FAMILIES[name] for name in dict.fromkeys(model_types(config)) if name in FAMILIES]
