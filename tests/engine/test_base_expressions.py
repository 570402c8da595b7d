"""A base whose tensors are expressions of those that its files hold: merged to the oracle's bits, proven, undone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold.adapters.adapter import WeightedAdapter
from lorafold.adapters.numbers import AdapterReader
from lorafold.api import components, restoring
from lorafold.checkpoints.checkpoint import Checkpoint
from lorafold.engine.memory import threads_within
from lorafold.engine.sources import Sources
from lorafold.errors import CheckpointError, InputError
from lorafold.files import evaluation
from lorafold.files.expression import Cut, Joined, Matrix, Node, Permuted, Reshaped, narrow
from lorafold.files.products import Scaled
from lorafold.files.safetensors.info import TensorInfo
from lorafold.planning.make import make_plan
from models import different, plain_adapter, plain_base, tensors
from oracle import correctly_rounded, same_bits

SIZE = 40
Q, V, NORM = ("model.layers.0.q_proj.weight", "model.layers.0.v_proj.weight", "model.layers.0.norm.weight")


@dataclass(frozen=True)
class Halved(Node):
    """A node of this test's own, as an encoding would define one: small integers stand for halves of themselves, in bfloat16."""

    of: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].bfloat16() / 2

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return Halved(narrow(self.of, dim, start, count))


Stored = Mapping[str, Tensor]
Held = Mapping[str, TensorInfo]
KINDS: dict[str, tuple[Callable[[Stored], dict[str, Tensor]], Callable[[Held], dict[str, Matrix]]]] = {
    "transposed": (
        lambda held: {Q: held[Q].T.contiguous(), V: held[V], NORM: held[NORM]},
        lambda infos: {Q: Permuted(infos[Q]), V: infos[V], NORM: infos[NORM]},
    ),
    "rows of another": (
        lambda held: {"qv": torch.cat([held[Q], held[V]]), NORM: held[NORM]},
        lambda infos: {Q: Cut(infos["qv"], 0, 0, SIZE), V: Cut(infos["qv"], 0, SIZE, 2 * SIZE), NORM: infos[NORM]},
    ),
    "rows where they lie": (
        lambda held: {"qv": torch.cat([held[Q], held[V]]), NORM: held[NORM]},
        lambda infos: {Q: narrow(infos["qv"], 0, 0, SIZE), V: narrow(infos["qv"], 0, SIZE, SIZE), NORM: infos[NORM]},
    ),
    "columns of another": (
        lambda held: {"qv": torch.cat([held[Q], held[V]], 1), NORM: held[NORM]},
        lambda infos: {Q: Cut(infos["qv"], 1, 0, SIZE), V: Cut(infos["qv"], 1, SIZE, 2 * SIZE), NORM: infos[NORM]},
    ),
    "joined": (
        lambda held: {"a": held[Q][:13].clone(), "b": held[Q][13:].clone(), V: held[V], NORM: held[NORM]},
        lambda infos: {Q: Joined((infos["a"], infos["b"])), V: infos[V], NORM: infos[NORM]},
    ),
    "each second row": (
        lambda held: {"qv": torch.stack([held[Q], held[V]], 1).flatten(0, 1), NORM: held[NORM]},
        lambda infos: {Q: Cut(infos["qv"], 0, 0, 2 * SIZE, 2), V: Cut(infos["qv"], 0, 1, 2 * SIZE, 2), NORM: infos[NORM]},
    ),
    "an untouched one too": (
        lambda held: {Q: held[Q].T.contiguous(), V: held[V], NORM: held[NORM].flip(0).reshape(2, -1)},
        lambda infos: {Q: Permuted(infos[Q]), V: infos[V], NORM: Reshaped(infos[NORM], (SIZE,))},
    ),
    "decoded": (
        lambda held: {"codes": (held[Q] * 20).char(), V: held[V], NORM: held[NORM]},
        lambda infos: {Q: Halved(infos["codes"]), V: infos[V], NORM: infos[NORM]},
    ),
}


