"""Bad input is refused before a byte is written: one error that names file, tensor or field, expected and found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import (
    AdapterConfigError,
    AdapterError,
    CheckpointError,
    LorafoldError,
    NonFiniteError,
    OutputError,
    PlanError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    UnsupportedAdapterError,
)
from models import edit_json, edit_tensors, plain_adapter, plain_base, refused, rewritten, tensors

PREFIX = "base_model.model."
A0, B0 = (f"{PREFIX}model.layers.0.q_proj.lora_{each}.weight" for each in "AB")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


Held = dict[str, torch.Tensor]


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Held], Held]:
    def changed(held: Held) -> Held:
        new = {n: how(t) if n == name else t for n, t in held.items()}
        return {n: t.contiguous() for n, t in new.items() if t is not None}

    return changed


TENSORS: dict[str, tuple[Any, type[LorafoldError], tuple[str, ...]]] = {
    "no lora_B": (change(B0, lambda t: None), AdapterError, (WEIGHTS, "model.layers.0.q_proj has lora_A but no lora_B")),
    "no lora_A": (change(A0, lambda t: None), AdapterError, (WEIGHTS, "model.layers.0.q_proj has lora_B but no lora_A")),
    "A of another width": (
        change(A0, lambda t: torch.ones(2, 7)), ShapeMismatchError,
        ("model.layers.0.q_proj has lora_A [2, 7] and lora_B [8, 2]", "ΔW is [8, 7]", "model.layers.0.q_proj.weight", "is [8, 8]"),
    ),
    "A transposed": (change(A0, lambda t: t.T), AdapterError, ("lora_A must be (r, …)", "found [8, 2] and [8, 2]")),
    "another rank": (
        lambda held: change(A0, lambda t: torch.ones(3, 8))(change(B0, lambda t: torch.ones(8, 3))(held)), AdapterConfigError,
        (CONFIG, "r says rank 2 for model.layers.0.q_proj", "have rank 3"),
    ),
    "NaN": (
        change(B0, lambda t: t.index_fill(0, torch.tensor([5]), float("nan"))), NonFiniteError,
        (WEIGHTS, f"'{B0}' holds 2 numbers that are not finite, the first at [5, 0]: nan"),
    ),
    "infinity": (
        change(A0, lambda t: t / 0), NonFiniteError, (f"'{A0}' holds 16 numbers that are not finite, the first at [0, 0]",),
    ),
    "integers": (change(A0, lambda t: t.to(torch.int32)), AdapterError, ("is of type I32, expected 16 to 64-bit floats",)),
    "float8": (change(A0, lambda t: t.to(torch.float8_e4m3fn)), AdapterError, ("is of type F8_E4M3, expected",)),
    "DoRA": (
        lambda held: held | {f"{PREFIX}model.layers.0.q_proj.lora_magnitude_vector": torch.ones(8)}, AdapterError,
        ("model.layers.0.q_proj: use_dora is false, but lora_magnitude_vector is there",),
    ),
    "grouped convolution": (
        lambda held: change(A0, lambda t: t[..., None, None])(change(B0, lambda t: t[:, :1, None, None])(held)),
        UnsupportedAdapterError,
        ("a convolution in 2 groups, found [2, 8, 1, 1] and [8, 1, 1, 1]",),
    ),
    "a tensor of no pair": (
        lambda held: held | {f"{PREFIX}model.layers.0.norm.weight": torch.ones(8)}, AdapterError,
        ("norm.weight' is not part of a LoRA pair, and modules_to_save does not name it",),
    ),
    "a bias": (
        lambda held: held | {f"{PREFIX}model.layers.0.q_proj.bias": torch.ones(8)}, AdapterError, ("and bias is 'none'",),
    ),
    "two adapters": (
        lambda held: {n.replace(".weight", f".{'one' if 'layers.0' in n else 'two'}.weight"): t for n, t in held.items()},
        AdapterError,
        ("holds several adapters: one, two",),
    ),
    "the same part twice": (
        lambda held: held | {A0.removeprefix(PREFIX): held[A0].clone()}, AdapterError, (A0, "are the same part"),
    ),
    "nothing": (lambda held: {}, AdapterError, ("holds no tensors",)),
    "lora_bias that is not configured": (
        lambda held: held | {B0.replace("weight", "bias"): torch.ones(8)}, AdapterError,
        ("lora_bias is false, but lora_B.bias is there",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_of_an_adapter(base: Path, adapter: Path, fault: str) -> None:
    edit, kind, parts = TENSORS[fault]
    edit_tensors(adapter, edit)
    refused(base, [adapter], kind, *parts)


def test_paths_that_lead_to_no_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    refused(base, [tmp_path / "adaptor"], AdapterError, "does not exist", f"did you mean {adapter}?")
    refused(base, [adapter / CONFIG], AdapterError, CONFIG, "is this a safetensors file?")
    refused(base, [base], AdapterError, "it looks like a base model", "the base model comes first")
    (adapter / "checkpoint-5").mkdir()
    (adapter / CONFIG).rename(adapter / "checkpoint-5" / CONFIG)
    refused(base, [adapter], AdapterError, f"has {WEIGHTS} but no {CONFIG}")
    (adapter / WEIGHTS).rename(adapter / "checkpoint-5" / "adapter_model.bin")
    refused(base, [adapter], AdapterError, f"there is one in {adapter / 'checkpoint-5'}")
    refused(base, [adapter / "checkpoint-5"], UnsupportedAdapterError, "adapter_model.bin, a pickle", WEIGHTS)
    refused(base, [], PlanError, "there is no adapter to merge")
    refused(base, str(adapter), PlanError, "must be a list of paths")


def test_a_damaged_file_of_an_adapter(base: Path, adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-5])
    refused(base, [adapter], AdapterError, WEIGHTS, f"{len(data) - 5}")
    (adapter / WEIGHTS).write_bytes(b"not safetensors at all")
    refused(base, [adapter], AdapterError, WEIGHTS)


def test_bases_that_are_damaged_or_lead_elsewhere(base: Path, adapter: Path) -> None:
    shard, index = base / "model-00002-of-00002.safetensors", base / "model.safetensors.index.json"
    data, text = shard.read_bytes(), index.read_text()
    shard.write_bytes(data[:-10])
    refused(base, [adapter], CheckpointError, shard.name, str(len(data) - 10))
    shard.write_bytes(data)
    index.write_text(text.replace("model-00002", "../model-00002"))
    refused(base, [adapter], CheckpointError, index.name, "../model-00002-of-00002.safetensors")
    index.write_text(text)
    shard.unlink()
    refused(base, [adapter], CheckpointError, shard.name, "is missing", "3 tensors")
    refused(base.parent / "bse", [adapter], CheckpointError, "no such folder", f"did you mean {base}?")
    refused(adapter, [adapter], CheckpointError, "is an adapter, not a base checkpoint", "the base model first")


def test_a_base_that_was_saved_with_its_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    attached = tmp_path / "attached"
    attached.mkdir()
    held = {n.replace("q_proj.weight", "q_proj.base_layer.weight"): t for n, t in tensors(base).items()}
    save_file(held, attached / "model.safetensors", metadata={"format": "pt"})
    refused(attached, [adapter], CheckpointError, "saved with its adapter still attached", "model.unload()")


def test_weights_of_adapters(tmp_path: Path, base: Path, adapter: Path) -> None:
    for weight in (float("nan"), float("inf"), True, "0.5", None):
        refused(base, [(adapter, weight)], PlanError, "the weight of adapter must be a finite number")
    edit_json(adapter / CONFIG, lora_alpha=1e300)
    refused(base, [(adapter, 1e300)], PlanError, "is not finite")
    saving = plain_adapter(tmp_path / "saving", modules_to_save=["norm"])
    edit_tensors(saving, lambda held: held | {f"{PREFIX}model.layers.{i}.norm.weight": torch.ones(8) for i in (0, 1)})
    refused(base, [(saving, 0.5)], PlanError, "replaces model.layers.0.norm.weight as a whole, so its weight must be 1, not 0.5")
    refused(base, [adapter, adapter], PlanError, "are the same adapter", "adapter@1.5")
    twin = plain_adapter(tmp_path / "twin", seed=9, modules_to_save=["norm"])
    edit_tensors(twin, lambda held: held | {f"{PREFIX}model.layers.{i}.norm.weight": torch.zeros(8) for i in (0, 1)})
    refused(base, [saving, twin], PlanError, "norm.weight is changed twice, the second time by twin")


def test_outputs_that_cannot_be(tmp_path: Path, base: Path, adapter: Path) -> None:
    for out, part in (
        (base, "it is the input"), (base / "out", "it lies in the input"), (tmp_path, "the input"),
        (adapter / "x", "it lies in the input"), (base / "config.json" / "x", "is not a folder"),
        (tmp_path / "no" / "out", f"mkdir -p {tmp_path / 'no'}"),
    ):  # fmt: skip
        with pytest.raises(OutputError) as caught:
            lorafold.merge(base, [adapter], out)
        assert part in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_disk_that_is_too_small(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.files.atomic import checks as outputplace

    monkeypatch.setattr(outputplace, "free_bytes", lambda path: 100)
    refused(base, [adapter], OutputError, f"{base.parent / 'out'} cannot be written: needed 544 bytes, free 100")


def test_options_that_cannot_be(base: Path, adapter: Path) -> None:
    refused(base, [adapter], PlanError, "dtype must be one of BF16", dtype="int8")
    refused(base, [adapter], PlanError, "max_shard_size must be positive", max_shard_size=0)
    refused(base, [adapter], PlanError, "precision must be", precision="double")
    refused(base, [adapter], PlanError, "rounding must be", rounding="down")
    refused(base, [adapter], PlanError, "seed must be", rounding="stochastic", seed=1.5)


def mutations(held: Held) -> Iterator[tuple[str, str, Held]]:
    """Every tensor of an adapter dropped, renamed, doubled, transposed, cut and widened; with its name."""
    for name, tensor in held.items():
        rest = {n: t for n, t in held.items() if n != name}
        module = name.rsplit(".lora_", 1)[0]
        yield "dropped", name, rest
        yield "renamed", name, rest | {name.replace("proj", "prj"): tensor}
        yield "renamed part", name, rest | {name.replace("lora_A", "lora_C").replace("lora_B", "lora_D"): tensor}
        yield "doubled", name, held | {name.removeprefix(PREFIX): tensor.clone()}
        yield "doubled under a name", name, held | {name.replace(".weight", ".default.weight"): tensor.clone()}
        yield "transposed", name, rest | {name: tensor.T.contiguous()}
        yield "cut", name, rest | {name: tensor[:-1].contiguous()}
        yield "widened", name, rest | {name: torch.cat([tensor, tensor[:, :1]], dim=1)}
        yield "flattened", name, rest | {name: tensor.flatten()}
        yield "pair dropped", name, {n: t for n, t in rest.items() if not n.startswith(module + ".")}


def test_no_tensor_is_lost_or_misplaced_in_silence(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Every mutation is a typed error that names the tensor's module, or, for a pair that is gone whole, a note."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
    all_mutations = list(mutations(load_file(adapter / WEIGHTS)))
    assert len(all_mutations) == 80
    for what, name, changed in all_mutations:
        save_file(changed, folder / WEIGHTS)
        module = name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
        if what == "pair dropped":
            plan = lorafold.plan(base, [folder])
            assert any(module in note for note in plan.notes), name
            assert plan.count("merge") == 3
            continue
        with pytest.raises((AdapterError, ShapeMismatchError, UnmatchedAdapterError)) as caught:
            lorafold.plan(base, [folder])
        named = module.replace("proj", "prj") if what == "renamed" else module
        assert named in str(caught.value) or module in str(caught.value), (what, name)


def test_a_file_that_lost_all_of_one_kind_is_an_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    lost = rewritten(adapter, tmp_path / "lost", rename=lambda name: None if "v_proj" in name else name)
    refused(base, [lost], AdapterError, "holds nothing for 1 of the 2 target_modules", "v_proj")


def test_biases_and_saved_modules_that_the_base_has_and_the_file_lacks_are_notes(tmp_path: Path, base: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", modules_to_save=["norm"], bias="all")
    edit_tensors(adapter, lambda held: held | {f"{PREFIX}model.layers.0.norm.weight": torch.ones(8)})
    biased = tmp_path / "biased"
    biased.mkdir()
    held = tensors(base) | {"model.layers.1.q_proj.bias": torch.zeros(8).bfloat16()}
    save_file(held, biased / "model.safetensors", metadata={"format": "pt"})
    notes = "\n".join(lorafold.plan(biased, [adapter]).notes)
    assert "modules_to_save names 'norm', but the adapter holds nothing for model.layers.1.norm.weight" in notes
    assert "bias is 'all', but the adapter holds none for model.layers.1.q_proj.bias" in notes


def test_errors_escape_names_from_files(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda held: {n.replace("q_proj", "q\x1b[2J\r"): t for n, t in held.items()})
    error = refused(base, [adapter], UnmatchedAdapterError)
    assert "\x1b" not in str(error)
    edit_json(adapter / CONFIG, target_modules=None)
    error = refused(base, [adapter], UnmatchedAdapterError, "q\\x1b[2J\\r")
    assert "\x1b" not in str(error)
