"""The public road, taken with faulty inputs: `lorafold merge`, its exit status, what it says, and what it leaves."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lorafold.cli.main import main
from models import edit_json, edit_tensors, plain_adapter, plain_base

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.q_proj"
A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


@dataclass
class Road:
    """`base`, `adapter` and `out` in a folder of their own, and the command line between them."""

    folder: Path
    capsys: Any

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        code = caught.value.code
        assert type(code) is int
        return code, out, err

    def merge(self, *options: str | Path, adapters: tuple[str | Path, ...] | None = None) -> str:
        """The output of a merge that must succeed."""
        chosen = (self.adapter,) if adapters is None else adapters
        code, out, err = self.run("merge", self.base, *chosen, "-o", self.out, *options)
        assert (code, err) == (0, ""), err
        return out

    def refused(
        self, *parts: str, options: tuple[str | Path, ...] = (), adapters: tuple[str | Path, ...] | None = None, code: int = 1
    ) -> str:
        """What a merge says that must be refused: it names each of `parts`, and leaves nothing at the output or beside it."""
        before = sorted(os.listdir(self.folder))
        chosen = (self.adapter,) if adapters is None else adapters
        found, out, err = self.run("merge", self.base, *chosen, "-o", self.out, *options)
        assert found == code, err
        assert out == ""
        for part in parts:
            assert part in err, (part, err)
        assert "Traceback" not in err
        assert sorted(os.listdir(self.folder)) == before
        return err

    def receipt(self) -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads((self.out / "lorafold.json").read_text())
        return receipt

    def config(self, **fields: Any) -> None:
        edit_json(self.adapter / "adapter_config.json", **fields)

    def edit(self, **changes: Tensor | None) -> None:
        """Set, add or (None) remove tensors of the adapter."""
        edit_tensors(self.adapter, lambda held: {n: t for n, t in {**held, **changes}.items() if t is not None})

    def shard(self, **changes: Tensor | None) -> None:
        """Set, add or (None) remove tensors of the base's first shard."""
        from safetensors.torch import load_file, save_file

        file = self.base / SHARD
        held = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
        save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file, metadata={"format": "pt"})

    def index(self, change: Any) -> None:
        """Let `change` edit the base's weight_map in place."""
        index = json.loads((self.base / INDEX).read_text())
        change(index["weight_map"])
        (self.base / INDEX).write_text(json.dumps(index))


@pytest.fixture
def road(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Road:
    """Base and adapter that merge."""
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter")
    return Road(tmp_path, capsys)
