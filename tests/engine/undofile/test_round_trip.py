"""Unmerging with an undo file gives every file of the base again, byte for byte, whatever was merged and how."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from models import edit_json, edit_tensors, gpt2, llama, plain_adapter, plain_base, save_adapter, save_base
from planning import layouts


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def round_trip(base: Path, adapters: Any, **options: Any) -> Any:
    """The report of a merge whose undo gave all files of `base` again."""
    here = base.parent
    report = lorafold.merge(base, adapters, here / "out", undo=here / "undo.safetensors", **options)
    assert report.undo_bytes == (here / "undo.safetensors").stat().st_size
    restored = lorafold.unmerge(here / "out", here / "again", undo=here / "undo.safetensors")
    wanted, found = content(base), content(here / "again")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert restored.nbytes == lorafold.open_checkpoint(base).nbytes
    return report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fast"},
        {"rounding": "stochastic", "seed": 3},
        {"dtype": "F32"},
        {"dtype": "BF16", "max_shard_size": 200},
        {"verify": False},
        {"max_memory": 200_000_000},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_every_dtype_and_rounding(tmp_path: Path, dtype: torch.dtype, options: Any) -> None:
    base = plain_base(tmp_path / "base", dtype=dtype)
    (base / "README.md").write_text("the base's own")
    first, second = plain_adapter(tmp_path / "a"), plain_adapter(tmp_path / "b", seed=11, modules=["v_proj"])
    round_trip(base, [(first, 0.7), (second, -0.2)], **options)


def test_several_tiles_of_a_tensor(tmp_path: Path) -> None:
    """1030 rows of 1024 bfloat16 are two tiles, the second of 6 rows; in float32 three."""
    for dtype in (torch.bfloat16, torch.float32):
        place = tmp_path / str(dtype)
        base = plain_base(place / "base", dtype=dtype, modules=["q_proj"], size=16)
        wide = torch.from_numpy(np.random.default_rng(1).standard_normal((1030, 1024)) * 0.02).to(dtype)
        shard = base / "model-00001-of-00002.safetensors"
        save_file(load_file(shard) | {"model.layers.0.q_proj.weight": wide}, shard, metadata={"format": "pt"})
        adapter = plain_adapter(place / "a", modules=["q_proj"], size=16)
        prefix = "base_model.model.model.layers.0.q_proj"
        random = np.random.default_rng(2)
        factors = {
            f"{prefix}.lora_A.weight": torch.from_numpy(random.standard_normal((2, 1024)) * 0.01).float(),
            f"{prefix}.lora_B.weight": torch.from_numpy(random.standard_normal((1030, 2)) * 0.01).float(),
        }
        edit_tensors(adapter, lambda held, factors=factors: held | factors)
        report = round_trip(base, [adapter])
        # the codes alone are an eighth of bfloat16 and a sixteenth of float32; few differences are larger than one step
        touched = sum(lorafold.open_checkpoint(base).tensors[name].nbytes for name in report.kept)
        assert report.undo_bytes < (0.15 if dtype == torch.bfloat16 else 0.08) * touched + 10_000


def test_llama_with_embeddings_tied_and_saved_modules(tmp_path: Path) -> None:
    for name, tied, config in (
        ("tied", True, {"target_modules": ["q_proj", "embed_tokens"]}),
        ("both", True, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}),
        ("saved", False, {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "bias": "lora_only"}),
        ("tokens", False, {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 40, 5]}}),
        ("bias", False, {"target_modules": ["q_proj"], "lora_bias": True}),
    ):
        base = save_base(llama(tied=tied, bias=name != "tied"), tmp_path / name / "base")
        adapter = save_adapter(llama(tied=tied, bias=name != "tied"), tmp_path / name / "a", **config)
        report = round_trip(base, [adapter], dtype="F32" if name == "saved" else None)
        actions = {step.action for step in report.plan.steps}
        assert {"saved": "replace", "tokens": "rows"}.get(name, "merge") in actions


def test_gpt2_transposed_and_dora(tmp_path: Path) -> None:
    for name, config in (("plain", {}), ("dora", {"use_dora": True})):
        base = save_base(gpt2(), tmp_path / name / "base")
        targets = ["c_attn", "c_proj", "wte"] if name == "plain" else ["c_attn", "c_fc"]
        adapter = save_adapter(gpt2(), tmp_path / name / "a", target_modules=targets, fan_in_fan_out=True, **config)
        round_trip(base, [adapter])


def test_updates_of_some_rows_of_a_weight(tmp_path: Path) -> None:
    """An adapter for projections apart, a base that stores them as one; only k, then all three, the last at two weights."""
    weights, pairs = layouts.projections(4)
    together = {whole: torch.cat([weights[part] for part in parts]) for whole, parts in layouts.FUSED.items()}
    for number, chosen in enumerate((["self_attn.k_proj"], list(pairs))):
        place = tmp_path / str(number)
        base = layouts.save_base(place / "base", layouts.in_layer(together, ".weight"), model_type="phi3", **layouts.HEADS)
        adapter = layouts.save_pairs(place / "a", layouts.in_layer({name: pairs[name] for name in chosen}))
        report = round_trip(base, [(adapter, 1.5 - number)])
        assert any(addend.rows for step in report.plan.steps for addend in step.addends)


def test_experts_in_a_stack(tmp_path: Path) -> None:
    """Pairs for each expert, a base that has all of them in one tensor of three dimensions."""
    of_experts, pairs = layouts.experts()
    base = layouts.save_base(tmp_path / "base", layouts.module(layouts.stacked(of_experts)), model_type="mixtral")
    report = round_trip(base, [layouts.save_pairs(tmp_path / "a", layouts.mixtral(pairs))])
    assert any(len(step.shape) == 3 and step.action == "merge" for step in report.plan.steps)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3)
        self.two = nn.Conv2d(8, 10, (3, 5), bias=False)


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convs()
    (tmp_path / "base").mkdir()
    held = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(held, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    round_trip(tmp_path / "base", [save_adapter(model, tmp_path / "a", target_modules=["one", "two"])])


def test_numbers_that_are_not_finite_and_sums_that_overflow(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", dtype=torch.float16)
    shard = base / "model-00001-of-00002.safetensors"
    held = load_file(shard)
    weight = held["model.layers.0.q_proj.weight"].clone()
    weight.view(torch.int16)[0, :4] = torch.tensor([0x7E01, 0x7C00, -1024, -1], dtype=torch.int16)  # two NaN, both infinities
    weight[1] = 65000
    save_file(held | {"model.layers.0.q_proj.weight": weight}, shard, metadata={"format": "pt"})
    adapter = plain_adapter(tmp_path / "a")
    edit_tensors(adapter, lambda held: {name: tensor * 40 for name, tensor in held.items()})
    round_trip(base, [adapter], allow_nonfinite_base=True, on_overflow="clamp")


def test_files_that_the_output_has_not_are_kept(tmp_path: Path) -> None:
    """The adapter's tokenizer wins over the base's; the base has an earlier merge's receipt, and a configuration that changes."""
    base, first, second = plain_base(tmp_path / "plain"), plain_adapter(tmp_path / "a"), plain_adapter(tmp_path / "b", seed=3)
    (base / "tokenizer.json").write_text('{"of": "the base"}')
    (base / "generation_config.json").write_text("{}")
    lorafold.merge(base, [first], tmp_path / "base")
    (second / "tokenizer.json").write_text('{"of": "the adapter"}')
    round_trip(tmp_path / "base", [second], dtype="F16")
    said = json.loads(described(tmp_path / "undo.safetensors")["lorafold_undo"])
    assert said["config"] == {"dtype": "bfloat16"}
    assert {name for name, each in said["files"].items() if not each["stored"]} == {
        "generation_config.json",
        "model.safetensors.index.json",
    }


