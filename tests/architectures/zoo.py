"""The models people use, tiny and with random weights in float64, and adapters of PEFT with random factors on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY, HIDDEN = 48, 32
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FULL = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}  # as many keys as queries
VISION = {
    "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
IMAGE_TOKEN = 40


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 9, 33, 12, 7], [1, 21, 3, 30, 11, 2]])}


def _pixels(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, dtype=torch.float64)


def _decoder() -> dict[str, torch.Tensor]:
    return {**_ids(), "decoder_input_ids": torch.tensor([[1, 4, 8], [1, 40, 2]])}


def _seen() -> dict[str, torch.Tensor]:
    images = torch.tensor([[1, *[IMAGE_TOKEN] * 4, 9], [1, *[IMAGE_TOKEN] * 4, 2]])
    return {"input_ids": images, "attention_mask": torch.ones_like(images), "pixel_values": _pixels()}


def _patches() -> dict[str, torch.Tensor]:
    """Two images of 4 × 4 patches, 2 × 2 of which make a token."""
    patches = torch.rand(32, 3 * 2 * 4 * 4, dtype=torch.float64)
    seen = _seen()
    kinds = (seen["input_ids"] == IMAGE_TOKEN).int()
    return {**seen, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Architecture:
    """A model's class, the fields of its configuration, what goes in, and which bare parameters are adapted too."""

    model: str
    fields: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = _ids
    parameters: tuple[str, ...] = ()
    outputs: str = "logits"
    targets: Any = "all-linear"
    lora: dict[str, Any] = field(default_factory=dict)


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", TEXT),
    "qwen2": Architecture("Qwen2ForCausalLM", TEXT),
    "qwen3": Architecture("Qwen3ForCausalLM", TEXT | {"head_dim": 8}),
    "gemma3": Architecture("Gemma3ForCausalLM", TEXT | {"head_dim": 8, "sliding_window": 4}),
    "gpt2": Architecture(
        "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32}
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", FULL),
    "phi3": Architecture("Phi3ForCausalLM", TEXT),
    "mistral": Architecture("MistralForCausalLM", TEXT),
    "mixtral": Architecture("MixtralForCausalLM", TEXT | {"num_local_experts": 4}, parameters=(*EXPERTS, "mlp.gate.weight")),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
        parameters=EXPERTS,
    ),
    "gpt_oss": Architecture("GptOssForCausalLM", TEXT | {"num_local_experts": 4, "head_dim": 8}, parameters=EXPERTS),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        TEXT
        | {
            "num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 8, "attention_chunk_size": 16, "moe_layers": [1],
            "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "num_experts_per_tok": 2,
        },
        parameters=EXPERTS,
        targets=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],  # PEFT cannot run a router that it wrapped
    ),
    "granitemoe": Architecture(
        "GraniteMoeForCausalLM", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}, parameters=EXPERTS
    ),
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": TEXT
            | {
                "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 2, "hidden_size": HIDDEN, "out_hidden_size": HIDDEN, "num_heads": 4, "intermediate_size": 40,
                "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
            "image_token_id": IMAGE_TOKEN, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43,
        },
        _patches,
        parameters=EXPERTS,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        TEXT
        | {
            "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2,
            "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8,
        },
        parameters=EXPERTS,
    ),
    "bert": Architecture("BertForMaskedLM", FULL),
    "roberta": Architecture("RobertaForMaskedLM", FULL | {"max_position_embeddings": 40}),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        _decoder,
    ),
    "vit": Architecture("ViTForImageClassification", VISION | {"num_labels": 3}, lambda: {"pixel_values": _pixels()}),
    "clip": Architecture(
        "CLIPModel",
        {"text_config": FULL, "vision_config": VISION, "projection_dim": 16},
        lambda: {**_ids(), "pixel_values": _pixels()},
        outputs="logits_per_image",
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8, "init_std": 0.2,
            "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        lambda: {
            "input_features": torch.rand(2, 8, 32, dtype=torch.float64),
            "decoder_input_ids": _decoder()["decoder_input_ids"],
        },
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_id": IMAGE_TOKEN,
        },
        _seen,
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE_TOKEN, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43,
        },
        _patches,
    ),
}  # fmt: skip


def built(architecture: Architecture) -> Any:
    """A random model in float64."""
    import transformers

    kind = getattr(transformers, architecture.model)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        model = kind(kind.config_class(**architecture.fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms off their constants
    return plainly(model)


def plainly(model: Any) -> Any:
    """`model` in float64 and evaluating, with experts in a loop: the faster ways know no float64."""
    model.set_experts_implementation("eager")
    return model.double().eval()


def adapted(model: Any, architecture: Architecture) -> Any:
    """`model` with an adapter of PEFT on it whose factors are random numbers."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=architecture.targets, target_parameters=list(architecture.parameters) or None,
        **architecture.lora,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)  # numbers that float32 holds
    return wrapped.double().eval()


def saved(wrapped: Any, path: Path) -> Path:
    """The adapter as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves the layers of the vocabulary too
        wrapped.save_pretrained(path)
    return path


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def outputs(model: Any, architecture: Architecture) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        found: torch.Tensor = model(**architecture.inputs())[architecture.outputs]
    return found
