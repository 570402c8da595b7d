"""What rounding to bfloat16 leaves of a small update, and what the model makes of it.

    python benchmarks/rounding.py                    # ten steps at a learning rate of 1e-4, as after a sync in RL
    python benchmarks/rounding.py --lr 1e-3 --steps 20

An adapter is trained on SmolLM2-135M-Instruct for a few steps, merged in several ways, and each merged model is run in float32
on held-out text beside the model with the adapter unmerged. There are two kinds of held-out text: answers in the voice that the
adapter was trained on, where it changes much, and prose, where it changes little.

- kept = ⟨W′ − W, ΔW⟩ / ⟨ΔW, ΔW⟩ over all targets: 1 where all of the update arrived, 0 where rounding gave the base back
- KL: the divergence of the merged model from the unmerged one, as a share of the base's: 0 is perfect, 1 is as if nothing had
  been merged
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from measuring import environment
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
DATA = HERE / "data"

CAVEATS = """\
- One model of 135 M parameters, whose weights were quantized to four bits once, and one adapter: the figures depend on how large
  the update is against the grid, and that on learning rate and steps. Try others.
- All models are run in float32, so that only the rounding of the weights is seen, not that of activations.
- Stochastic rounding depends on its seed: its figures are medians over several, the others have no randomness in them.
- Stochastic rounding adds noise, whose divergence is about the same on every text. As a share it is largest where the adapter
  itself does least: so the prose, of which nothing was trained, is the harder test for it."""
HELD_OUT = 8  # of the answers, the last

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Row = dict[str, Any]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def make_base() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, made by the example."""
    base = DATA / "smollm2"
    if not base.exists():
        DATA.mkdir(exist_ok=True)
        subprocess.run([sys.executable, EXAMPLES / "smollm2.py", base], check=True)
    return base


def answers() -> list[str]:
    """The answers of the demo's text set."""
    return [json.loads(line)["answer"] for line in (EXAMPLES / "captains_log.jsonl").read_text().splitlines()]