@pytest.fixture(params=["all at once", "slice by slice"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that do not lie together: read with all that is between them, as of small tensors, or alone, as of large ones."""
    monkeypatch.setattr(evaluation, "_STRIDED", 1 << 30 if request.param == "all at once" else 0)


def laid_out(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Tensor]]:
    """A base of which the first file is stored as `kind` has it, which lorafold's verbs open as what it means; and its numbers."""
    base = plain_base(folder / "base", size=SIZE)
    meant = tensors(base)
    store, express = KINDS[kind]
    first = base / "model-00001-of-00002.safetensors"
    held = load_file(first)
    save_file(store(held), first, metadata={"format": "pt"})
    files = sorted(base.glob("*.safetensors"))
    index = {name: file.name for file in files for name in load_file(file)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    real = lorafold.open_checkpoint

    def opened(path: Path, **options: Any) -> Checkpoint:
        checkpoint = real(path, **options)
        if Path(path) != base:
            return checkpoint
        first, second = (dict(shard.header.tensors) for shard in checkpoint.shards)
        return replace(checkpoint, tensors=express(first) | second)

    for room in (components, restoring):
        monkeypatch.setattr(room, "open_checkpoint", opened)
    if kind == "decoded":
        meant[Q] = (held[Q] * 20).char().bfloat16() / 2
    if kind == "an untouched one too":
        meant[NORM] = held[NORM].flip(0)
    return base, meant


def merged_by_hand(meant: Mapping[str, Tensor], adapter: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What the oracle says of each merged tensor."""
    loaded, found = lorafold.load_adapter(adapter), {}
    with AdapterReader(loaded) as reader:
        for module in loaded.modules.values():
            weight = meant[module.tensor]
            found[module.tensor] = correctly_rounded(weight, [reader.update(module)], dtype or weight.dtype)
    return found


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_merged_proven_and_undone(tmp_path: Path, kind: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    base, meant = laid_out(tmp_path, kind, monkeypatch)
    adapter = plain_adapter(tmp_path / "adapter", size=SIZE)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    report = lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo", dtype=dtype)
    assert report.proof is not None
    assert report.proof.share == 1
    found = tensors(tmp_path / "out")
    assert found.keys() == meant.keys()
    wanted = merged_by_hand(meant, adapter, torch.float32 if dtype else None)
    assert len(wanted) == 4
    for name, tensor in found.items():
        if name in wanted:
            assert same_bits(tensor, wanted[name]), name
        else:
            assert torch.equal(tensor, meant[name].to(tensor.dtype)), name
    proof = lorafold.verify(tmp_path / "out", base, [adapter])
    assert (proof.failures, proof.share) == ((), 1)
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", undo=tmp_path / "undo")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    if dtype is None:
        lorafold.unmerge(tmp_path / "out", tmp_path / "copied", base=base)
        assert {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_of_a_base_that_is_stored_plainly(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for: noise, too, comes from tensor and place. DoRA's norms are of what is meant."""
    base, meant = laid_out(tmp_path, kind, monkeypatch)
    plain = plain_base(tmp_path / "plain", size=SIZE)
    for file in plain.glob("*.safetensors"):
        save_file({name: meant[name].contiguous() for name in load_file(file)}, file, metadata={"format": "pt"})
    adapter = plain_adapter(tmp_path / "adapter", size=SIZE)
    dora = plain_adapter(tmp_path / "dora", size=SIZE, use_dora=True)
    held = load_file(dora / "adapter_model.safetensors")
    names = [name for name in held if "lora_A" in name]
    held |= {name.replace("lora_A.weight", "lora_magnitude_vector"): torch.linspace(1, 2, SIZE) for name in names}
    save_file(held, dora / "adapter_model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any]
    for options in ({"rounding": "stochastic"}, {"precision": "fast"}, {"max_shard_size": 5000}, {"only_changed": True}, {}):
        outs = [tmp_path / f"{source.name}-{next(iter(options), 'dora')}" for source in (base, plain)]
        for source, out in zip((base, plain), outs, strict=True):
            lorafold.merge(source, [adapter if options else dora], out, **options)
        assert different(*(tensors(out) for out in outs)) == {}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rows where they lie"])
def test_a_wrong_bit_is_found(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = laid_out(tmp_path, kind, monkeypatch)
    adapter = plain_adapter(tmp_path / "adapter", size=SIZE)
    lorafold.merge(base, [adapter], tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00002.safetensors"
    held = load_file(file)
    for name, index in ((Q, (29, 3)), (NORM, (7,))):
        held[name].view(torch.int16)[index] ^= 1
    save_file(held, file, metadata={"format": "pt"})
    proof = lorafold.verify(tmp_path / "out", base, [adapter])
    assert any(f.startswith(f"{Q} differs in 1 of") and f.endswith("the first at [29, 3]") for f in proof.failures)
    assert any(f.startswith(f"{NORM} differs in 1 of") and f.endswith("the first at [7]") for f in proof.failures)
    with pytest.raises(CheckpointError, match=r"which merging did not change, differs"):
        lorafold.unmerge(tmp_path / "out", tmp_path / "again", base=base)


def test_a_product_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a base may be wider than what they become."""
    monkeypatch.setitem(
        KINDS,
        "scaled",
        (
            lambda held: {Q: held[Q], V: held[V], NORM: held[NORM]},
            lambda infos: {Q: Scaled(infos[Q], 1 / 3), V: infos[V], NORM: infos[NORM]},
        ),
    )
    base, meant = laid_out(tmp_path, "scaled", monkeypatch)
    adapter = plain_adapter(tmp_path / "adapter", size=SIZE)
    report = lorafold.merge(base, [adapter], tmp_path / "out", dtype="BF16", undo=tmp_path / "undo")
    assert report.proof is not None
    assert report.proof.share == 1
    wanted = merged_by_hand(meant | {Q: meant[Q].double() * (1 / 3)}, adapter, torch.bfloat16)
    assert same_bits(tensors(tmp_path / "out")[Q], wanted[Q])
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", undo=tmp_path / "undo")
    assert tensors(tmp_path / "again")[Q].equal(meant[Q])


def test_the_memory_counts_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = laid_out(tmp_path, "transposed", monkeypatch)
    adapter = lorafold.load_adapter(plain_adapter(tmp_path / "adapter", size=SIZE))
    checkpoint = components.open_checkpoint(base)
    needed = []
    for each in (lorafold.open_checkpoint(base), checkpoint):
        plan = make_plan(each, [WeightedAdapter(adapter)])
        with pytest.raises(InputError) as caught:
            threads_within(Sources(plan, each, [adapter]), 1)
        needed.append(int(caught.value.message.partition("needs ")[2].split()[0]))
    assert needed[1] - needed[0] == 2 * 3 * (
        2 * SIZE * SIZE
    )  # two blocks begun, each with the tensor, its transpose, and that in rows
