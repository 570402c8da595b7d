from __future__ import annotations

import subprocess
import sys

import lorafold.nn
import lorafold.nn.layers

HEAVY = ("safetensors", "typer", "rich", "transformers", "peft")


def loaded_after(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(done.stdout)  # our own list of names


def test_importing_loralib_loads_neither_files_nor_terminals() -> None:
    assert loaded_after("import loralib as lora; lora.Linear(4, 4, r=2).eval()") == []


def test_that_test_can_fail() -> None:
    assert loaded_after("import loralib, safetensors.torch") == ["safetensors"]


def test_the_names_are_the_very_same_objects() -> None:
    import loralib.layers
    import loralib.utils

    for name in ("Linear", "Embedding", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"):
        assert getattr(loralib, name) is getattr(loralib.layers, name) is getattr(lorafold.nn.layers, name)
    for name in ("mark_only_lora_as_trainable", "lora_state_dict"):
        assert getattr(loralib, name) is getattr(loralib.utils, name) is getattr(lorafold.nn, name)
    assert loralib.name == "lora"
