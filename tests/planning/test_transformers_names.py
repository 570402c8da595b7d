"""The names that transformers gives to other makers' tensors: the table is its own, and adapters under either name merge alike."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import UnmatchedAdapterError
from lorafold.files.safetensors.info import TensorInfo
from lorafold.planning.names.offers import offers_of
from lorafold.planning.names.transformers import parts_of, renamed, renamings_of
from models import edit_json, plain_adapter

MADE = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_names.py"))
PLACE = MADE["PLACE"]

RENAMED = {
    "granite_speech": "GraniteSpeechForConditionalGeneration", "colpali": "ColPaliForRetrieval",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration", "jina_embeddings_v3": "JinaEmbeddingsV3ForMaskedLM",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration", "kimi_k25": "Kimi_K25ForConditionalGeneration",
}  # fmt: skip


def test_the_table_is_that_of_the_installed_transformers() -> None:
    import transformers

    held = json.loads(PLACE.read_text())
    if held["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {held['transformers']}")
    assert PLACE.read_text() == MADE["text"]()
    assert held == MADE["table"]()


@pytest.mark.parametrize("kind", RENAMED)
def test_a_model_as_its_makers_name_it(kind: str) -> None:
    """Every linear layer's tensor that transformers renames when it loads is found where it came from (on the meta device)."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = _small(transformers.CONFIG_MAPPING[kind]())
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, RENAMED[kind])(config)
    own = dict(model.state_dict())
    stored = revert_weight_conversion(model, dict(own))
    assert stored.keys() != own.keys()
    fields = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [RENAMED[kind]]}
    infos = {name: TensorInfo(name, "F32", tuple(tensor.shape), 0, 0, Path("x")) for name, tensor in stored.items()}
    linear = [f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    if kind == "kimi_k25":  # transformers permutes rows of its vision tower's queries and keys: not a matter of names
        linear = [name for name in linear if not any(part in name for part in ("attn.q_proj", "attn.k_proj", "attn.v_proj"))]
    missing = {
        number: [name for name in linear if not offers.find(offers.spell(name))]
        for number, offers in enumerate(offers_of(infos, fields, steps) for steps in renamings_of(fields))
    }
    assert min(map(len, missing.values())) == 0, missing
    assert len(linear) > 10


def _small(config: Any, depth: int = 0) -> Any:
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") and depth < 4:
            _small(value, depth + 1)
        elif name in ("num_hidden_layers", "num_layers", "n_routed_experts", "num_experts", "num_local_experts") and isinstance(
            value, int
        ):
            setattr(config, name, min(value, 4))
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:4]
    return config


def test_a_group_counts_together_or_not_at_all() -> None:
    """Where the first name of a group is nowhere, the others are new names already."""
    config = {"model_type": "kimi_k25"}
    steps = renamings_of(config)[0]
    old = [f"vision_tower.encoder.blocks.0.norm{i}.weight" for i in (0, 1)]
    assert list(renamed(old, steps).values()) == [f"model.vision_tower.layers.0.norm{i}.weight" for i in (1, 2)]
    assert renamed([old[1]], steps)[old[1]] == "model.vision_tower.layers.0.norm1.weight"


def test_parts_of_a_fused_weight_are_told_in_order() -> None:
    steps = renamings_of({"model_type": "radio"})[0]
    found = dict(parts_of("x.attn.qkv.weight", steps))
    assert list(found) == [f"x.attention.{name}_proj.weight" for name in "qkv"]
    assert [float(share[0]) for share in found.values()] == pytest.approx([0, 1 / 3, 2 / 3])


def test_an_adapter_under_new_names_on_a_base_under_old_ones(tmp_path: Path) -> None:
    """The numbers are those of the same adapter under the old names."""
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    held = {f"model.layers.{i}.attn.{name}.weight": torch.randn(8, 8) for i in (0, 1) for name in ("wq_a", "wkv")}
    held |= {"embed.weight": torch.randn(4, 8), "layers.0.attn.wq_a.weight": torch.randn(8, 8)}
    held = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    save_file(held, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    new = plain_adapter(tmp_path / "new", modules=("self_attn.q_a_proj", "self_attn.kv_proj"))
    old = plain_adapter(tmp_path / "old", modules=("attn.wq_a", "attn.wkv"))
    for adapter in (new, old):
        lorafold.merge(tmp_path / "base", [adapter], tmp_path / f"{adapter.name} merged")
    one, other = (load_file(tmp_path / f"{name} merged" / "model.safetensors") for name in ("new", "old"))
    assert all(torch.equal(one[name], other[name]) for name in held)
    assert not torch.equal(one["layers.0.attn.wq_a.weight"], held["layers.0.attn.wq_a.weight"])
    edit_json(tmp_path / "base" / "config.json", model_type="somebody_elses")
    with pytest.raises(UnmatchedAdapterError):
        lorafold.plan(tmp_path / "base", [new])
