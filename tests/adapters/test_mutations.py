"""Tensors that were dropped, renamed, doubled, transposed or resized: each is an error that names it, and nothing is written.

Where it is no error, the merged weights are the same, or what was made of it is said by name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import formats
import lorafold
from lorafold.adapters.adapter import Base, on_base
from lorafold.adapters.load import load_adapter
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import InputError

FILES = {
    "peft": "adapter_model.safetensors", "mlx": "adapters.safetensors", "torchtune": "adapter_model.pt",
    "litgpt": "lit_model.pth.lora",
}  # fmt: skip


def tensors_of(path: Path, kind: str) -> dict[str, torch.Tensor]:
    file = path / FILES[kind] if kind in FILES else path
    if file.suffix == ".safetensors":
        return load_file(file)
    if kind == "gguf":
        import gguf

        return {
            t.name: torch.from_numpy(np.array(t.data).reshape(list(map(int, t.shape))[::-1])) for t in gguf.GGUFReader(file).tensors
        }
    held = torch.load(file)
    return held["model"] if kind == "litgpt" else held  # type: ignore[no-any-return]


def write(path: Path, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    file = path / FILES[kind] if kind in FILES else path
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    elif kind == "gguf":
        from lorafold.adapters.formats.gguf.writer import gguf_bytes

        pairs = {
            "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": formats.ALPHA
        }  # fmt: skip
        file.write_bytes(gguf_bytes(pairs, tensors))
    else:
        torch.save({"model": tensors} if kind == "litgpt" else tensors, file)


def renamings(name: str) -> list[str]:
    """Names that are not quite `name`."""
    swaps = (
        ("q_proj", "q_prj"), ("lora_a", "lora_b"), ("lora_b", "lora_a"), ("lora_A", "lora_B"), ("lora_B", "lora_A"), (".0.", ".7."),
        (".1.", ".0."), ("lora_", "lorra_"), ("layers", "layer"), ("blk", "block"), ("mlp", "ffn"), (".weight", ""),
        ("v_proj", "k_proj"), ("attn_v", "attn_k"), ("fc_1", "fc_2"), ("w1", "w3"), ("up_proj", "gate_proj"),
        ("ffn_up", "ffn_gate"), ("proj", "norm"),
    )  # fmt: skip
    found = [name.replace(old, new, 1) for old, new in swaps if old in name]
    return [*found, f"x.{name}", f"{name}.x", name.replace(".lora", ".default.lora", 1)]


def mutated(draw: Any, held: dict[str, torch.Tensor]) -> tuple[str, str, dict[str, torch.Tensor]]:
    """What was done, the name that it was done to, and what came of it."""
    what = draw(st.sampled_from(["dropped", "renamed", "doubled", "transposed", "resized", "retyped"]))
    name = draw(st.sampled_from(sorted(held)))
    tensor, rest = held[name], {n: t for n, t in held.items() if n != name}
    if what == "dropped":
        return what, name, rest
    if what in ("renamed", "doubled"):
        new = draw(st.sampled_from([each for each in renamings(name) if each not in held]))
        return what, name, {**(rest if what == "renamed" else held), new: tensor.clone()}
    if what == "transposed":
        return what, name, {**rest, name: tensor.T}
    if what == "retyped":
        return what, name, {**rest, name: tensor.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))}
    dim, more = draw(st.integers(0, 1)), draw(st.sampled_from([-1, 1, 2]))
    size = list(tensor.shape)
    size[dim] += more
    return what, name, {**rest, name: torch.ones(size)}


@pytest.mark.parametrize("kind", formats.WRITERS)
def test_no_mutation_passes_unnoticed(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    base = formats.base(folder / "base")
    path = formats.WRITERS[kind](folder / "adapter", formats.pairs())
    options = ReadOptions(lora_alpha=formats.ALPHA if kind == "loralib" else None, allow_pickle=True)
    held = tensors_of(path, kind)
    write(path, kind, held)
    modules: dict[str, list[str]] = {}
    facts = Base({"model_type": "llama", "num_attention_heads": formats.HEADS, "num_key_value_heads": formats.KEYS}, {
        name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()
    })  # fmt: skip
    adapter = load_adapter(path, options)
    for module in (*adapter.modules.values(), *on_base(adapter, facts).modules.values()):
        for info in module.stored:
            modules.setdefault(info.name, []).append(module.name)
    lorafold.merge(base, [path], folder / "wanted", read_options=options)
    wanted = load_file(folder / "wanted" / "model.safetensors")

    @settings(max_examples=70, deadline=None)
    @given(data=st.data())
    def check(data: Any) -> None:
        what, name, changed = mutated(data.draw, held)
        write(path, kind, changed)
        try:
            lorafold.merge(base, [path], folder / "out", read_options=options)
        except InputError as error:
            refusal = str(error)
        else:
            found = load_file(folder / "out" / "model.safetensors")
            shutil.rmtree(folder / "out")
            assert found.keys() == wanted.keys()
            same = all(torch.equal(found[each], wanted[each]) for each in wanted)
            notes = lorafold.plan(base, [path], read_options=options).notes
            # a pair of loralib's with more rows of lora_A is that of a MergedLinear: nothing in the file tells, so it is said
            assert same or any("MergedLinear" in note and modules[name][0] in note for note in notes), (what, name)
            return
        assert not (folder / "out").exists()
        involved = {name, *(changed.keys() - held.keys())}
        names = involved | {each for tensor in involved for each in modules.get(tensor, ())}
        names |= {each.rpartition(".lora")[0] or each for each in names}
        names |= {each.removesuffix(".weight") for each in names}
        names |= {plain for each in names if (plain := each.removeprefix("base_model.model.")) != each}
        assert any(each in refusal for each in names), (what, name, refusal)

    check()
