"""What `kinds.py` measures of models in memory, and what PEFT and LyCORIS do: programs whose clock starts when the model is loaded.

python benchmarks/kinds_memory.py lorafold merge-into llama BASE ADAPTER
python benchmarks/kinds_memory.py peft files convs BASE ADAPTER OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from measuring import SECONDS, wait_for_the_start
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafold

warnings.simplefilter("ignore")


def model_of(base: Path, kind: str) -> Any:
    """The model of the base of that kind, in its dtype, of memory of its own."""
    if kind == "llama":
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    else:
        held: dict[str, Tensor] = {}
        for path in sorted(base.glob("*.safetensors")):
            held |= load_file(path)
        model = nn.Module()
        for name, tensor in sorted(held.items(), key=lambda each: each[0].endswith("down_proj")):  # PEFT counts on the order
            _put(model, name.split("."), tensor, kind, held)
        model.load_state_dict(held, assign=True)
        if kind == "stacks":  # how the matrices of a stack lie is told by the type
            model.config = transformers.PretrainedConfig(**json.loads((base / "config.json").read_text()))
    with torch.no_grad():
        seen: dict[int, Tensor] = {}
        for parameter in model.parameters():  # out of the mapped file
            parameter.data = seen.setdefault(parameter.data_ptr(), parameter.data.clone())
            parameter.requires_grad_(False)
    return model


def _put(model: nn.Module, parts: list[str], tensor: Tensor, kind: str, held: dict[str, Tensor]) -> None:
    """The module that a tensor belongs to, put into `model` where it is not there yet."""
    path = parts[:2] if kind == "attention" else parts[:-1]
    for part in path[:-1]:
        model = model._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    if kind == "stacks":
        stack = model._modules.setdefault(path[-1], nn.Module())
        assert stack is not None
        stack.register_parameter(parts[-1], nn.Parameter(tensor))
    elif path[-1] not in model._modules:
        with torch.device("meta"):
            model._modules[path[-1]] = _leaf(".".join(path), kind, held)


def _leaf(name: str, kind: str, held: dict[str, Tensor]) -> nn.Module:
    if kind == "attention":
        return nn.MultiheadAttention(held[f"{name}.in_proj_weight"].shape[1], 1)
    weight, bias = held[f"{name}.weight"], f"{name}.bias" in held
    if kind in ("convs", "groups"):
        out, inner, *kernel = weight.shape
        return nn.Conv2d(out, out, (kernel[0], kernel[1]), groups=out // inner, bias=bias)
    if kind == "transposed":
        conv1d: nn.Module = Conv1D(weight.shape[1], weight.shape[0])
        return conv1d
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)


def save(model: Any, kind: str, out: Path) -> None:
    """The model in files, as its library writes them."""
    if kind == "llama":
        model.save_pretrained(out, max_shard_size="500MB")
        return
    out.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "model.safetensors")


def peft_files(kind: str, base: Path, adapter: Path, out: Path) -> None:
    wait_for_the_start()
    save(peft.PeftModel.from_pretrained(model_of(base, kind), adapter).merge_and_unload(), kind, out)


def lycoris_files(kind: str, base: Path, adapter: Path, out: Path) -> None:
    from lycoris import create_lycoris_from_weights  # type: ignore[import-untyped]

    wait_for_the_start()
    model = model_of(base, kind)
    network, _ = create_lycoris_from_weights(1.0, str(adapter / "lycoris.safetensors"), model)
    network.merge_to(1.0)
    save(model, kind, out)


def in_memory(who: str, way: str, kind: str, base: Path, adapter: Path) -> None:
    model = model_of(base, kind)
    action: Callable[[], Any]
    if who == "peft" or way == "merge-into-peft":
        wrapped: Any = peft.PeftModel.from_pretrained(model, adapter)
        if who == "lorafold":
            action = lambda: lorafold.merge_into(wrapped)  # noqa: E731
        elif way.startswith("layers"):
            action = lambda: (wrapped.merge_adapter(), wrapped.unmerge_adapter())  # noqa: E731
        else:
            action = wrapped.merge_and_unload
    elif way == "merge-into":
        action = lambda: lorafold.merge_into(model, [adapter])  # noqa: E731
    else:
        lorafold.nn.load_adapter_into(model, adapter, undo="compact" if way == "layers-compact" else "copy")
        model.train()
        action = lambda: (model.eval(), model.train())  # noqa: E731
    for name in lorafold.__all__:
        getattr(lorafold, name)
    wait_for_the_start()
    start = time.perf_counter()
    action()
    print(f"{SECONDS} {time.perf_counter() - start}")


if __name__ == "__main__":
    who, way, kind, *paths = sys.argv[1:]
    if way == "files":
        (peft_files if who == "peft" else lycoris_files)(kind, *map(Path, paths))
    else:
        in_memory(who, way, kind, *map(Path, paths))
    sys.stdout.flush()
    os._exit(0)  # what an interpreter takes to clear up is nobody's work
