"""What merging into a quantised model leaves of an adapter, and what the model makes of it.

    python benchmarks/quantised.py
    python benchmarks/quantised.py --formats "FP8, 128 × 128" "NF4, double" --seeds 1

SmolLM2-135M-Instruct is quantised to each format, an adapter is trained against its NF4 weights, as QLoRA does, and merged into
each of the quantised models in several ways. Each outcome is run in float32 on held-out text, beside that very quantised model with
the adapter unmerged, and the divergence of the two is a share of the adapter's own effect: 0 is perfect, 1 as if nothing had been
merged. There are two kinds of text: answers in the voice that was trained, and prose, where the adapter does little.

- same: `--output-format same`, codes rounded at random with the base's scales (medians over seeds)
- nearest: the same to the nearest codes, which lorafold refuses where it erases the adapter
- bf16: `--output-format bf16`
- original: `--requantise-from`, codes nearest to the original's weights and the adapter's
- PEFT: its own merge into bitsandbytes' NF4, where bitsandbytes is installed
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from measuring import environment
from quantised_made import FORMATS, Format
from rounding import DATA, LINEAR, deltas, divergence, load, log_probabilities, make_base, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold.checkpoints.checkpoint import BaseReader
from lorafold.checkpoints.encodings.again import encoded_again
from lorafold.checkpoints.encodings.gguf_blocks import gguf_encoded
from lorafold.engine import report
from lorafold.files.evaluation import evaluate
from lorafold.files.safetensors.info import TensorInfo
from lorafold.kernel.rounding import Stochastic

CAVEATS = """\
- One model of 135 M parameters, itself quantised to four bits once, one adapter, one seed of its training.
- The formats of four bits are made without calibration or searched scales, which makes the base worse, not the merge.
- Activations are float32, so that only what becomes of the weights is seen.
- GGUF's blocks are measured weight by weight, through the same decoders and encoders that files go through; rows of 576 numbers are
  no whole blocks of Q4_K, so that its blocks go on from row to row."""

WORK = DATA / "quantised"
WAYS = ("same", "nearest", "bf16", "original", "PEFT")
State = dict[str, Tensor]


def is_linear(name: str) -> bool:
    return name.endswith(tuple(f"{module}.weight" for module in LINEAR))


def tensors(folder: Path) -> State:
    """All that a checkpoint states, in float32, whatever it is stored as."""
    checkpoint = lorafold.open_checkpoint(folder)
    with BaseReader(checkpoint) as reader:
        return {
            name: reader.rows(matrix, 0, matrix.shape[0]).view(matrix.shape).float().clone()
            for name, matrix in checkpoint.tensors.items()
        }


def quantise(original: Path, to: Format, out: Path) -> None:
    """A checkpoint of one file with the linear layers in the format `to`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    held: State = {}
    for file in sorted(original.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            held |= to.quantise(name, weight) if is_linear(name) else {name: weight}
    save_file({name: each.contiguous() for name, each in held.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text()) | {"quantization_config": dict(to.config)}
    (out / "config.json").write_text(json.dumps(config if to.config else config | {"quantization_config": None}))


class Measured:
    """One model, into which states are put, and the log-probabilities that it then has."""

    def __init__(self, base: Path, tokenizer: Any) -> None:
        self.model, self.tokenizer = load(base), tokenizer

    def run(self, state: State) -> dict[str, Tensor]:
        missing = self.model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        assert {*missing.missing_keys} <= {"lm_head.weight"}
        return log_probabilities(self.model, self.tokenizer)


def with_adapter(state: State, adapter: Path) -> State:
    """The model with its adapter unmerged: W + ΔW in float64, kept in as much."""
    added = {name: (state[name].double() + delta).float() for name, delta in deltas(adapter)}
    return {**state, **added}


def of_files(base: Path, original: Path, adapter: Path, way: str, seed: int = 0) -> State:
    """What lorafold makes of the folder `base`."""
    out = WORK / "out"
    ways: dict[str, dict[str, Any]] = {
        "same": {"output_format": "same", "seed": seed}, "nearest": {"output_format": "same", "rounding": "nearest"},
        "bf16": {"output_format": "bf16"}, "original": {"requantise_from": original},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorafold.LorafoldWarning)
        lorafold.merge(base, [adapter], out, overwrite=True, verify=False, **ways[way])
    return tensors(out)


def blocks(original: State, to: Format) -> tuple[State, dict[str, tuple[Any, Any]]]:
    """The numbers of the linear layers in blocks of GGUF, and of each its encoding and what reads its bytes."""
    numbers, stored = {}, {}
    for name, weight in original.items():
        if is_linear(name):
            (words,) = to.quantise(name, weight).values()
            info = TensorInfo(name, "U8", tuple(words.shape), 0, words.nbytes, Path(name))
            encoded = gguf_encoded(info, to.blocks)
            stored[name] = (encoded, lambda part, words=words: words)
            numbers[name] = evaluate(encoded.decoded, stored[name][1]).float().view(weight.shape)
    return {**original, **numbers}, stored


def of_blocks(original: State, stored: dict[str, tuple[Any, Any]], adapter: Path, way: str, seed: int = 0) -> State:
    """The same, weight by weight, of blocks of GGUF."""
    made: State = {}
    for name, delta in deltas(adapter):
        encoded, read = stored[name]
        before = evaluate(encoded.decoded, read)
        start = original[name].double().view(before.shape) if way == "original" else before
        sums = start + delta.view(before.shape)
        if way == "bf16":
            made[name] = sums.bfloat16().float().view(delta.shape)
            continue
        noise = Stochastic(seed, name, 0).uniform(sums.numel()).view(sums.shape) if way == "same" else None
        _, numbers = encoded_again(encoded, encoded.decoded, sums, read, noise)
        made[name] = numbers.float().view(delta.shape)
    return made


def of_peft(base: Path, adapter: Path) -> State:
    """PEFT's merge into bitsandbytes' weights, which it quantises again; read a row at a time, as its code for CPUs needs it."""
    from bitsandbytes import functional

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = {}
    for name, parameter in merged.named_parameters():
        value = parameter.data
        if is_linear(name):
            state = parameter.quant_state
            shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
            value = functional.dequantize_4bit(value, state).view(shape)
        found[name] = value.float()
    return found


def measure(to: Format, original: Path, adapter: Path, measured: Measured, seeds: int) -> dict[str, dict[str, float]]:
    """By way and kind of text, the share of the adapter's effect that is lost."""
    plain, base = tensors(original), WORK / "base"
    stored: dict[str, tuple[Any, Any]] = {}
    if to.blocks:
        state, stored = blocks(plain, to)
    else:
        quantise(original, to, base)
        state = tensors(base)
    unmerged = measured.run(with_adapter(state, adapter))
    effect = divergence(measured.run(state), unmerged)
    found: dict[str, dict[str, float]] = {}
    for way, states in _ways(to, base, original, plain, stored, adapter, seeds):
        nats = [divergence(measured.run({**state, **each}), unmerged) for each in states]
        found[way] = {kind: median(one[kind] for one in nats) / effect[kind] for kind in effect}
        print(f"  {to.name}, {way}: {found[way]}", file=sys.stderr, flush=True)
    return found


def _ways(
    to: Format, base: Path, original: Path, plain: State, stored: dict[str, tuple[Any, Any]], adapter: Path, seeds: int
) -> Iterator[tuple[str, Iterator[State]]]:
    def made(way: str, seed: int) -> State:
        return of_blocks(plain, stored, adapter, way, seed) if to.blocks else of_files(base, original, adapter, way, seed)

    for way in WAYS[:4]:
        yield way, (made(way, seed) for seed in range(seeds if way == "same" else 1))
    if to.name.startswith("NF4") and find_spec("bitsandbytes") is not None:
        yield "PEFT", iter([of_peft(base, adapter)])


def main() -> None:
    parser = argparse.ArgumentParser(description="What merging into a quantised model leaves of an adapter.")
    parser.add_argument("--formats", nargs="+", default=[each.name for each in FORMATS], choices=[each.name for each in FORMATS])
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="of stochastic rounding; figures are medians (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()

    print(CAVEATS)
    report.LEAST = 0.0  # so that what is refused can be measured
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    original = make_base()
    tokenizer = transformers.AutoTokenizer.from_pretrained(original)
    adapter, trained_on = (
        WORK / f"adapter-{args.lr:g}-{args.steps}",
        next(each for each in FORMATS if each.quantise.__name__ == "nf4"),
    )
    measured = Measured(original, tokenizer)
    if not adapter.exists():
        quantise(original, trained_on, WORK / "base")
        model = load(original)
        model.load_state_dict(tensors(WORK / "base"), strict=False)
        train(model, adapter, tokenizer, args.lr, args.steps, rank=16)
    weights = tensors(original)
    update = sum(float(delta.square().sum()) for _, delta in deltas(adapter))
    relative = (update / sum(float(weights[name].double().square().sum()) for name, _ in deltas(adapter))) ** 0.5

    print(f"\nAdamW, {args.steps} steps at {args.lr:g}: ‖ΔW‖ / ‖W‖ = {relative:.5f}")
    print("KL as a share of the adapter's, answers / prose:\n")
    print(f"{'':20}" + "".join(f"{way:>18}" for way in WAYS))
    rows = {}
    for to in FORMATS:
        if to.name in args.formats:
            rows[to.name] = found = measure(to, original, adapter, measured, args.seeds)
            cells = [f"{found[way]['answers']:.4f} / {found[way]['prose']:.4f}" if way in found else "" for way in WAYS]
            print(f"{to.name:20}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    shutil.rmtree(WORK / "base", ignore_errors=True)
    shutil.rmtree(WORK / "out", ignore_errors=True)
    limits = {to.name: 0.1 if to.four_bits else 0.01 for to in FORMATS if to.name in rows}
    over = {name: rows[name]["same"]["answers"] for name, limit in limits.items() if rows[name]["same"]["answers"] > limit}
    print(f"\n`same`, answers: at most 0.01 in eight bits and 0.1 in four: {'held' if not over else f'not held by {over}'}")
    if args.json:
        record = {"environment": environment(), "relative_update": relative, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
