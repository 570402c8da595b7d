"""Random configurations of PEFT on small models: what lorafold merges does what PEFT's unmerged model does, or is refused by name.

A few in the suite, `make fuzz-peft EXAMPLES=2000` for a long run. Hypothesis makes what it finds smaller. The oracle is the forward
of PEFT's own model, saved and loaded again, with nothing merged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold.errors import AmbiguousNameError, LorafoldError, UnmatchedAdapterError

EXAMPLES = int(os.environ.get("LORAFOLD_FUZZ_PEFT", "0")) or 60
SEEDED = EXAMPLES == 60
BOUND = 1e-7
"""Of the largest output. All is in float64 but for the norms of DoRA, which PEFT takes in float32 where its layer says so: 2⁻²⁴ is
6e-8, of a weight. Any factor that is wrong moves the outputs by more than 1e-3: updates are of the size of the weights."""


class Mixed(nn.Module):
    """A layer of each kind that PEFT knows; some square, Conv1D before and after attention."""

    def __init__(self, order: int = 0, blocks: int = 2) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(12, 8)
        make = {
            "c_fc": lambda: Conv1D(8, 8), "fc": lambda: nn.Linear(8, 8),
            "attn": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "up": lambda: nn.Linear(8, 12, bias=False), "down": lambda: nn.Linear(12, 8), "c_attn": lambda: Conv1D(12, 8),
            "back": lambda: nn.Linear(12, 8),
        }  # fmt: skip
        names = list(make)[order:] + list(make)[:order]
        self.layers = nn.ModuleList(nn.ModuleDict({name: make[name]() for name in names}) for _ in range(blocks))
        self.conv, self.norm, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = x + layer["fc"](layer["c_fc"](x).tanh())
            x = x + layer["attn"](x, x, x, need_weights=False)[0]
            x = x + layer["down"](layer["up"](x).tanh()) + layer["back"](layer["c_attn"](x).tanh())
        return self.head(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


TEXT = {
    "vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "mixed": ("", {}), "mixed after": ("", {"order": 3}),
    "llama": ("LlamaForCausalLM", TEXT), "llama biased": ("LlamaForCausalLM", TEXT | {"attention_bias": True, "mlp_bias": True}),
    "gpt2": ("GPT2LMHeadModel", TEXT | {"n_layer": 2, "n_positions": 16, "tie_word_embeddings": False}),
    "phi": ("PhiForCausalLM", TEXT | {"num_key_value_heads": 2}), "opt": ("OPTForCausalLM", {
        **TEXT, "ffn_dim": 12, "word_embed_proj_dim": 8, "tie_word_embeddings": False,
    }),
}  # fmt: skip
NAMES = {
    "mixed": ("c_fc", "fc", "attn", "up", "down", "c_attn", "back", "conv", "emb"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
HEADS = {"mixed": "head", "llama": "lm_head", "gpt2": "lm_head", "phi": "lm_head", "opt": "lm_head"}


def configurations(kind: str) -> Any:
    """What a LoraConfig may be told for a model of `kind`, as a strategy of keyword arguments."""
    names = NAMES[kind.split()[0]]
    some = st.lists(st.sampled_from([*names, "query_key_value", "wqkv"]), min_size=1, max_size=4, unique=True)
    pattern = st.sampled_from([*names, "layers.0.*", "^.*1.*", "nothing", "out_proj", "layers.1.attn"])
    kept = HEADS[kind.split()[0]]
    return st.fixed_dictionaries(
        {"r": st.integers(1, 4), "lora_alpha": st.sampled_from([1, 3, 8, -2]), "target_modules": some},
        optional={
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "rank_pattern": st.dictionaries(pattern, st.integers(1, 5), max_size=2),
            "alpha_pattern": st.dictionaries(pattern, st.sampled_from([1, 5, 16]), max_size=2),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "lora_bias": st.booleans(),
            "fan_in_fan_out": st.booleans(),
            "modules_to_save": st.sampled_from([[kept], [kept, "absent"], ["norm"]]),
            "exclude_modules": st.sampled_from([[names[0]], rf".*\.1\..*{names[1]}"]),
            "layers_to_transform": st.sampled_from([0, [0], [1]]),
        },
    )


def model(kind: str, seed: int = 0) -> nn.Module:
    """The small model `kind`, of random numbers in float64."""
    import transformers

    torch.manual_seed(seed)
    name, fields = SMALL[kind]
    if not name:
        made: nn.Module = Mixed(**fields)
    else:
        cls = getattr(transformers, name)
        made = cls(cls.config_class(**fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.double().eval()


def outputs(made: nn.Module) -> Tensor:
    ids = torch.tensor([[1, 5, 9, 3, 11, 7], [2, 4, 8, 0, 6, 10]])
    with torch.no_grad():
        found = made(ids)
    return found if isinstance(found, Tensor) else found.logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def trained(kind: str, fields: dict[str, Any], folder: Path) -> Tensor | None:
    """Base and adapter in `folder`, and what PEFT's model computes with both; None where PEFT itself refuses."""
    import peft

    base = model(kind)
    (folder / "base").mkdir(parents=True)
    save_file(
        {name: value.clone() for name, value in base.state_dict().items()}, folder / "base" / "model.safetensors", {"format": "pt"}
    )
    config = getattr(base, "config", None)
    (folder / "base" / "config.json").write_text(config.to_json_string(use_diff=False) if config is not None else "{}")
    try:
        with quiet():
            wrapped = peft.get_peft_model(base, peft.LoraConfig(**fields), autocast_adapter_dtype=False)
            torch.manual_seed(7)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            wrapped.save_pretrained(folder / "adapter")
            again = peft.PeftModel.from_pretrained(model(kind), folder / "adapter", autocast_adapter_dtype=False)
            return outputs(again.double().eval())
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AttributeError, IndexError):
        return None


