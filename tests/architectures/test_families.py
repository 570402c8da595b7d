"""The table of families against transformers itself: what it would write for a model is offered under the names of the modules.

Models are made without memory for their weights, so that they have their real shapes but for the number of layers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafold.files.safetensors.info import TensorInfo
from lorafold.planning.families import FAMILIES, Family
from lorafold.planning.names.offers import offers_of, shape_of

pytestmark = pytest.mark.slow

NOT_MADE = {
    "ministral", "hunyuan_v1_moe",  # have no default configuration
    "dots1", "jamba", "lfm2_moe", "aya_vision", "kimi_k2", "qwen2_5_omni", "qwen3_omni_moe", "detr",  # cannot be made so
    "vit_msn",  # its classifier is written under one more prefix
}  # fmt: skip
NOTABLE = sorted(name for name, family in FAMILIES.items() if family != Family() or "moe" in name or name.startswith("deepseek"))
MODELS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_MAPPING",
)  # fmt: skip


def made(name: str) -> Any:
    """The main model of a family, of two layers, its weights without memory."""
    import transformers
    from transformers.models.auto import modeling_auto

    config = transformers.CONFIG_MAPPING[name]()
    for part in [config, *(value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig))]:
        for field in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "n_layer"):
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    kinds = [getattr(modeling_auto, each).get(type(config), None) for each in MODELS]
    kind = next(each for each in kinds if each is not None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        return (kind[0] if isinstance(kind, list | tuple) else kind)(config)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: made(name) for name in NOTABLE if name not in NOT_MADE}


def test_what_transformers_writes_is_found_under_the_names_of_modules(models: dict[str, Any]) -> None:
    """All weights of linear layers, embeddings and experts, with their shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    wrong = []
    for family, model in models.items():
        state = model.state_dict()
        written = revert_weight_conversion(model, dict(state))
        infos = {name: TensorInfo(name, "BF16", tuple(each.shape), 0, 0, Path(family)) for name, each in written.items()}
        offers = offers_of(infos, {**model.config.to_dict(), "model_type": family})
        for name, weight in state.items():
            spelled, shape = offers.spell(name), tuple(weight.shape)
            if len(shape) < 2 or 1 in shape or "conv1d" in name or "relative_position" in name:
                continue  # nothing that an adapter is for
            slots = offers.find(spelled) or offers.find(spelled, 0)
            found = shape_of(slots, infos) if slots else ()
            if found != shape and found != shape[1:] and found != (*shape[:-2], shape[-1], shape[-2]):
                wrong.append((family, name, shape, found))
    assert wrong == []
    assert len(models) > 50


def test_what_modules_say_of_themselves(models: dict[str, Any]) -> None:
    """Which stacks of experts are transposed or interleaved, and which layers are Conv1D."""
    from transformers.pytorch_utils import Conv1D

    for name, model in models.items():
        family = FAMILIES[name]
        for path, module in model.named_modules():
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and hasattr(module, "is_transposed"):
                assert family.is_transposed == module.is_transposed, name
                assert (family.fused == "interleaved") == (not module.is_concatenated), name
            if isinstance(module, Conv1D):
                assert path.rpartition(".")[2] in family.conv1d, (name, path)
