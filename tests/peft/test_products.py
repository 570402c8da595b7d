"""PEFT's LoHa and LoKr, held to PEFT's own merge: its alpha and rank, for every layer that it knows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold import ReadOptions
from lorafold.errors import AdapterError, UnsupportedAdapterError
from models import edit_json, edit_tensors, refused, save_adapter


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other, self.head = nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 3)
        self.conv, self.one, self.line = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv1d(4, 6, 3)


def made(path: Path, kind: str, **config: Any) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    """Base, adapter, the base's tensors, and what PEFT merges both to, in float64."""
    import peft

    torch.manual_seed(0)
    model = Layers().double()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    (path / "base").mkdir()
    save_file(held, path / "base" / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(init_weights=False, **config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and "modules_to_save" in name:
                    parameter.add_(0.5)
        wrapped.save_pretrained(path / "adapter")
        merged = wrapped.double().merge_and_unload().state_dict()
    return path / "base", path / "adapter", held, {name: value.clone() for name, value in merged.items()}


FLAT, ALL = ["lin", "other"], ["lin", "other", "conv", "one", "line"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHa", {"target_modules": ALL, "r": 3, "alpha": 16}),
    "LoHa of low rank": ("LoHa", {"target_modules": ALL, "r": 1, "alpha": 5}),
    "LoHa with core tensors": ("LoHa", {"target_modules": ALL, "r": 2, "alpha": 8, "use_effective_conv2d": True}),
    "LoHa, patterns": (
        "LoHa", {"target_modules": FLAT, "r": 4, "alpha": 8, "rank_pattern": {"lin": 2}, "alpha_pattern": {"^other": 3}},
    ),
    "LoHa, a head saved": ("LoHa", {"target_modules": FLAT, "r": 2, "alpha": 8, "modules_to_save": ["head"]}),
    "LoKr": ("LoKr", {"target_modules": [*FLAT, "conv", "one"], "r": 2, "alpha": 16}),
    "LoKr, both decomposed": (
        "LoKr", {"target_modules": FLAT, "r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    ),
    "LoKr, both whole": ("LoKr", {"target_modules": FLAT, "r": 32, "alpha": 8, "rank_pattern": {"other": 64}}),
    "LoKr with core tensors": ("LoKr", {"target_modules": ["conv"], "r": 1, "alpha": 4, "use_effective_conv2d": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_as_peft_merges_it(tmp_path: Path, case: str) -> None:
    """In float64; PEFT saves and adds its factors in float32, whose 24 bits hold some 2⁻²⁰ of sums of products of four."""
    kind, config = KINDS[case]
    base, adapter, held, wanted = made(tmp_path, kind, **config)
    lorafold.merge(base, [adapter], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in held if not torch.equal(held[name], found[name])}
    assert changed >= {f"{name}.weight" for name in config["target_modules"]}
    for name, value in wanted.items():
        difference, size = (found[name] - value).norm(), (held[name] - value).norm()
        assert difference <= 2.0**-18 * size, (name, difference / size if size else difference)
    with pytest.raises(lorafold.LorafoldError):
        lorafold.plan(base, [adapter], read_options=ReadOptions(format="lycoris"))


def test_what_it_lacks_is_refused(tmp_path: Path) -> None:
    base, adapter, _, _ = made(tmp_path, "LoHa", target_modules=FLAT, r=2, alpha=8)
    whole = load_file(adapter / "adapter_model.safetensors")
    edit_tensors(adapter, lambda held: {name: t for name, t in held.items() if "lin.hada_w2_b" not in name})
    refused(base, [adapter], AdapterError, "lin has hada_w1_a, hada_w1_b, hada_w2_a, but no hada_w2_b")
    edit_tensors(adapter, lambda held: {name: t for name, t in whole.items() if ".other." not in name})
    refused(base, [adapter], AdapterError, "holds nothing for 1 of the 2 target_modules", "other")
    edit_tensors(adapter, lambda held: whole | {"base_model.model.norm.weight": torch.ones(3)})
    refused(base, [adapter], AdapterError, "norm.weight")
    edit_tensors(adapter, lambda held: whole)
    edit_json(adapter / "adapter_config.json", r=3)
    refused(base, [adapter], AdapterError.__subclasses__()[0], "r says rank 3 for lin")
    edit_json(adapter / "adapter_config.json", r=2, use_dora=True)
    refused(base, [adapter], UnsupportedAdapterError, "use_dora beside peft_type LOHA")


def test_a_convolution_of_one_dimension_in_lokr_is_refused(tmp_path: Path) -> None:
    base, adapter, _, _ = made(tmp_path, "LoKr", target_modules=["line"], r=8, alpha=8)
    refused(base, [adapter], UnsupportedAdapterError, "line is LoKr on a convolution of one dimension")


def test_a_lora_that_calls_itself_loha_is_refused(tmp_path: Path) -> None:
    base, _, _, _ = made(tmp_path, "LoHa", target_modules=FLAT, r=2, alpha=8)
    adapter = save_adapter(Layers(), tmp_path / "lora", target_modules=FLAT)
    edit_json(adapter / "adapter_config.json", peft_type="LOHA")
    refused(base, [adapter], UnsupportedAdapterError, "peft_type is 'LOHA'")
