"""Every kind of change under settings of torch that a training script may have made: the same bytes, and the base again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold

SIZE = 16
SMALL = 2.0**-128  # products with ordinary numbers are subnormal in float32 and bfloat16


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.where(torch.rand(shape) < 0.5, 1.0, 2.0**-20)


KINDS = {
    "whole": {"diff": (SIZE, SIZE)},
    "loha": {f"hada_w{i}_{side}": shape for i in (1, 2) for side, shape in (("a", (SIZE, 2)), ("b", (2, SIZE)))},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "lokr of products": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "dora": {"lora_down": (2, SIZE), "lora_up": (SIZE, 2), "dora_scale": (SIZE, 1)},
    "dora by input": {"lora_down": (2, SIZE), "lora_up": (SIZE, 2), "dora_scale": (1, SIZE)},
    "oft": {"oft_blocks": (4, 4, 4)},
    "boft": {"oft_blocks": (2, 4, 4, 4)},
    "glora": {"a1": (SIZE, 2), "a2": (2, SIZE), "b1": (SIZE, 2), "b2": (2, SIZE)},
    "ia3": {"weight": (SIZE, 1), "on_input": ()},
}
MATRICES = ("lora_down", "lora_up", "a1", "a2", "b1", "b2")


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "flushed": flushed,
    "float64": wide,
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file({"block.layer.weight": _randn(SIZE, SIZE) * SMALL}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    tensors = {}
    for part, shape in KINDS[request.param].items():
        name = f"lycoris_block_layer.{part}" + (".weight" if part in MATRICES else "")
        tensors[name] = torch.ones(1)[0] if part == "on_input" else _randn(*shape)
        if part in ("diff", "lora_up", "b1", "hada_w1_a", "lokr_w1", "lokr_w1_a"):
            tensors[name] *= SMALL
        elif part == "dora_scale":
            tensors[name] = tensors[name].abs() * SMALL
    if "oft" not in request.param and request.param not in ("whole", "ia3"):
        tensors["lycoris_block_layer.alpha"] = torch.tensor(1.5)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_file(tensors, path)
    return path


def merged(base: Path, adapter: Path, out: Path) -> dict[str, bytes]:
    out.mkdir()
    found = {}
    for dtype in (None, "bfloat16", "float64"):
        lorafold.merge(base, [(adapter, 0.75)], out / str(dtype), dtype=dtype)
        found[str(dtype)] = (out / str(dtype) / "diffusion_pytorch_model.safetensors").read_bytes()
    return found


def test_no_setting_changes_a_bit(tmp_path: Path, base: Path, adapter: Path) -> None:
    expected = merged(base, adapter, tmp_path / "before")
    assert expected["None"] != (base / "diffusion_pytorch_model.safetensors").read_bytes()
    for name, setting in SETTINGS.items():
        with setting():
            found = merged(base, adapter, tmp_path / name)
            lorafold.merge(base, [(adapter, 0.75)], tmp_path / name / "undone", undo=tmp_path / name / "undo.safetensors")
            lorafold.unmerge(tmp_path / name / "undone", tmp_path / name / "back", undo=tmp_path / name / "undo.safetensors")
        assert found == expected, name
        back = tmp_path / name / "back" / "diffusion_pytorch_model.safetensors"
        assert back.read_bytes() == (base / "diffusion_pytorch_model.safetensors").read_bytes()


def is_sum(adapter: Path) -> bool:
    """Whether it adds to a weight; another may then do so too."""
    parts = {name.split(".")[1] for name in load_file(adapter)}
    return not parts & {"oft_blocks", "a1", "on_input"}


def test_the_same_on_a_quantised_base(tmp_path: Path, adapter: Path) -> None:
    """What is made of decoded numbers is what is made of the same numbers in floats, whatever the kind."""
    torch.manual_seed(3)
    name = "block.layer.weight"
    codes, scale = torch.randn(SIZE, SIZE).to(torch.float8_e4m3fn), torch.tensor(0.25)
    for folder, held in (
        ("coded", {name: codes, "block.layer.scale_weight": scale}),
        ("plain", {name: codes.float() * scale}),
    ):
        (tmp_path / folder).mkdir()
        save_file(held, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    beside = {
        "lycoris_block_layer.lora_down.weight": torch.randn(2, SIZE),
        "lycoris_block_layer.lora_up.weight": torch.randn(SIZE, 2),
    }
    save_file(beside, tmp_path / "beside.safetensors")
    for dtype, output, given in (
        ("bfloat16", "bf16", [(adapter, 0.75)]),
        ("float32", "fp32", [(adapter, 0.75)]),
        ("float16", "fp16", [(adapter, 0.75), *([(tmp_path / "beside.safetensors", 1.0)] if is_sum(adapter) else [])]),
    ):
        lorafold.merge(tmp_path / "coded", given, tmp_path / f"coded-{dtype}", output_format=output)
        lorafold.merge(tmp_path / "plain", given, tmp_path / f"plain-{dtype}", dtype=dtype)
        one, two = (load_file(tmp_path / f"{base}-{dtype}" / "diffusion_pytorch_model.safetensors") for base in ("coded", "plain"))
        assert one.keys() == two.keys() == {name}
        assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name].float(), codes.float() * scale)
