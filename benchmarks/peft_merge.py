"""The same job with PEFT: load the base, load the adapter, merge_and_unload, save_pretrained.

Run as a program of its own, so that its time and memory are those of one merge from start to end; the clock starts when all is
imported.

    python benchmarks/peft_merge.py BASE ADAPTER OUT
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measuring import wait_for_the_start
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def merge(base: str, adapter: str, out: str) -> None:
    """Merge in bfloat16, as the base is stored, into shards of 500 MB."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="500MB")


if __name__ == "__main__":
    wait_for_the_start()
    merge(*sys.argv[1:])
