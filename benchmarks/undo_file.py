"""What an undo file takes: its bytes beside those of the weights that changed, and the time of making and of using it.

    python benchmarks/undo_file.py                       # SmolLM2-135M as `make demo` left it, in bfloat16 and float32
    python benchmarks/undo_file.py --base FOLDER --runs 5

The adapter is random: A as PEFT begins it, B so that ‖ΔW‖ / ‖W‖ is what is asked for, both in float32. After each merge the base is
restored from the undo file alone and compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import environment, load_of_others
from safetensors.torch import save_file

import lorafold
from lorafold import Checkpoint
from lorafold.files.safetensors.reader import TensorFile

CAVEATS = """\
- The factors are in the file in the dtype that they came in, float32 here: of a small model they are the larger part of it; of a
  bfloat16 weight of 4096², at r = 16, they are a sixtieth.
- Random updates are spread evenly over a weight; trained ones are not, and may take less or more.
- Times are of whole runs, proofs included, with a warm page cache."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
Row = dict[str, Any]


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights of linear layers."""
    found = {}
    for shard in checkpoint.shards:
        with TensorFile(shard.header) as file:
            for name, info in shard.header.tensors.items():
                if name.removesuffix(".weight").rpartition(".")[2] in TARGETS:
                    found[name] = file.read(info)
    return found


def make_adapter(checkpoint: Checkpoint, path: Path, r: int, relative: float) -> Path:
    """A PEFT directory for all linear layers whose updates have `relative` times the norm of their weights."""
    torch.manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    for name, weight in weights(checkpoint).items():
        A, B = torch.empty(r, weight.shape[1]).uniform_(-1, 1), torch.randn(weight.shape[0], r)
        B *= relative * weight.float().norm() / (B @ A).norm() / 2  # lora_alpha / r is 2
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        held |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    path.mkdir()
    save_file(held, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(TARGETS)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def one(base: Path, folder: Path, r: int, relative: float, runs: int) -> Row:
    """Sizes, and medians of times, of one merge."""
    checkpoint = lorafold.open_checkpoint(base)
    adapter = make_adapter(checkpoint, folder / "adapter", r, relative)
    plain, out, again, undo = (folder / name for name in ("plain", "out", "again", "undo"))
    seconds: dict[str, list[float]] = {"merge": [], "with undo": [], "unmerge": []}
    for _ in range(runs):
        for path in (plain, out, again):
            shutil.rmtree(path, ignore_errors=True)
        undo.unlink(missing_ok=True)
        seconds["merge"].append(timed(lambda: lorafold.merge(base, [adapter], plain))[0])
        took, report = timed(lambda: lorafold.merge(base, [adapter], out, undo=undo))
        seconds["with undo"].append(took)
        seconds["unmerge"].append(timed(lambda: lorafold.unmerge(out, again, undo=undo))[0])
        for shard in checkpoint.shards:
            assert (again / shard.name).read_bytes() == shard.path.read_bytes(), shard.name
    changed = sum(checkpoint.tensors[name].nbytes for name in report.kept)
    factors = (adapter / "adapter_model.safetensors").stat().st_size
    return {
        "relative": relative,
        "changed": changed,
        "share": report.undo_bytes / changed,
        "share_without_factors": (report.undo_bytes - factors) / changed,
        "with_undo_over_merge": median(a / b for a, b in zip(seconds["with undo"], seconds["merge"], strict=True)),
        "unmerge_over_merge": median(a / b for a, b in zip(seconds["unmerge"], seconds["merge"], strict=True)),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    print(CAVEATS, f"- load of others: {load_of_others():.1f}", sep="\n", end="\n\n")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for dtype, stored in DTYPES.items():
            place = Path(name, dtype)
            place.mkdir()
            base = place / "base"
            nothing = make_adapter(lorafold.open_checkpoint(chosen.base), place / "nothing", 1, 0.0)
            lorafold.merge(chosen.base, [nothing], base, dtype=stored)  # in its dtype, and with a configuration that says so
            for relative in (0.01, 0.05, 0.26):
                folder = place / str(relative)
                folder.mkdir()
                row = {"dtype": dtype, **one(base, folder, chosen.rank, relative, chosen.runs)}
                rows.append(row)
                print(
                    f"{dtype:<9} ‖ΔW‖/‖W‖ {relative:<5} file {row['share']:.3f} of the weights that changed,"
                    f" {row['share_without_factors']:.3f} without the factors; merge with undo {row['with_undo_over_merge']:.1f}"
                    f" of a merge, unmerge {row['unmerge_over_merge']:.1f}",
                    flush=True,
                )
                shutil.rmtree(folder)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
