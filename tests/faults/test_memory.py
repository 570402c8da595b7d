"""Row 52: memory is bounded whatever the size of the base; under a cap of the system it is kept, or the error names the tensor."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

LIMIT = 200_000_000


def sparse_base(path: Path, *, shards: int, per_shard: int, rows: int, columns: int) -> Path:
    """bfloat16 weights of `rows` × `columns`, all zero, in files that take no room on the disk."""
    path.mkdir()
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, size = {}, rows * columns * 2
        for i in range(per_shard):
            tensor = f"model.layers.{shard * per_shard + i}.q_proj.weight"
            header[tensor] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [i * size, (i + 1) * size]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        (path / name).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path / name, 8 + len(text) + per_shard * size)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text("{}")
    return path


def adapter(path: Path, layers: Iterable[int], *, rows: int, columns: int, r: int = 8) -> Path:
    path.mkdir()
    torch.manual_seed(0)
    held = {}
    for layer in layers:
        prefix = f"base_model.model.model.layers.{layer}.q_proj"
        held[f"{prefix}.lora_A.weight"] = torch.randn(r, columns) * 0.01
        held[f"{prefix}.lora_B.weight"] = torch.randn(rows, r) * 0.01
    save_file(held, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["q_proj"], "layers_to_transform": list(layers)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


CAPPED = """
import resource, sys
from lorafold.cli import main

def status(field):
    return int(open("/proc/self/status").read().partition(field + ":")[2].split()[0]) * 1024

more, small_base, small_adapter, *arguments = sys.argv[1:]
try:
    main(["merge", small_base, small_adapter, "-o", arguments[-1] + "-warm", "--overwrite"])  # all is loaded that a merge loads
except SystemExit:
    pass
start, data = status("VmRSS"), status("VmData") + int(more)
resource.setrlimit(resource.RLIMIT_DATA, (data, data))  # not RLIMIT_AS: of that the C library keeps 64 MB for each thread, empty
try:
    main(["merge", *arguments])
finally:
    print("grown by", status("VmHWM") - start)
"""


def capped(folder: Path, more: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A merge to `folder`/out in a process whose memory of its own may grow by `more` bytes once everything is loaded."""
    if not (folder / "small").exists():
        sparse_base(folder / "small", shards=1, per_shard=1, rows=64, columns=64)
        adapter(folder / "little", [0], rows=64, columns=64)
    command = [sys.executable, "-c", CAPPED, str(more), folder / "small", folder / "little", *arguments, "-o", folder / "out"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_row_52_two_gigabytes_within_200_megabytes(tmp_path: Path) -> None:
    """2.1 GB in weights of 67 MB, a quarter of them merged: under --max-memory 200MB, and under a cap of the system of as much."""
    base = sparse_base(tmp_path / "base", shards=4, per_shard=8, rows=4096, columns=8192)
    done = capped(tmp_path, LIMIT, base, adapter(tmp_path / "a", range(0, 32, 4), rows=4096, columns=8192), "--max-memory", "200MB")
    assert done.returncode == 0, done.stderr
    assert "32 of 32 tensors proven" in done.stdout
    assert 0 < int(done.stdout.rpartition("grown by")[2]) < LIMIT


@pytest.mark.slow
def test_row_52_too_little_memory_is_one_error_and_nothing_is_there(tmp_path: Path) -> None:
    base = sparse_base(tmp_path / "base", shards=2, per_shard=1, rows=4096, columns=4096)
    merge = (base, adapter(tmp_path / "a", [0, 1], rows=4096, columns=4096))
    done = capped(tmp_path, 16_000_000, *merge)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "MemoryShortageError: memory ran out" in done.stderr
    assert "--max-memory" in done.stderr
    assert not (tmp_path / "out").exists()
    done = capped(tmp_path, 4 * LIMIT, *merge)
    assert done.returncode == 0, done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]


def test_row_52_the_tensor_is_named(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever says that memory ran out, torch or Python."""
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")):

        def short(*args: Any, error: BaseException = error, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr("lorafold.engine.blocks.merge_rows", short)
        road.refused("MemoryShortageError: memory ran out at tensor 'model.layers.0.", "--max-memory")


def test_row_52_what_cannot_be_kept_is_refused_by_name(road: Any) -> None:
    road.refused("model.layers.0.", "needs", "--max-memory", options=("--max-memory", "1MB"))
    road.merge("--max-memory", "200MB")
    road.refused("--max-memory", options=("--max-memory", "lots"), code=2)


def test_row_52_a_small_file_takes_no_more_than_it_has(tmp_path: Path) -> None:
    """Reading at most 256 MB of a small file does not ask for 256 MB."""
    import tracemalloc

    from lorafold.files.regular import read_regular

    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    tracemalloc.start()
    assert len(read_regular(tmp_path / "file", 1 << 28)) == 3_000_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
