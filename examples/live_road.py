"""Merge an adapter into a live model and take it out again, as loralib's users do.

    python examples/live_road.py .demo/base .demo/adapter.pt --compare .demo/merged

With `--compare`, the merged weights are held against a checkpoint that `lorafold merge` wrote.
"""

import argparse
import hashlib
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from lorafold.nn.attaching import attach


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name, without the adapter's; what is tied counts once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" not in name}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in weights(model).items():
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_bits(live: nn.Module, directory: Path) -> int:
    """The number of weights of `live`, all of which have the bits of the model in `directory`."""
    ours, theirs = weights(live), weights(transformers.AutoModelForCausalLM.from_pretrained(directory))
    different = [name for name in ours | theirs if not torch.equal(ours[name], theirs[name])]
    if different:
        raise SystemExit(f"{len(different)} of {len(ours)} weights differ from {directory}: {', '.join(different[:3])} …")
    return len(ours)


def live_road(base: Path, adapter: Path, compare: Path | None) -> None:
    """Load, merge, compare, unmerge, and say at each step what the weights are."""
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = fingerprint(model)
    print(f"base            {before[:16]}…")

    attach(model, ["q_proj", "v_proj"], r=8, lora_alpha=16, precision="exact")  # rounded as `lorafold merge` rounds
    model.load_state_dict(torch.load(adapter), strict=False)

    model.eval()
    print(f"model.eval()    {fingerprint(model)[:16]}…  merged")
    if compare is not None:
        print(f"                the same bits as {compare} in all {same_bits(model, compare)} weights")

    model.train()
    after = fingerprint(model)
    print(f"model.train()   {after[:16]}…  {'the base again, bit for bit' if after == before else 'NOT THE BASE'}")
    if after != before:
        raise SystemExit("unmerging did not give the base back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Merge into a live model and take it out again.")
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path, help="a state dict, as torch.save wrote it")
    parser.add_argument("--compare", type=Path, help="a merged checkpoint whose weights must be the same bits")
    args = parser.parse_args()
    live_road(args.base, args.adapter, args.compare)
