"""loralib's files: every kind of layer merges to what loralib's own formulas give, and what the file cannot tell is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AdapterError, LorafoldError, ShapeMismatchError, UnsupportedAdapterError

ALPHA = ReadOptions(lora_alpha=6, allow_pickle=True)


def numbers(*shape: int) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact."""
    return torch.randint(-4, 5, shape).float()


def grouped(A: torch.Tensor, B: torch.Tensor, enabled: list[bool], out: int) -> torch.Tensor:
    """ΔW / scaling of a MergedLinear (loralib, `layers.py`, `merge_AB` and `zero_pad`)."""
    delta = torch.nn.functional.conv1d(A[None], B[:, :, None], groups=sum(enabled))[0]
    whole = torch.zeros(out, A.shape[1])
    whole[torch.tensor(enabled).repeat_interleave(out // len(enabled))] = delta
    return whole


def case(
    r: int, kernel: int, enabled: list[bool]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, an adapter for it as loralib saves it, and the ΔW / scaling of each weight."""
    out = 2 * len(enabled)
    n = sum(enabled)
    base = {
        "fc.weight": numbers(5, 7), "fc.bias": numbers(5), "emb.weight": numbers(11, 6), "qkv.weight": numbers(out, 7),
        "conv.weight": numbers(3, 4, kernel, kernel), "conv.bias": numbers(3), "line.weight": numbers(3, 4, kernel),
    }  # fmt: skip
    lora = {
        "fc.lora_A": numbers(r, 7), "fc.lora_B": numbers(5, r), "fc.bias": numbers(5),
        "emb.lora_A": numbers(r, 11), "emb.lora_B": numbers(6, r),
        "qkv.lora_A": numbers(r * n, 7), "qkv.lora_B": numbers(out // len(enabled) * n, r),
        "conv.lora_A": numbers(r * kernel, 4 * kernel), "conv.lora_B": numbers(3 * kernel, r * kernel),
        "line.lora_A": numbers(r, 4 * kernel), "line.lora_B": numbers(3, r),
    }  # fmt: skip
    deltas = {
        "fc.weight": lora["fc.lora_B"] @ lora["fc.lora_A"],
        "emb.weight": (lora["emb.lora_B"] @ lora["emb.lora_A"]).T,
        "qkv.weight": grouped(lora["qkv.lora_A"], lora["qkv.lora_B"], enabled, out),
        "conv.weight": (lora["conv.lora_B"] @ lora["conv.lora_A"]).view(base["conv.weight"].shape),
        "line.weight": (lora["line.lora_B"] @ lora["line.lora_A"]).view(base["line.weight"].shape),
    }
    return base, lora, deltas


@settings(max_examples=12, deadline=None)
@given(
    r=st.sampled_from([1, 2, 3, 6]), kernel=st.integers(1, 3), enabled=st.lists(st.booleans(), min_size=2, max_size=3).filter(any)
)
def test_every_layer(tmp_path_factory: pytest.TempPathFactory, r: int, kernel: int, enabled: list[bool]) -> None:
    folder = tmp_path_factory.mktemp("case")
    torch.manual_seed(r)
    base, lora, deltas = case(r, kernel, enabled)
    save_file(base, folder / "base.safetensors")
    torch.save({"model_state_dict": lora}, folder / "lora.pt")
    options = ReadOptions(lora_alpha=6, allow_pickle=True, enable_lora=tuple(enabled))
    lorafold.merge(folder / "base.safetensors", [folder / "lora.pt"], folder / "out", read_options=options)
    merged = load_file(next((folder / "out").glob("*.safetensors")))
    for name, weight in base.items():
        if name == "fc.bias":
            assert torch.equal(merged[name], lora[name])
        elif name in deltas:
            assert torch.equal(merged[name], weight + deltas[name] * (6 / r)), name
        else:
            assert torch.equal(merged[name], weight)
    proof = lorafold.verify(folder / "out", folder / "base.safetensors", [folder / "lora.pt"], read_options=options)
    assert not proof.failures


def written(folder: Path, lora: Any, base: dict[str, torch.Tensor] | None = None) -> tuple[Path, Path]:
    save_file(base or {"fc.weight": torch.ones(4, 3)}, folder / "base.safetensors")
    torch.save(lora, folder / "lora.pt")
    return folder / "base.safetensors", folder / "lora.pt"


def refusal(
    folder: Path, lora: Any, *parts: str, options: ReadOptions | None = ALPHA, kind: Any = LorafoldError, **more: Any
) -> None:
    base, path = written(folder, lora, **more)
    with pytest.raises(kind) as caught:
        lorafold.merge(base, [path], folder / "out", read_options=options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert not (folder / "out").exists()


def test_what_the_file_cannot_tell(tmp_path: Path) -> None:
    good = {"fc.lora_A": torch.ones(2, 3), "fc.lora_B": torch.ones(4, 2)}
    refusal(tmp_path, good, "lora.pt", "a pickle", "allow_pickle=True", options=None, kind=UnsupportedAdapterError)
    refusal(tmp_path, good, "do not hold lora_alpha", "lora_alpha=16", options=ReadOptions(allow_pickle=True))
    blocks = {"fc.lora_A": torch.ones(4, 3), "fc.lora_B": torch.ones(4, 2)}
    base = {"fc.weight": torch.ones(6, 3)}
    refusal(tmp_path, blocks, "enable_lora=", base=base, kind=ShapeMismatchError)


def test_what_is_in_the_file_and_should_not_be(tmp_path: Path) -> None:
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    refusal(tmp_path, {"fc.lora_A": A}, "fc has lora_A but no lora_B", kind=AdapterError)
    refusal(tmp_path, {"fc.lora_A": A, "fc.lora_B": B, "fc.weight": torch.ones(4, 3)}, "'fc.weight' is no part of a module")
    refusal(tmp_path, {"fc.lora_A": A, "fc.lora_B": torch.ones(4, 3)}, "'fc.lora_B' must be (out, r)", "[4, 3]")
    refusal(tmp_path, {"fc.lora_A": A, "fc.lora_B": B, "epoch": 3}, "'epoch' must be a tensor")
    refusal(tmp_path, {"fc.lora_A": A.T.contiguous().T, "fc.lora_B": B}, "'fc.lora_A' is a view", ".contiguous()")
    refusal(tmp_path, {"fc.lora_A": A.int(), "fc.lora_B": B}, "'fc.lora_A' is of type I32")


def test_what_lorafolds_own_layers_save(tmp_path: Path) -> None:
    """The file road and the live road give the same weights."""
    torch.manual_seed(5)
    model = torch.nn.ModuleDict({
        "fc": lorafold.nn.Linear(7, 5, r=3, lora_alpha=6),
        "emb": lorafold.nn.Embedding(11, 6, r=2, lora_alpha=6),
        "qkv": lorafold.nn.MergedLinear(7, 9, r=2, lora_alpha=6, enable_lora=[True, False, True]),
        "conv": lorafold.nn.Conv2d(4, 3, 3, r=2, lora_alpha=6),
    })  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(numbers(*parameter.shape))
            if "lora_" in name:
                parameter.mul_(0.5)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    save_file(base, tmp_path / "base.safetensors")
    torch.save(lorafold.nn.lora_state_dict(model), tmp_path / "lora.pt")
    options = ReadOptions(lora_alpha=6, allow_pickle=True, enable_lora=(True, False, True))
    lorafold.merge(tmp_path / "base.safetensors", [tmp_path / "lora.pt"], tmp_path / "out", read_options=options)
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    model.eval()
    live = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert merged.keys() == live.keys() == base.keys()
    for name, module in model.items():
        weight = "conv.conv.weight" if name == "conv" else f"{name}.weight"
        assert torch.equal(merged[weight], module.weight.detach()), name
        assert not torch.equal(merged[weight], base[weight])
