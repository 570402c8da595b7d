"""Load merged models in llama.cpp itself, and compare what it answers with the unmerged adapter's answers.

    pip install --target PACKAGES llama-cpp-python diskcache     # compiles llama.cpp; some minutes
    PYTHONPATH=PACKAGES python scripts/gguf_in_llama_cpp.py

Tiny models of several architectures are written as llama.cpp's converter writes them, quantised by llama.cpp itself, merged, and
run by it. What is compared with are the logits of PEFT, on the base in transformers as the gguf package decodes it. The adapter as
`lorafold convert` writes it in GGUF is loaded beside the base too, and merged.

Codes that are rounded at random add noise, which sums over few numbers do not even out: in models this small that of four bits is
larger than what this adapter does. Only an output of floats can be held to the answers themselves here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import lorafold
from gguf_models import stated_by, tensors_of, tiny, write_gguf
from models import save_adapter

TOKENS = [1, 5, 9, 20, 33, 7, 2, 40, 41, 3]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {}, ALL),
    "qwen2": ("Qwen2", {}, ALL),
    "qwen3": ("Qwen3", {"head_dim": 64}, ALL),
    "smollm3": ("SmolLM3", {}, ALL),
    "starcoder2": ("Starcoder2", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    "stablelm": ("StableLm", {"partial_rotary_factor": 1.0}, ALL),
    "olmo2": ("Olmo2", {}, ALL),
    "phi3": ("Phi3", {}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}
BESIDE = ("llama", "qwen2", "qwen3", "phi3")
"""Those for which adapters can be converted."""

QUANTISED = {"Q8_0": 7, "Q4_0": 2, "Q4_K": 14, "Q6_K": 18}
"""llama.cpp's numbers of the file types that it is asked for."""


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    """(tokens, vocabulary) float32, of the model at `path` in llama.cpp, with an adapter in GGUF beside it."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), lora_path=None if adapter is None else str(adapter), logits_all=True, n_ctx=64, n_threads=2, type_k=0, type_v=0,
        verbose=False,
    )  # fmt: skip
    model.eval(TOKENS)
    return np.array(model.scores[: len(TOKENS)])


def quantised(path: Path, out: Path, kind: int) -> Path:
    """The model at `path`, quantised by llama.cpp."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, 2
    if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params):
        raise RuntimeError(f"llama.cpp does not quantise {path} as {kind}")
    return out


def in_transformers(name: str, weights: dict[str, np.ndarray], adapter: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the model whose weights are `weights`, by llama.cpp's names and in its order, without `adapter` and with it."""
    import peft

    kind, fields, _ = MODELS[name]
    model = tiny(kind, **fields)
    with torch.no_grad():
        for own, parameter in model.state_dict().items():
            number = np.arange(parameter.numel(), dtype=np.float64).reshape(parameter.shape)
            ordered = tensors_of(Numbered(model, own, number), name, heads(name))
            (called,) = (each for each, array in ordered.items() if array.dtype == np.float64)
            order = np.argsort(ordered[called].reshape(-1))
            parameter.copy_(torch.from_numpy(weights[called].reshape(-1)[order].reshape(parameter.shape).copy()))
    tokens = torch.tensor([TOKENS])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        before = model(tokens).logits[0].numpy()
        after = peft.PeftModel.from_pretrained(model, adapter).eval()(tokens).logits[0].numpy()
    return before, after


class Numbered:
    """A model, of which one tensor holds the places of its numbers instead."""

    def __init__(self, model: Any, name: str, numbers: np.ndarray) -> None:
        self.config, self._state = model.config, dict(model.state_dict())
        self._state[name] = _Wide(numbers)

    def state_dict(self) -> dict[str, Any]:
        return self._state


class _Wide:
    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers

    def float(self) -> _Wide:
        return self

    def numpy(self) -> np.ndarray:
        return self._numbers


def heads(name: str) -> tuple[int, int] | None:
    from lorafold.planning.names.gguf_names import ORDERS

    return (4, 2) if ORDERS[name] == "paired" else None


def main() -> None:
    for name, (kind, fields, modules) in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_gguf(folder / "f32.gguf", tensors_of(tiny(kind, **fields), name, heads(name)), "F32", architecture=name)
            save_adapter(tiny(kind, **fields), folder / "adapter", target_modules=modules, lora_alpha=0.5)
            if name in BESIDE:
                tiny(kind, **fields).save_pretrained(folder / "hf")
                lorafold.convert(folder / "adapter", folder / "adapter.gguf", "gguf", base=folder / "hf")
            for types in ("F32", *QUANTISED):
                base = folder / "f32.gguf"
                if types != "F32":
                    base = quantised(folder / "f32.gguf", folder / f"{types}.gguf", QUANTISED[types])
                compare(name, types, base, folder)


def compare(name: str, types: str, base: Path, folder: Path) -> None:
    """Print the lines of one base."""
    before, after = in_transformers(name, stated_by(base), folder / "adapter")
    effect = np.abs(after - before).max()
    options: dict[str, Any] = {} if types == "F32" else {"output_format": "fp32"}
    lorafold.merge(base, [folder / "adapter"], folder / "float.gguf", overwrite=True, **options)
    found = np.abs(logits(folder / "float.gguf") - after).max()
    print(f"{name:8} {types:5} to floats: {found:.5f} off at most, where the adapter moves {effect:.2f}", flush=True)
    if types == "F32" and name in BESIDE:
        lorafold.merge(base, [folder / "adapter.gguf"], folder / "other.gguf", overwrite=True)
        merged, beside = (
            np.abs(each - after).max() for each in (logits(folder / "other.gguf"), logits(base, folder / "adapter.gguf"))
        )
        print(f"{name:8} adapter in GGUF: merged {merged:.5f} off at most, beside the base in llama.cpp {beside:.5f}", flush=True)
    if types != "F32":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorafold.LorafoldWarning)
            report = lorafold.merge(base, [folder / "adapter"], folder / "same.gguf", output_format="same", overwrite=True)
        same = logits(folder / "same.gguf")
        rms = np.sqrt(((same - after) ** 2).mean()) / np.sqrt(((after - before) ** 2).mean())
        kept = report.kept_in_all
        print(f"{name:8} {types:5} codes again: {rms:.3f} of the adapter's effect off (rms), kept {kept:.3f}", flush=True)


if __name__ == "__main__":
    main()
