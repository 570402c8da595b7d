"""Whether what lorafold writes loads where it is meant to, and means there what it says: outputs in a base's own codes, and floats
made of the weights that training saw.

    pip install --no-deps --target PACKAGES bitsandbytes compressed-tensors loguru
    PYTHONPATH=PACKAGES python scripts/check_loading.py

Each output is loaded by transformers with the vendor's own code, on a CPU, and gives the logits, to the last bit, of a plain model
that has the decoded numbers. These packages are no part of the tests' environment, so this stands beside the tests; a vendor that
is not installed is left out, and said to be.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
import transformers
from quantised_made import FORMATS, Format, compressed, words
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold.checkpoints.as_trained import as_trained
from lorafold.checkpoints.checkpoint import BaseReader, Checkpoint
from lorafold.planning.linear_layers import linear_layers
from models import gpt2, save_adapter

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOKENS = torch.arange(12)[None]
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def numbers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All that a checkpoint states, in float64 where it is quantised."""
    with BaseReader(checkpoint) as reader:
        return {
            name: reader.rows(each, 0, each.shape[0]).view(each.shape).clone()
            for name, each in checkpoint.tensors.items()
            if each.shape
        }


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Four bits in groups of 32, as compressed-tensors packs them."""
    groups = weight.float().view(weight.shape[0], -1, 32)
    scales = groups.abs().amax(-1) / 7.5
    codes = (groups / scales[..., None]).round().clamp(-8, 7).flatten(1) + 8
    return {f"{name}_packed": words(codes), f"{name}_scale": scales, f"{name}_shape": torch.tensor(weight.shape)}


def nvfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """E2M1 in blocks of 16 with a scale in E4M3, and one by which all are divided."""
    blocks = weight.float().view(weight.shape[0], -1, 16)
    total = 2688 / blocks.abs().amax().reshape(1)
    scales = (blocks.abs().amax(-1) / 6 * total).to(torch.float8_e4m3fn)
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = blocks / (scales.float() / total)[..., None]
    codes = torch.bucketize(scaled.abs(), (sizes[:-1] + sizes[1:]) / 2).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    pairs = codes.view(weight.shape[0], -1, 2)
    return {f"{name}_packed": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scale": scales, f"{name}_global_scale": total}


MORE = (
    Format("int4, packed", packed, compressed(4, "int", strategy="group", group_size=32) | {"format": "pack-quantized"}),
    Format("NVFP4", nvfp4, compressed(4, "float", strategy="tensor_group", group_size=16) | {"format": "nvfp4-pack-quantized"}),
)


def quantised(folder: Path, to: Format) -> Path:
    """The Llama with its linear layers in the format `to`."""
    out = folder / to.quantise.__name__
    out.mkdir()
    held: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "float" / "model.safetensors").items():
        held |= to.quantise(name, weight) if name.endswith("_proj.weight") else {name: weight}
    save_file({name: each.contiguous() for name, each in held.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "float" / "config.json").read_text())
    said = dict(to.config) | ({"bnb_4bit_compute_dtype": "float32"} if "load_in_4bit" in to.config else {})
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return out


def same_format(folder: Path, to: Format) -> str:
    """Merged into its own codes, loaded by the vendor, and compared with the decoded numbers in a plain model."""
    base, out = quantised(folder, to), folder / f"{to.quantise.__name__}-out"
    lorafold.merge(base, [folder / "adapter"], out, output_format="same")
    method = to.config["quant_method"]
    how: dict[str, Any] = dict(FLOAT32)
    if method == "fp8":
        how["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    elif method == "compressed-tensors":
        how["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, **how)
    state = numbers(lorafold.open_checkpoint(out))
    if method == "bitsandbytes":
        loaded.train()  # for inference on a CPU its layers pack their weights anew, and compute in bfloat16
    if to.name == "NVFP4":  # which compressed-tensors rounds three times: s / g and the product to float32, and that to bfloat16
        held = {name: each for name, each in loaded.named_parameters() if name.endswith("_proj.weight")}
        assert all(bool(((each - state[name]).abs() <= state[name].abs() * 2.0**-8).all()) for name, each in held.items())
        return "the vendor's weights are the decoded numbers, up to its roundings"
    plain = llama()
    plain.load_state_dict({name: each.float() for name, each in state.items()})
    with torch.no_grad():
        found, expected = loaded(TOKENS).logits, plain(TOKENS).logits
    assert torch.equal(found, expected), f"{to.name}: logits differ by up to {float((found - expected).abs().max())}"
    return "the vendor's logits are those of the decoded numbers"


def as_loaded(folder: Path, kind: str, name: str) -> str:
    """What transformers makes of the floats with bitsandbytes, beside what `--quantised-as` begins from."""
    from bitsandbytes import functional

    four = kind != "int8"
    how: dict[str, Any] = {"load_in_8bit": True}
    if four:
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind == "nf4"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.bfloat16, device_map="cpu", quantization_config=transformers.BitsAndBytesConfig(**how)
    )
    checkpoint = lorafold.open_checkpoint(folder / name)
    layers = linear_layers(checkpoint).names
    ours = numbers(as_trained(checkpoint, layers, kind, "BF16"))
    theirs: dict[str, Tensor] = {}
    for parameter, value in loaded.named_parameters():
        if type(value).__name__ == "Params4bit":
            state = value.quant_state
            shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])  # its code for CPUs needs one row
            theirs[parameter] = functional.dequantize_4bit(value.data, state).view(shape)
        elif type(value).__name__ == "Int8Params":
            theirs[parameter] = value.data.double() * value.SCB.double()[:, None] / 127
    assert theirs.keys() == layers, f"other layers are quantised: {theirs.keys() ^ layers}"
    turned = {each: theirs[each].T if theirs[each].shape != ours[each].shape or name == "gpt2" else theirs[each] for each in theirs}
    other = sum(int((turned[each] != ours[each]).sum()) for each in theirs)
    total = sum(each.numel() for each in theirs.values())
    # of double quantisation bitsandbytes' code for CPUs takes a code of eight bits beside the nearest in 0.25 % of the blocks
    assert other <= (0.01 * total if kind == "nf4" else 0), f"{kind}: {other} of {total} numbers differ"
    return f"{len(theirs)} layers, {other} of {total} numbers differ"


def main() -> None:
    there = {each: find_spec(each.replace("-", "_")) is not None for each in ("bitsandbytes", "compressed-tensors")}
    there["fp8"] = True
    checks: list[tuple[str, str, Callable[[Path], str]]] = [
        (f"same, {to.name}", to.config["quant_method"], lambda folder, to=to: same_format(folder, to))  # type: ignore[misc]
        for to in (*FORMATS, *MORE)
        if not to.blocks and to.config["quant_method"] in there
    ]
    for name in ("llama", "gpt2"):
        for kind in ("nf4", "nf4-single", "fp4", "int8"):
            what = f"quantised as {kind}, {name}"
            checks.append((what, "bitsandbytes", lambda folder, kind=kind, name=name: as_loaded(folder, kind, name)))  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        llama().save_pretrained(folder / "float")
        llama().bfloat16().save_pretrained(folder / "llama")
        gpt2().bfloat16().save_pretrained(folder / "gpt2")
        save_adapter(llama(), folder / "adapter", target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        for what, vendor, check in checks:
            print(f"{what:30} {check(folder) if there[vendor] else f'{vendor} is not installed'}", flush=True)


if __name__ == "__main__":
    main()
