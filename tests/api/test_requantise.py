"""Codes made of the model that a quantised base was made of, with the base's scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from encoded_bases import KINDS, NAMES, adapted, made, numbers
from lorafold.errors import CheckpointError, InputError, LorafoldError, PlanError
from models import llama, save_adapter, save_base
from quantised import BLOCK, codes_of, linear, raw, spread, to_fp8, updates_in, whole, wide


@dataclass(frozen=True)
class Case:
    """A Llama in bfloat16, the same in FP8 blocks, and an adapter."""

    original: Path
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    original, base = save_base(llama(), folder / "original"), save_base(llama(), folder / "base")
    to_fp8(base, linear(), weight_block_size=list(BLOCK), activation_scheme="dynamic")
    adapter = save_adapter(llama(), folder / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    return Case(original, base, adapter)


def test_codes_are_nearest_to_the_original_with_the_adapter(case: Case, tmp_path: Path) -> None:
    out, undo = tmp_path / "out", tmp_path / "undo"
    report = lorafold.merge(case.base, [case.adapter], out, requantise_from=case.original, undo=undo)
    found, held, floats, updates = whole(out), whole(case.base), whole(case.original), updates_in(case.adapter)
    assert len(updates) == 6
    for name, tensor in held.items():
        if name not in updates:
            assert raw(found[name]) == raw(tensor), name
            continue
        scale = spread(held[f"{name}_scale_inv"].double().numpy(), tuple(tensor.shape), BLOCK)
        sums = wide(floats[name].double().numpy(), updates[name])
        expected = codes_of(sums, scale, tensor.view(torch.uint8).numpy(), None)
        assert np.array_equal(found[name].view(torch.uint8).numpy(), expected), name
    assert (out / "config.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert 0.9 < report.kept_in_all < 1.1
    assert any("codes are made of original" in note for note in report.plan.notes)
    assert lorafold.verify(out, case.base, [case.adapter], requantise_from=case.original).ok
    assert "from the sums with the model in floats" in (out / "README.md").read_text()
    lorafold.unmerge(out, tmp_path / "by_base", base=case.base)
    lorafold.unmerge(out, tmp_path / "by_undo", undo=undo)
    for file in case.base.iterdir():
        for restored in ("by_base", "by_undo"):
            assert (tmp_path / restored / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_original_is_an_input_like_the_others(case: Case, tmp_path: Path) -> None:
    """It is in the plan and in the receipt, by the fingerprint of its files, and must be there to prove an output."""
    plan = lorafold.plan(case.base, [case.adapter], requantise_from=case.original)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert lorafold.run(tmp_path / "plan.json", tmp_path / "out").plan == plan
    with pytest.raises(InputError, match="which was not given") as caught:
        lorafold.verify(tmp_path / "out", case.base, [case.adapter])
    assert "`requantise_from=ORIGINAL`" in str(caught.value.hint)
    other = save_base(llama(), tmp_path / "other", torch.float32)
    proof = lorafold.verify(tmp_path / "out", case.base, [case.adapter], requantise_from=other)
    assert any("has another fingerprint" in failure for failure in proof.failures)


def test_stochastic_where_it_is_asked_for(case: Case, tmp_path: Path) -> None:
    for seed in (0, 1):
        how: Any = {"requantise_from": case.original, "rounding": "stochastic", "seed": seed, "overwrite": True}
        lorafold.merge(case.base, [case.adapter], tmp_path / "out", **how)
        found = raw(whole(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"])
        if seed == 0:
            first = found
    assert found != first


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_encoding(tmp_path: Path, kind: Callable[[], Any]) -> None:
    """An original that is what the codes state: the output is that of the nearest codes, whichever of the two it is made of."""
    base = made(tmp_path / "base", kind)
    floats = numbers(lorafold.open_checkpoint(base), NAMES)
    adapter, _ = adapted(tmp_path / "adapter", 0.5 * float(floats[NAMES[0]].std()))
    (tmp_path / "original").mkdir()
    save_file(floats, tmp_path / "original" / "model.safetensors")
    options: dict[str, Any] = {"output_format": "same", "rounding": "nearest"}
    lorafold.merge(base, [adapter], tmp_path / "nearest", **options)
    lorafold.merge(base, [adapter], tmp_path / "out", requantise_from=tmp_path / "original", max_memory="500MB")
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("nearest", "out"))
    assert one.keys() == two.keys()
    assert [name for name in one if raw(one[name]) != raw(two[name])] == []


def refused(case: Case, out: Path, kind: type[LorafoldError], words: str, **options: Any) -> None:
    with pytest.raises(kind, match=words):
        lorafold.merge(options.pop("base", case.base), [case.adapter], out, **{"requantise_from": case.original, **options})
    assert not out.exists()


def test_what_cannot_be_is_refused(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(case, out, PlanError, "writes no codes", output_format="bf16")
    refused(case, out, PlanError, "is not quantised", base=case.original)
    refused(case, out, CheckpointError, "is quantised itself", requantise_from=case.base)
    refused(case, out, CheckpointError, "no such folder", requantise_from=tmp_path / "nowhere")
    another = save_base(llama(seed=5), tmp_path / "another")
    refused(case, out, CheckpointError, "was not made of the original by rounding to nearest", requantise_from=another)
    smaller = Path(shutil.copytree(case.original, tmp_path / "smaller"))
    for file in smaller.glob("*.safetensors"):
        held = {name: tensor[:8].clone() if "v_proj" in name else tensor for name, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    refused(case, out, CheckpointError, r"expected floats of \[16, 32\], found \[8, 32\] of BF16", requantise_from=smaller)
    calibrated = Path(shutil.copytree(case.base, tmp_path / "calibrated"))
    generator = torch.Generator().manual_seed(1)
    for file in calibrated.glob("*.safetensors"):
        held = load_file(file)
        for name, tensor in held.items():
            if tensor.dtype == torch.float8_e4m3fn:
                codes = tensor.view(torch.uint8)
                moved = (codes ^ (torch.rand(codes.shape, generator=generator) < 0.35).to(torch.uint8)).view(torch.float8_e4m3fn)
                held[name] = torch.where(moved.float().isnan(), tensor.float(), moved.float()).to(torch.float8_e4m3fn)
        save_file(held, file, metadata={"format": "pt"})
    refused(case, out, CheckpointError, "was not made of the original", base=calibrated)
