"""A part of `benchmarks/architectures.py`: types of models whose ties were once guessed wrong or not seen, each case of each.

Beside it what the benchmark does not make: ends that a file stores apart, ties that PEFT trains, a tie of three.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.planning.known import known_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, at what is tried here on purpose
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
TYPES = ("mamba", "ctrl", "modernbert", "t5", "idefics3", "xlnet")


@pytest.fixture(scope="module")
def sweep() -> Any:
    spec = importlib.util.spec_from_file_location("architectures_swept", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _with_the_bias_of_heads(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT computes with the bias of a head whose embedding has trained rows, which it leaves out (see the benchmark)."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    monkeypatch.setattr(TrainableTokensLayer, "forward_adapters", TrainableTokensLayer.forward_adapters)  # put back after
    sweep.mended()


@pytest.mark.parametrize("name", TYPES)
def test_merged_files_load_as_what_peft_computes(sweep: Any, name: str) -> None:
    found = sweep.examined(name)
    assert {
        case: why
        for case, why in found.items()
        if why[0] == "wrong" or (why[0] == "refused" and sweep.MEMORY not in case) or case == "build"
    } == {}
    assert sum(outcome == "right" for case, (outcome, _) in found.items() if sweep.MEMORY not in case) >= 5
    apart = [why for case, (outcome, why) in found.items() if outcome == "refused"]  # a model's own tie cannot come apart in memory
    assert all("share their memory" in why for why in apart), apart


def loaded(sweep: Any, kind: Any, path: Path) -> Any:
    return sweep.plainly(kind.from_pretrained(path, dtype=torch.float64))


@pytest.mark.parametrize("name", ["llama", "mamba", "ctrl"])
def test_ends_that_are_called_tied_and_stored_with_different_numbers(sweep: Any, name: str, tmp_path: Path) -> None:
    """transformers loads each as it is stored, so each gets its own update."""
    model, inputs = sweep.built(name)
    base = tmp_path / "base"
    model.save_pretrained(base)
    held = load_file(base / "model.safetensors")
    known = known_model(model.config.to_dict() | {"architectures": [type(model).__name__]})
    assert known is not None
    (missing,) = [each for tie in known.ties for each in tie.stored if each not in held]
    held[missing] = torch.randn(64, 32, dtype=torch.float64) * 0.15
    save_file(held, base / "model.safetensors", {"format": "pt"})
    model = loaded(sweep, type(model), base)
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for case in ("embedding", "head", "both", "saved", "both saved", "rows"):
        folder = tmp_path / case.replace(" ", "")
        folder.mkdir()
        outcomes = list(sweep.tried(case, base, folder, model, inputs))
        assert [outcome for outcome, _ in outcomes] == ["right", "right"], (case, outcomes)


@pytest.mark.parametrize("name", ["llama", "mamba", "ctrl"])
def test_a_head_that_peft_trains_because_it_is_tied(sweep: Any, name: str, tmp_path: Path) -> None:
    """Against the model as it was trained: PEFT loads such an adapter without its head's LoRA where the embedding has another
    name than Llama's (seen with 0.21.2), though the file has it."""
    model, inputs = sweep.built(name)
    base, kind = tmp_path / "base", type(model)
    model.save_pretrained(base)
    model = loaded(sweep, kind, base)
    embedding, head = sweep.names_of(model)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[embedding, head], ensure_weight_tying=True)
    trained = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in trained.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    trained.save_pretrained(tmp_path / "adapter")
    wanted = sweep.outputs(sweep.plainly(trained), inputs)
    lorafold.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = loaded(sweep, kind, tmp_path / "out")
    found = sweep.outputs(merged, inputs)
    assert float((found - wanted).abs().max()) < sweep.ALLOWED * float(wanted.abs().max())
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # still tied: one update, merged once


def test_rows_of_an_embedding_that_three_modules_share(sweep: Any, tmp_path: Path) -> None:
    """SeamlessM4T: PEFT trains rows of the decoder's embedding; the file has that of `shared` alone."""
    sizes = {
        "vocab_size": 64, "t2u_vocab_size": 64, "hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
        "speech_encoder_layers": 1, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1, "pad_token_id": 0,
    }  # fmt: skip
    kind = transformers.SeamlessM4TForTextToText
    torch.manual_seed(0)
    model = sweep.plainly(kind(transformers.SeamlessM4TConfig(**sizes, tie_word_embeddings=True)))
    base = tmp_path / "base"
    model.save_pretrained(base)
    model = loaded(sweep, kind, base)
    inputs = {"input_ids": torch.tensor([[3, 5, 9, 33, 12, 7, 21, 4]]), "decoder_input_ids": torch.tensor([[3, 4, 9, 40]])}
    for case in ("embedding", "rows", "rows + head", "both saved"):
        folder = tmp_path / case.replace(" ", "")
        folder.mkdir()
        outcome, why = next(iter(sweep.tried(case, base, folder, model, inputs)))
        assert outcome == "right", (case, why)
