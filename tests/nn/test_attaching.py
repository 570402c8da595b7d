from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafold.errors import LayerError
from lorafold.nn.attaching import add_adapter, attach, detach, remove_adapter, untie
from lorafold.nn.layers.conv import Conv2d, ConvLoRA
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear
from lorafold.nn.layers.mergeable import Mergeable
from lorafold.nn.merging_layers import merge
from lorafold.nn.select import select
from lorafold.nn.training import mark_only_lora_as_trainable


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=20,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2)).eval()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4, padding_idx=0)
        self.conv = nn.Conv2d(4, 6, (3, 1), stride=2, groups=2, padding_mode="circular", padding=1)
        self.fc = nn.Linear(6, 4, bias=False)
        self.act = nn.ReLU()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("fc", ["fc"]),
        (["blocks.0", "emb"], ["emb", "blocks.0"]),
        ("blocks.[02]", ["blocks.0", "blocks.2"]),
        ("*", ["emb", "conv", "fc", "blocks.0", "blocks.1", "blocks.2"]),
        ("all-linear", ["fc", "blocks.0", "blocks.1", "blocks.2"]),
        (["all-linear", "conv"], ["conv", "fc", "blocks.0", "blocks.1", "blocks.2"]),
        ("1", ["blocks.1"]),
    ],
)
def test_targets(targets: Any, names: list[str]) -> None:
    model = Mixed()
    assert select(model, targets) == names
    assert attach(model, targets, r=2) == names
    assert [name for name, module in model.named_modules() if isinstance(module, Mergeable)] == names


@pytest.mark.parametrize(
    ("targets", "message", "hint"),
    [
        (["cnv"], "no module is named 'cnv'", "did you mean 'conv'?"),
        (["fc", "q_*"], "no module is named 'q_\\*'", None),
        ("act", "act is a torch.nn.modules.activation.ReLU, which cannot take", "their subclasses cannot"),
        ("ac*", "act is a torch.nn.modules.activation.ReLU, which cannot take", None),
        ([], "no targets were given", None),
    ],
)
def test_targets_that_mean_nothing(targets: Any, message: str, hint: str | None) -> None:
    model = Mixed()
    with pytest.raises(LayerError, match=message) as caught:
        attach(model, targets, r=2)
    if hint:
        assert hint in str(caught.value)
    assert not any(isinstance(module, Mergeable) for module in model.modules())


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(LayerError, match="the model has no plain linear layer"):
        attach(nn.Sequential(nn.ReLU()), "all-linear", r=2)


def test_subclasses_and_lora_layers_are_refused_by_name() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "fc": Linear(4, 4, r=2)})
    with pytest.raises(LayerError, match=r"mha\.out_proj is a .*NonDynamicallyQuantizableLinear"):
        attach(model, "out_proj", r=2)
    with pytest.raises(LayerError, match="fc is a LoRA layer already"):
        attach(model, "fc", r=2)


@pytest.mark.parametrize(
    "kw", [{"r": 0}, {"r": -1}, {"r": 2, "lora_alpha": float("inf")}, {"r": 2, "lora_dropout": 2.0}, {"r": 2, "undo": "x"}]
)
def test_settings_are_checked_before_anything_is_replaced(kw: dict[str, Any]) -> None:
    model = Mixed()
    with pytest.raises(LayerError):
        attach(model, "all-linear", **kw)
    assert not any(isinstance(module, Mergeable) for module in model.modules())


def test_parameters_are_the_same_objects_and_outputs_the_same_numbers() -> None:
    model = Mixed().eval()
    before, twin = dict(model.named_parameters()), copy.deepcopy(model)
    attach(model, "*", r=2)
    after = {id(p) for p in model.parameters()}
    assert all(id(p) in after for p in before.values())
    assert (type(model.emb), type(model.conv), type(model.fc)) == (Embedding, ConvLoRA, Linear)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model.conv(x), twin.conv(x))
    assert torch.equal(model.emb(torch.arange(5)), twin.emb(torch.arange(5)) + 0 * model.emb.lora_A.sum())
    assert not model.fc.training
    assert not model.fc.merged
    assert model.emb.padding_idx == 0


