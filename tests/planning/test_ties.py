"""The table of ties against transformers itself, and what is done for models that are not in it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import lorafold
from lorafold.errors import PlanError, UnsupportedAdapterError
from lorafold.planning.known import Flag, ends_elsewhere, known_model
from models import refused, tensors

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_ties.py"
TABLE = json.loads((Path(lorafold.__file__).parent / "planning" / "ties.json").read_text())
CLASSES = (
    "LlamaForCausalLM", "LlamaForSequenceClassification", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "BertForMaskedLM",
    "RobertaForMaskedLM", "ModernBertForMaskedLM", "DebertaV2ForMaskedLM", "EsmForMaskedLM", "BioGptForCausalLM",
    "MambaForCausalLM", "RwkvForCausalLM", "CTRLLMHeadModel", "XLNetLMHeadModel", "XLMWithLMHeadModel",
    "T5ForConditionalGeneration", "MarianMTModel", "BartForConditionalGeneration", "WhisperForConditionalGeneration",
    "MoonshineForConditionalGeneration", "Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration",
    "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "SeamlessM4TForTextToText", "Blip2ForConditionalGeneration", "VibeVoiceForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration", "ZambaForCausalLM", "CLIPTextModel", "ViTForImageClassification",
    "DbrxForCausalLM",
)  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_ties", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_the_table_is_what_transformers_says(script: Any, name: str) -> None:
    if TABLE["made_from"] != f"transformers {transformers.__version__}":
        pytest.skip(f"the table is made from {TABLE['made_from']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = script.model_of(getattr(transformers, name))
    assert json.loads(json.dumps(made)) == TABLE["models"][TABLE["classes"][name]]


def test_every_class_that_transformers_ties_is_in_the_table() -> None:
    """By their class attribute alone, which needs no model: what it ties is in the table, under the same names."""
    from transformers.models.auto import modeling_auto

    names = {
        each if isinstance(each, str) else each[0]
        for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES")
        for each in getattr(modeling_auto, mapping).values()
    }
    checked = 0
    for name in sorted(names & TABLE["classes"].keys())[::6]:
        tied = getattr(transformers, name)._tied_weights_keys or {}
        entry = TABLE["models"][TABLE["classes"][name]]
        if (
            entry.get("varies")
            or not isinstance(tied, dict)
            or not all(k.replace(".", "").replace("_", "").isalnum() for k in tied)
        ):
            continue
        listed = {each for tie in entry.get("ties", ()) for each in tie["names"]}
        assert {*tied, *tied.values()} <= listed, name
        checked += bool(tied)
    assert checked > 20


def test_the_flag_is_read_as_the_class_of_the_configuration_reads_it() -> None:
    """Qwen2.5-VL takes the text model's flag where its own is not there or false; VibeVoice takes no other."""
    for kind, name in (
        (transformers.Qwen2_5_VLConfig, "Qwen2_5_VLForConditionalGeneration"),
        (transformers.VibeVoiceConfig, "VibeVoiceForConditionalGeneration"),
    ):
        plain = kind().to_dict()
        for own in (None, True, False):
            for other in (None, True, False):
                fields = json.loads(json.dumps(plain, default=str))
                for part, value in ((fields, own), (fields["text_config"], other)):
                    part.pop("tie_word_embeddings", None)
                    part |= {} if value is None else {"tie_word_embeddings": value}
                model = known_model({**fields, "architectures": [name]})
                assert model is not None
                assert model.ties[0].flag.in_force(fields) == kind.from_dict(fields).tie_word_embeddings, (own, other)


def test_what_must_be_said_to_untie() -> None:
    forwards = Flag("", "FTFTTTFTF", other="text_config")
    assert forwards.off({"text_config": {"tie_word_embeddings": True}}) == {
        "tie_word_embeddings": False, "text_config.tie_word_embeddings": False,
    }  # fmt: skip
    assert forwards.off({"text_config": {}}) == {"tie_word_embeddings": False}
    assert Flag("", "TTTTTTTTT", means_more=True).off({}) == {}  # T5: false means another scaling, and cannot be said


