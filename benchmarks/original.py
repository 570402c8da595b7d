"""The real loralib 0.1.2 and PEFT beside lorafold's layers, in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lorafold
from lorafold.kernel.undo.keep import UndoKind

FOLDER = Path(__file__).parent / "data" / ".loralib-0.1.2"  # hidden, so that no checker takes it for a part of the project


def original_loralib() -> Any:
    """loralib 0.1.2 as a module that does not answer to that name, since lorafold does. pip fetches it once, into a folder."""
    if not FOLDER.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), "loralib==0.1.2"]
        subprocess.run(pip, check=True)
    package = FOLDER / "loralib"
    spec = spec_from_file_location("original_loralib", package / "__init__.py", submodule_search_locations=[str(package)])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["original_loralib"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Contender:
    """One linear layer with a low-rank update, and how its library merges it and takes the update out again."""

    name: str
    module: nn.Module
    weight: Callable[[], Tensor]
    factors: Callable[[], list[Tensor]]
    merge: Callable[[], Any]
    unmerge: Callable[[], Any]


def ours(n: int, r: int, dtype: torch.dtype, undo: UndoKind = "copy") -> Contender:
    layer = lorafold.nn.Linear(n, n, r=r, lora_alpha=r, bias=False, dtype=dtype, undo=undo)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    return Contender(
        f"lorafold ({undo})",
        layer,
        lambda: layer.weight.data,
        lambda: [layer.lora_A.data, layer.lora_B.data],
        layer.eval,
        layer.train,
    )


def loralibs(n: int, r: int, dtype: torch.dtype) -> Contender:
    layer = original_loralib().Linear(n, n, r=r, lora_alpha=r, bias=False, dtype=dtype)
    return Contender(
        "loralib 0.1.2", layer, lambda: layer.weight.data, lambda: [layer.lora_A.data, layer.lora_B.data], layer.eval, layer.train
    )


def pefts(n: int, r: int, dtype: torch.dtype) -> Contender:
    model: Any = peft.get_peft_model(
        nn.Sequential(nn.Linear(n, n, bias=False, dtype=dtype)),
        peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    return Contender(
        f"PEFT {peft.__version__}",
        model,
        lambda: layer.base_layer.weight.data,
        lambda: [layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data],
        model.merge_adapter,
        model.unmerge_adapter,
    )


def fill(contender: Contender, relative: float, seed: int = 0) -> None:
    """A weight from N(0, 0.02²) and an update with ‖ΔW‖ = `relative` · ‖W‖, the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    weight = contender.weight()
    lora_A, lora_B = contender.factors()
    r = lora_A.shape[0]
    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    lora_A.copy_(torch.randn(lora_A.shape, generator=generator))
    lora_B.copy_(torch.randn(lora_B.shape, generator=generator) * (0.02 * relative / r**0.5))