def described(file: Path) -> dict[str, str]:
    import safetensors

    with safetensors.safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_one_file_alone(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "folder", modules=["q_proj"])
    (tmp_path / "base").mkdir()
    save_file(load_file(base / "model-00001-of-00002.safetensors"), tmp_path / "base" / "weights.safetensors")
    adapter = plain_adapter(tmp_path / "a", modules=["q_proj"])
    edit_tensors(adapter, lambda held: {name: tensor for name, tensor in held.items() if "layers.0" in name})
    edit_json(adapter / "adapter_config.json", layers_to_transform=[0])
    file = tmp_path / "base" / "weights.safetensors"
    lorafold.merge(file, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", undo=tmp_path / "undo")
    assert content(tmp_path / "again") == {"weights.safetensors": file.read_bytes()}


def test_restoring_does_not_depend_on_the_kernel_that_made_the_undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made with the compiled kernel where there is one, read by torch alone."""
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "a")
    lorafold.merge(base, [adapter], tmp_path / "out", precision="fast", undo=tmp_path / "undo")
    for module in ("merge", "cpu.compiled", "rounding", "exact"):
        if hasattr(sys.modules[f"lorafold.kernel.{module}"], "build"):
            monkeypatch.setattr(f"lorafold.kernel.{module}.build", lambda: None)
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", undo=tmp_path / "undo")
    assert content(tmp_path / "again") == content(base)
