"""Run the real loralib 0.1.2 and write down what it does: golden.json and golden.safetensors, beside this file.

    python tests/loralib/make_golden.py

pip puts loralib into a folder of its own for it, so that neither package sees the other. The files are made once and committed;
the tests read them and never run loralib.

Parameters, inputs and output gradients are small multiples of powers of two, and so are the scalings. Every sum of their products
is then exact in float32, whatever the order of the additions, and equal means equal bits on every machine.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
SEED = 20260101
ATTRIBUTES = ("r", "lora_alpha", "merged", "merge_weights", "scaling")

CASES: dict[str, tuple[str, list[Any], dict[str, Any], list[int]]] = {
    "linear": ("Linear", [6, 4], {"r": 2, "lora_alpha": 4}, [3, 6]),
    "linear_r0": ("Linear", [6, 4], {}, [3, 6]),
    "linear_nobias": ("Linear", [6, 4], {"r": 3, "lora_alpha": 3, "bias": False}, [2, 3, 6]),
    "linear_fan": ("Linear", [6, 4], {"r": 2, "lora_alpha": 1, "fan_in_fan_out": True}, [3, 6]),
    "linear_separate": ("Linear", [6, 4], {"r": 2, "lora_alpha": 4, "merge_weights": False}, [3, 6]),
    "embedding": ("Embedding", [10, 4], {"r": 2, "lora_alpha": 4}, [3, 5]),
    "embedding_r0": ("Embedding", [10, 4], {}, [3, 5]),
    "embedding_padding": ("Embedding", [10, 4], {"r": 2, "lora_alpha": 2, "padding_idx": 1}, [3, 5]),
    "merged": ("MergedLinear", [6, 12], {"r": 2, "lora_alpha": 4, "enable_lora": [True, False, True]}, [3, 6]),
    "merged_all": ("MergedLinear", [6, 12], {"r": 2, "lora_alpha": 4, "enable_lora": [True, True]}, [2, 3, 6]),
    "merged_fan": (
        "MergedLinear", [6, 12], {"r": 2, "lora_alpha": 4, "enable_lora": [False, True, True], "fan_in_fan_out": True}, [3, 6],
    ),
    "merged_r0": ("MergedLinear", [6, 12], {}, [3, 6]),
    "conv2d": ("Conv2d", [4, 6, 3], {"r": 2, "lora_alpha": 4, "padding": 1, "stride": 2}, [2, 4, 5, 7]),
    "conv2d_groups": ("Conv2d", [4, 6, 3], {"r": 2, "lora_alpha": 4, "groups": 2}, [2, 4, 5, 7]),
    "conv2d_r0": ("Conv2d", [4, 6, 3], {}, [2, 4, 5, 7]),
    "conv1d_k1": ("Conv1d", [4, 6, 1], {"r": 2, "lora_alpha": 4}, [2, 4, 5]),
    "conv3d_k1": ("Conv3d", [4, 6, 1], {"r": 2, "lora_alpha": 4}, [2, 4, 3, 5, 2]),
}  # fmt: skip


def dyadic(shape: list[int] | torch.Size, generator: torch.Generator) -> Tensor:
    """Multiples of 1/4 from −2 to 2."""
    return torch.randint(-8, 9, tuple(shape), generator=generator).float() / 4


def run_case(lora: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind, args, kwargs, shape = CASES[name]
    torch.manual_seed(SEED)
    layer = getattr(lora, kind)(*args, **kwargs)
    tensors[f"{name}.next"] = torch.rand(4)  # the same only where as many numbers were drawn before
    for key, tensor in layer.state_dict().items():
        tensors[f"{name}.fresh.{key}"] = tensor.clone().contiguous()

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(dyadic(parameter.shape, generator))
    for key, tensor in layer.state_dict().items():
        tensors[f"{name}.filled.{key}"] = tensor.clone().contiguous()
    floats = kind != "Embedding"
    x = dyadic(shape, generator).requires_grad_() if floats else torch.randint(0, args[0], shape, generator=generator)
    y = layer(x)
    upstream = dyadic(y.shape, generator)
    (y * upstream).sum().backward()
    tensors |= {f"{name}.x": x.detach(), f"{name}.y": y.detach(), f"{name}.upstream": upstream}
    if x.requires_grad:
        tensors[f"{name}.grad.x"] = x.grad
    for key, parameter in layer.named_parameters():
        if parameter.grad is not None:
            tensors[f"{name}.grad.{key}"] = parameter.grad.contiguous()
    layer.eval()
    weight = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    tensors[f"{name}.merged"] = weight.detach().clone().contiguous()
    return {
        "class": kind,
        "args": args,
        "kwargs": kwargs,
        "shapes": {key: list(tensor.shape) for key, tensor in layer.state_dict().items()},
        "requires_grad": {key: parameter.requires_grad for key, parameter in layer.named_parameters()},
        "attributes": {key: getattr(layer, key) for key in ATTRIBUTES if hasattr(layer, key)},
    }


def run_functions(lora: Any) -> dict[str, Any]:
    """What the two functions on models make of a small model, for each kind of bias."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 4), lora.Linear(4, 4, r=2), lora.MergedLinear(4, 6, r=1, enable_lora=[True, False]), lora.Linear(6, 2)
        )

    found = {}
    for bias in ("none", "all", "lora_only"):
        model = build()
        lora.mark_only_lora_as_trainable(model, bias=bias)
        found[bias] = {
            "trainable": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
            "state_dict": sorted(lora.lora_state_dict(model, bias=bias)),
        }
    return found


def parameters(function: Any) -> list[list[str]]:
    """Name, kind and default of each parameter, as text."""
    return [[p.name, p.kind.name, repr(p.default)] for p in inspect.signature(function).parameters.values()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "loralib==0.1.2"]
        subprocess.run(pip, check=True)
        sys.path.insert(0, folder)
        import loralib as lora

        if not str(lora.__file__).startswith(folder):
            raise SystemExit(f"this is not loralib 0.1.2: {lora.__file__}")
        tensors: dict[str, Tensor] = {}
        golden = {
            "torch": torch.__version__,
            "seed": SEED,
            "signatures": {
                name: parameters(getattr(lora, name).__init__)
                for name in ("Linear", "Embedding", "MergedLinear", "ConvLoRA", "LoRALayer")
            }
            | {name: parameters(getattr(lora, name)) for name in ("mark_only_lora_as_trainable", "lora_state_dict")},
            "functions": run_functions(lora),
            "cases": {name: run_case(lora, name, tensors) for name in CASES},
        }
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    save_file({name: tensors[name] for name in sorted(tensors)}, HERE / "golden.safetensors")


if __name__ == "__main__":
    main()