def test_all_parents_of_a_shared_module_get_the_layer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    attach(model, "one", r=2)
    assert model["one"] is model["two"][0]
    assert isinstance(model["one"], Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_a_half_precision_base_are_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    attach(model, "0", r=2)
    assert model[0].lora_A.dtype == torch.float32
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    attach(model, "0", r=2, dtype=dtype)
    assert model[0].lora_A.dtype == dtype


def test_gpt2_and_its_transposed_weights() -> None:
    model, plain = gpt2(), gpt2()
    names = attach(model, "all-linear", r=2)
    assert names == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    for layer in model.modules():
        if isinstance(layer, Linear):
            nn.init.normal_(layer.lora_B)
    x = torch.randint(0, 20, (2, 5))
    unmerged = model(x).logits
    merge(model)
    # float32 sums of 16 to 64 terms, through one layer
    torch.testing.assert_close(model(x).logits, unmerged, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(unmerged, plain(x).logits)
    assert detach(model) == names
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert torch.equal(model(x).logits, plain(x).logits)


def test_all_linear_leaves_the_output_layer() -> None:
    names = attach(llama(), "all-linear", r=2)
    assert "lm_head" not in names
    assert len(names) == 14


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_refused_or_untied_on_request(target: str) -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(LayerError, match=r"is also (lm_head|model\.embed_tokens)\.weight"):
        attach(model, target, r=2)
    x = torch.randint(0, 20, (1, 5))
    y = model(x).logits
    assert untie(model) == ["lm_head"]
    assert model.config.tie_word_embeddings is False
    attach(model, target, r=2)
    assert torch.equal(model(x).logits, y)
    embedding = model.model.embed_tokens.weight.detach().clone()
    merge(model)
    assert torch.equal(embedding, model.model.embed_tokens.weight)


def test_detach_gives_back_the_very_model() -> None:
    model = Mixed()
    plain, parameters = copy.deepcopy(model), dict(model.named_parameters())
    modules = dict(model.named_modules())
    attach(model, "*", r=2)
    merge(model)
    detach(model)
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, dict(plain.named_parameters())[name]) for name, p in model.named_parameters())


def test_detach_with_the_adapters_merged_for_good() -> None:
    model = nn.Sequential(Linear(4, 4, r=2), Embedding(5, 3, r=2), Conv2d(2, 2, 1, r=1))
    for layer in model:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    merge(model)
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    detach(model, merge_first=True)
    assert [type(module) for module in model] == [nn.Linear, nn.Embedding, nn.Conv2d]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias"]
    assert torch.equal(model[0].weight, merged["0.weight"])
    assert torch.equal(model[2].weight, merged["2.conv.weight"])


def test_what_detach_refuses() -> None:
    with pytest.raises(LayerError, match="itself a LoRA layer"):
        detach(Linear(4, 4, r=2))
    with pytest.raises(LayerError, match="no plain layer of torch stores"):
        detach(nn.Sequential(Linear(4, 4, r=2, fan_in_fan_out=True)))


def test_named_adapters_of_a_whole_model() -> None:
    model = Mixed()
    attach(model, "all-linear", r=2)
    assert add_adapter(model, "style", r=1) == ["fc", "blocks.0", "blocks.1", "blocks.2"]
    model.fc.remove_adapter("style")
    with pytest.raises(LayerError, match="already"):
        add_adapter(model, "style", r=1)
    assert "style" not in model.fc.adapter_names  # the one that was added before the failure is gone again
    remove_adapter(model, "style")
    with pytest.raises(LayerError, match="is in no layer"):
        remove_adapter(model, "style")
    assert model.blocks[0].adapter_names == ["default"]


def test_only_adapters_train() -> None:
    model = llama()
    attach(model, ["q_proj"], r=2)
    mark_only_lora_as_trainable(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4
    assert all(".q_proj.lora_" in name for name in trainable)
    with pytest.raises(LayerError, match="bias must be one of"):
        mark_only_lora_as_trainable(model, bias="some")  # type: ignore[arg-type]