def test_names_that_embed_and_that_head() -> None:
    embeddings, heads = ends_elsewhere()
    assert {"embed_tokens", "wte", "word_embeddings", "embeddings", "word_embedding", "shared"} <= set(embeddings)
    assert {"lm_head", "decoder", "proj_out", "embed_out", "output_projection"} <= set(heads)


EMBEDDING, LAYER = "body.embed_tokens.weight", "body.layers.0.q_proj.weight"


def unknown(path: Path, *, head: bool = False, **fields: Any) -> Path:
    """A base of an architecture that transformers does not have."""
    torch.manual_seed(0)
    held = {EMBEDDING: torch.randn(20, 8), LAYER: torch.randn(8, 8)} | ({"lm_head.weight": torch.randn(20, 8)} if head else {})
    path.mkdir()
    save_file(held, path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["MysteryForCausalLM"], "model_type": "mystery", "vocab_size": 20, **fields}
    (path / "config.json").write_text(json.dumps(config))
    return path


def adapter(path: Path, *, end: bool = True) -> Path:
    torch.manual_seed(1)
    module = f"base_model.model.{LAYER.removesuffix('.weight')}"
    held = {f"{module}.lora_A.weight": torch.randn(2, 8), f"{module}.lora_B.weight": torch.randn(8, 2)}
    held |= {f"base_model.model.{EMBEDDING}": torch.randn(20, 8)} if end else {}
    path.mkdir()
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"] if end else None,
    }
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def test_a_tie_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    base, ends = unknown(tmp_path / "base"), adapter(tmp_path / "ends")
    refused(base, [ends], UnsupportedAdapterError, EMBEDDING, "MysteryForCausalLM", "tied_head=")
    lorafold.merge(base, [adapter(tmp_path / "body", end=False)], tmp_path / "out")


def test_the_user_says_which_head_is_tied(tmp_path: Path) -> None:
    base, ends = unknown(tmp_path / "base"), adapter(tmp_path / "ends")
    lorafold.merge(base, [ends], tmp_path / "none", tied_head="none")
    assert tensors(tmp_path / "none").keys() == tensors(base).keys()
    for number, said in enumerate(("lm_head", f"lm_head.weight={EMBEDDING}")):
        out = tmp_path / str(number)
        lorafold.merge(base, [ends], out, tied_head=said)
        written = tensors(out)
        assert torch.equal(written["lm_head.weight"], tensors(base)[EMBEDDING])
        assert torch.equal(written[EMBEDDING], tensors(ends)[f"base_model.model.{EMBEDDING}"])
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert lorafold.verify(out, base, [ends]).failures == ()
    with pytest.raises(PlanError, match="not clear"):
        lorafold.plan(base, [ends], tied_head="lm_head=nowhere")


def test_both_ends_of_an_unknown_model_are_stored(tmp_path: Path) -> None:
    base = unknown(tmp_path / "base", head=True)
    lorafold.merge(base, [adapter(tmp_path / "ends")], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], tensors(base)["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_unknown_model_that_says_it_ties_nothing(tmp_path: Path) -> None:
    base = unknown(tmp_path / "base", tie_word_embeddings=False)
    lorafold.merge(base, [adapter(tmp_path / "ends")], tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()


def test_what_the_user_says_must_not_contradict_the_table(tmp_path: Path) -> None:
    base = unknown(tmp_path / "base", architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(PlanError, match="this architecture is known"):
        lorafold.plan(base, [adapter(tmp_path / "body", end=False)], tied_head="other_head")


def test_a_component_of_diffusers_has_no_vocabulary(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    torch.manual_seed(0)
    save_file({"proj_out.weight": torch.randn(8, 8), "blocks.0.q.weight": torch.randn(8, 8)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    lora = tmp_path / "lora"
    lora.mkdir()
    held = {
        "base_model.model.proj_out.lora_A.weight": torch.randn(2, 8),
        "base_model.model.proj_out.lora_B.weight": torch.randn(8, 2),
    }
    save_file(held, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj_out"]})
    )
    lorafold.merge(base, [lora], tmp_path / "out", only_changed=True)
    assert lorafold.plan(base, [lora]).config == {}