def refusal(error: LorafoldError, fields: dict[str, Any], kind: str) -> str:
    """Why an adapter may be refused, in a word; what is not foreseen is a fault."""
    text = str(error)
    if isinstance(error, AmbiguousNameError) and "fan_in_fan_out" in text:
        return "square weights or attention beside Conv1D"
    if isinstance(error, UnmatchedAdapterError) and fields.get("lora_bias") and "has a lora_bias, but the base has no" in text:
        return "lora_bias where no field of config.json gives the bias"
    if fields.get("lora_bias") and "attention's output projection with a lora_bias" in text:
        return "lora_bias of attention"
    raise error


@pytest.mark.parametrize("kind", SMALL)
def test_what_peft_computes(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    number, counts = iter(range(10**9)), Counter[str]()

    @settings(
        max_examples=max(1, EXAMPLES // len(SMALL)), deadline=None, derandomize=SEEDED, suppress_health_check=list(HealthCheck)
    )
    @given(fields=configurations(kind))
    def check(fields: dict[str, Any]) -> None:
        folder = root / str(next(number))
        try:
            counts[one(kind, fields, folder)] += 1
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    check()
    print(f"{kind}:", ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    assert counts["merged"], counts


def one(kind: str, fields: dict[str, Any], folder: Path) -> str:
    """What became of one configuration: "merged" where files and memory both do what PEFT does."""
    wanted = trained(kind, fields, folder)
    if wanted is None or not wanted.isfinite().all():
        return "refused by PEFT"
    try:
        lorafold.merge(folder / "base", [folder / "adapter"], folder / "out", verify=False)
    except LorafoldError as error:
        return refusal(error, fields, kind)
    found = model(kind, seed=1)
    found.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    told = json.dumps(fields), lorafold.plan(folder / "base", [folder / "adapter"]).notes
    scale = wanted.abs().max()
    assert (outputs(found) - wanted).abs().max() <= BOUND * scale, told
    live = model(kind)
    try:
        merged = lorafold.merge_into(live, [folder / "adapter"])
    except LorafoldError as error:
        return refusal(error, fields, kind)
    with merged:
        assert (outputs(live) - wanted).abs().max() <= BOUND * scale, told
    return "merged"


if __name__ == "__main__":
    import sys

    sys.exit(pytest.main([__file__, "-q", "-n", "0", "-s"]))