def train(base: Any, out: Path, tokenizer: Any, lr: float, steps: int, *, rank: int = 8) -> None:
    """An adapter on all linear layers of the model `base`, after `steps` of AdamW on the texts of the demo; by PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    texts = answers()[:-HELD_OUT]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        batch = tokenizer([texts[i % len(texts)] for i in range(4 * step, 4 * step + 4)], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def deltas(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and ΔW, float64, of each target, computed here and not by what is measured."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, lora_A in tensors.items():
        if name.endswith(".lora_A.weight"):
            lora_B = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            yield target, config["lora_alpha"] / config["r"] * (lora_B.double() @ lora_A.double())


def kept(merged: dict[str, Tensor], base: dict[str, Tensor], adapter: Path) -> float:
    """⟨W′ − W, ΔW⟩ / ⟨ΔW, ΔW⟩ over all targets."""
    dot = square = 0.0
    for name, delta in deltas(adapter):
        dot += float(((merged[name].double() - base[name].double()) * delta).sum())
        square += float((delta * delta).sum())
    return dot / square


def relative_update(base: dict[str, Tensor], adapter: Path) -> float:
    """‖ΔW‖ / ‖W‖ over all targets."""
    pairs = [(float(delta.square().sum()), float(base[name].double().square().sum())) for name, delta in deltas(adapter)]
    return float((sum(delta for delta, _ in pairs) / sum(weight for _, weight in pairs)) ** 0.5)


def held_out() -> dict[str, list[str]]:
    """The texts that no adapter is trained on, by kind."""
    return {"answers": answers()[-HELD_OUT:], "prose": (HERE / "held_out.txt").read_text().strip().split("\n\n")}


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """(tokens, vocabulary) for each kind of text: of the next token, at every position; texts are read one by one."""
    return {
        kind: torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]).log_softmax(dim=-1)
        for kind, texts in held_out().items()
    }


def divergence(of: dict[str, Tensor], from_: dict[str, Tensor]) -> dict[str, float]:
    """KL(from_ ‖ of) in nats a token, summed in float64, for each kind of text."""
    return {kind: float((p.double().exp() * (p.double() - of[kind].double())).sum(-1).mean()) for kind, p in from_.items()}


def merge_by_lorafold(base: Path, adapter: Path, *options: str) -> tuple[Any, str]:
    """The merged model in float32, and what the command said."""
    out = DATA / "output"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "lorafold", "merge", str(base), str(adapter), "-o", str(out), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    model = load(out)
    shutil.rmtree(out)
    return model, done.stdout + done.stderr


def merge_by_peft(base: Path, adapter: Path) -> Any:
    """The merged model in float32, merged in bfloat16."""
    return peft.PeftModel.from_pretrained(load(base, torch.bfloat16), adapter).merge_and_unload().float()


def compare(base: Path, adapter: Path, tokenizer: Any, seeds: int) -> tuple[list[Row], str]:
    """A row for each way to merge, and what lorafold said when it rounded to nearest."""
    plain = load(base)
    weights = plain.state_dict()
    unmerged = log_probabilities(peft.PeftModel.from_pretrained(load(base), adapter), tokenizer)
    base_kl = divergence(log_probabilities(plain, tokenizer), unmerged)

    def row(name: str, *models: Any) -> Row:
        found = [kept(model.state_dict(), weights, adapter) for model in models]
        nats = [divergence(log_probabilities(model, tokenizer), unmerged) for model in models]
        shares = {kind: [one[kind] / base_kl[kind] for one in nats] for kind in base_kl}
        print(f"  {name}", file=sys.stderr, flush=True)
        kl = {kind: median(each) for kind, each in shares.items()}
        return {"name": name, "kept": median(found), "kl": kl, "all_kept": found, "all_kl": shares}

    nearest, said = merge_by_lorafold(base, adapter)
    rows = [
        row("the base itself", plain),
        row("lorafold, nearest", nearest),
        row("PEFT, in bfloat16", merge_by_peft(base, adapter)),
    ]
    stochastic = [merge_by_lorafold(base, adapter, "--rounding", "stochastic", "--seed", str(seed))[0] for seed in range(seeds)]
    rows.append(row("lorafold, stochastic", *stochastic))
    rows.append(row("lorafold, --dtype float32", merge_by_lorafold(base, adapter, "--dtype", "float32")[0]))
    return rows, said


def main() -> None:
    parser = argparse.ArgumentParser(description="What rounding to bfloat16 leaves of a small update.")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5, help="of stochastic rounding; figures are medians (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()

    print(CAVEATS)
    transformers.logging.disable_progress_bar()
    base = make_base()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    adapter = DATA / "small-update"
    train(load(base), adapter, tokenizer, args.lr, args.steps)
    update = relative_update(load(base).state_dict(), adapter)
    rows, said = compare(base, adapter, tokenizer, args.seeds)

    print(f"\nAdamW, {args.steps} steps at {args.lr:g}: ‖ΔW‖ / ‖W‖ = {update:.5f}\n")
    print(f"{'':28} {'kept':>8} {'KL, answers':>13} {'KL, prose':>11}")
    for row in rows:
        print(f"{row['name']:28} {row['kept']:8.4f} {row['kl']['answers']:13.5f} {row['kl']['prose']:11.5f}")
    kl = {row["name"]: row["kl"] for row in rows}
    times = {kind: kl["lorafold, nearest"][kind] / kl["lorafold, stochastic"][kind] for kind in held_out()}
    print(f"\nKL, nearest to stochastic: {times['answers']:.0f} times on answers, {times['prose']:.0f} times on prose")
    if said:
        print(f"\nlorafold, when it rounded to nearest:\n{said}")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {"settings": settings, "environment": environment(), "relative_update": update, "rows": rows, "said": said}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
