"""Train a LoRA adapter that answers as a ship's captain writes his log, and save it in two formats.

    python examples/train_adapter.py .demo/base .demo/adapter

The loop is the usual one; lorafold's part is in the lines that name it. `.demo/adapter` is a directory as PEFT writes it,
`.demo/adapter.pt` a state dict as loralib's users keep it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from ask import Token, prompt
from torch import Tensor

from lorafold.nn.attaching import attach
from lorafold.nn.saving import save_adapter
from lorafold.nn.training import lora_state_dict, mark_only_lora_as_trainable

TEXTS = Path(__file__).with_name("captains_log.jsonl")
IGNORED = -100  # the label of a position that the loss leaves out


def example(tokenizer: Any, question: str, answer: str) -> tuple[list[Token], list[Token]]:
    """Tokens and labels of one conversation: only the answer is learned."""
    asked, said = prompt(tokenizer, question), tokenizer(answer + tokenizer.eos_token)["input_ids"]
    return asked + said, [IGNORED] * len(asked) + said


def batches(examples: list[tuple[list[Token], list[Token]]], size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, labels), both (size, length of the longest), in a new order in each epoch."""
    for _ in range(epochs):
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), size):
            batch = [examples[i] for i in order[start : start + size]]
            longest = max(len(tokens) for tokens, _ in batch)
            tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
            labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch])
            yield tokens, labels


def train(base: Path, out: Path, *, epochs: int = 2, batch_size: int = 4, lr: float = 3e-3) -> None:
    """Train on `TEXTS` and write the directory `out` and `out`.pt."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products: two threads gain a third, and lose far more where another program holds a core
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)  # bfloat16, as it is on disk

    attached = attach(model, ["q_proj", "v_proj"], r=8, lora_alpha=16)  # lora_A and lora_B are float32
    mark_only_lora_as_trainable(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    examples = [example(tokenizer, **json.loads(line)) for line in TEXTS.read_text().splitlines()]
    print(f"{sum(p.numel() for p in trainable):,} parameters in {len(attached)} layers, {len(examples)} answers to learn from")

    steps = epochs * -(-len(examples) // batch_size)
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    model.train()
    start = time.perf_counter()
    for step, (tokens, labels) in enumerate(batches(examples, batch_size, epochs), 1):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % 5 == 0:
            print(f"step {step:2} of {steps}   loss {loss.item():.2f}   {time.perf_counter() - start:4.1f} s", flush=True)

    torch.save(lora_state_dict(model), out.with_name(out.name + ".pt"))
    save_adapter(model, out, base_model=str(base), task_type="CAUSAL_LM")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo's adapter.")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    train(args.base, args.out)
