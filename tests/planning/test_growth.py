"""The work of planning grows with the number of modules, not with its square: calls are counted, not seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from lorafold.errors import LorafoldError

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")


def names(count: int) -> list[str]:
    return [f"model.layers.{i // 4}.self_attn.{LEAVES[i % 4]}" for i in range(count)]


def base(folder: Path, count: int, out: int = 3, model_type: str = "llama") -> Path:
    folder.mkdir()
    held = {f"{name}.weight": torch.zeros(out, 2) for name in names(count)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def adapter(folder: Path, modules: list[str], out: int = 3, **config: Any) -> Path:
    folder.mkdir()
    held = {}
    for name in modules:
        held |= {
            f"base_model.model.{name}.lora_A.weight": torch.ones(1, 2),
            f"base_model.model.{name}.lora_B.weight": torch.ones(out, 1),
        }
    save_file(held, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(LEAVES), **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def kohya(path: Path, modules: list[str]) -> Path:
    held = {}
    for name in modules:
        module = f"lora_te_{name.replace('.', '_')}"
        held |= {f"{module}.lora_down.weight": torch.ones(1, 2), f"{module}.lora_up.weight": torch.ones(3, 1)}
        held[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(held, path)
    return path


Make = Callable[[Path, int], tuple[Path, Path]]
CASES: dict[str, Make] = {
    "plain": lambda path, n: (base(path / "base", n), adapter(path / "a", names(n))),
    "targets named one by one": lambda path, n: (base(path / "base", n), adapter(path / "a", names(n), target_modules=names(n))),
    "targets that are nowhere": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", names(n), target_modules=[*LEAVES, *(f"{name}.lost" for name in names(n))]),
    ),
    "patterns": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", names(n), alpha_pattern=dict.fromkeys(names(n), 2), rank_pattern=dict.fromkeys(names(n), 1)),
    ),
    "excluded": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", names(n)[: n // 2], exclude_modules=names(n)[n // 2 :]),
    ),
    "saved": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", names(n), modules_to_save=[f"{name}.lost" for name in names(n)]),
    ),
    "unmatched": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", [name.replace("layers", "blocks") for name in names(n)]),
    ),
    "half unmatched": lambda path, n: (
        base(path / "base", n),
        adapter(path / "a", [name.replace("_", "-") if i % 2 else name for i, name in enumerate(names(n))]),
    ),
    "square weights of an unknown model": lambda path, n: (
        base(path / "base", n, 2, "nobody"),
        adapter(path / "a", names(n), 2),
    ),
    "kohya": lambda path, n: (base(path / "base", n), kohya(path / "a.safetensors", names(n))),
}


def calls(work: Callable[[], object]) -> int:
    """How many functions are called, those that are built in too: what a loop over all of something does for each."""
    count = 0

    def see(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    except LorafoldError:
        pass
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("case", CASES)
def test_twice_the_modules_are_twice_the_work(tmp_path: Path, case: str) -> None:
    counts = []
    for number, count in enumerate((200, 400, 800)):
        (tmp_path / str(number)).mkdir()
        found, given = CASES[case](tmp_path / str(number), count)
        counts.append(calls(lambda found=found, given=given: lorafold.plan(found, [given])))
    # of a + b·n the second step is twice the first; of c·n² it would be four times
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second < 2.4 * first, counts
