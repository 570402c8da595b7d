"""One tensor of an adapter of a diffusion model dropped, renamed, doubled, transposed or resized: an error that names it.

Nothing is written then. Where it is no error, the merge has the same bits as before, or a note names the module.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from diffusion import metadata, write
from lorafold.errors import InputError

SHAPES = {
    "down_blocks.0.attn.to_q.weight": (8, 12),
    "down_blocks.0.attn.to_k.weight": (8, 8),
    "down_blocks.0.attn.to_k.bias": (8,),
    "down_blocks.0.conv.weight": (8, 6, 3, 3),
    "down_blocks.1.conv.weight": (8, 8, 1, 1),
    "down_blocks.0.norm.weight": (8,),
    "down_blocks.0.norm.bias": (8,),
}
Q, K, CONV, ONE, NORM = (
    name.removesuffix(".weight").replace(".", "_") for name in SHAPES if name.endswith(".weight")
)  # as kohya spells them


def numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape) + (2.0 if name.endswith(("alpha", "dora_scale")) else 0.0) for name, shape in shapes.items()}


def pair(name: str, out: int, inner: int, *kernel: int, down: str = "lora_down", up: str = "lora_up") -> dict[str, tuple[int, ...]]:
    ones = tuple(1 for _ in kernel)
    return {f"{name}.{down}.weight": (2, inner, *kernel), f"{name}.{up}.weight": (out, 2, *ones)}


def with_alpha(parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return parts | {f"{name.partition('.')[0]}.alpha": () for name in parts}


def under(name: str, **parts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"lora_unet_{name}.{part.replace('__', '.')}": shape for part, shape in parts.items()}


ADAPTERS: dict[str, dict[str, tuple[int, ...]]] = {
    "kohya": with_alpha(
        pair(f"lora_unet_{Q}", 8, 12) | pair(f"lora_unet_{K}", 8, 8) | pair(f"lora_unet_{CONV}", 8, 6, 3, 3)
        | pair(f"lora_unet_{ONE}", 8, 8, 1, 1)
    ),
    "locon": with_alpha(
        pair(f"lora_unet_{Q}", 8, 12) | under(Q, dora_scale=(8, 1)) | pair(f"lora_unet_{K}", 8, 8) | under(K, dora_scale=(8, 1))
        | under(
            CONV, lora_down__weight=(2, 6, 1, 1), lora_mid__weight=(2, 2, 3, 3), lora_up__weight=(8, 2, 1, 1),
            dora_scale=(8, 1, 1, 1),
        )
    ),
    "loha": with_alpha(
        under(Q, hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12))
        | under(ONE, hada_w1_a=(8, 3), hada_w1_b=(3, 8), hada_w2_a=(8, 3), hada_w2_b=(3, 8))
        | under(
            CONV, hada_w1_a=(2, 8), hada_w1_b=(2, 6), hada_w2_a=(2, 8), hada_w2_b=(2, 6), hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3)
        )
    ),
    "lokr": with_alpha(
        under(Q, lokr_w1=(2, 3), lokr_w2=(4, 4)) | under(K, lokr_w1=(2, 4), lokr_w2_a=(4, 1), lokr_w2_b=(1, 2))
        | under(ONE, lokr_w1_a=(4, 1), lokr_w1_b=(1, 2), lokr_w2=(2, 4, 1, 1))
        | under(CONV, lokr_w1=(2, 2), lokr_w2_a=(1, 4), lokr_w2_b=(1, 3), lokr_t2=(1, 1, 3, 3))
    ),
    "whole": under(K, diff=(8, 8), diff_b=(8,)) | under(NORM, w_norm=(8,), b_norm=(8,)),
    "diffusers": pair("unet.down_blocks.0.attn.to_q", 8, 12, down="lora_A", up="lora_B")
    | pair("unet.down_blocks.0.attn.to_k", 8, 8, down="lora_A", up="lora_B")
    | pair("unet.down_blocks.0.conv", 8, 6, 3, 3, down="lora_A", up="lora_B"),
    "diffusers dora": pair("unet.down_blocks.0.attn.to_q", 8, 12, down="lora_A", up="lora_B")
    | {"unet.down_blocks.0.attn.to_q.lora_magnitude_vector": (8,)}
    | pair("unet.down_blocks.0.conv", 8, 6, 3, 3, down="lora_A", up="lora_B")
    | {"unet.down_blocks.0.conv.lora_magnitude_vector": (1, 8, 1, 1)},
    "diffusers old": pair("unet.down_blocks.0.attn.processor.to_q_lora", 8, 12, down="down", up="up")
    | pair("unet.down_blocks.0.conv.lora", 8, 6, 3, 3, down="down", up="up"),
}  # fmt: skip
REMARKS = {
    "diffusers": metadata({"unet": {"r": 2, "lora_alpha": 3}}),
    "diffusers dora": metadata({"unet": {"r": 2, "lora_alpha": 3, "use_dora": True}}),
}
COUNT = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mutations")
    (path / "base").mkdir()
    save_file(numbers(SHAPES), path / "base" / "model.safetensors")
    return path


def renamed(name: str) -> list[str]:
    """Names like `name` that are not it; no other module that the base has, as one tensor alone may be all that there is of one."""
    module, _, part = name.partition("." if name.startswith("lora_") else ".lora")
    swaps = {
        "lora_down": "lora_up", "lora_up": "lora_down", "lora_A": "lora_B", "lora_B": "lora_A", "w1": "w2", "w2": "w1", "_a": "_b",
        "_b": "_a", "diff_b": "diff", "t1": "t2", "t2": "t1", ".down": ".up", ".up.": ".down.", "unet": "te1", "blocks": "block",
        "lora": "lroa", "weight": "bias", "alpha": "aplha", "dora": "dara", "norm": "nrom", "w_norm": "b_norm", "magnitude": "m",
    }  # fmt: skip
    changed = {name.replace(old, new, 1) for old, new in swaps.items() if old in name}
    return sorted({*changed, f"x_{name}", f"{name}x", f"{module}.{part}y"} - {name})


def spellings(name: str) -> set[str]:
    """What an error or a note may call a tensor: its name, its module's, or the base's name of that."""
    module = name.partition(".processor")[0].partition(".lora")[0]
    module = module if module.startswith("unet.") else name.partition(".")[0]
    base = [
        n.removesuffix(".weight")
        for n in SHAPES
        if n.removesuffix(".weight").replace(".", "_") == module.removeprefix("lora_unet_")
    ]
    return {name, module, module.removeprefix("unet."), *base} - {"", "unet"}


@st.composite
def mutations(draw: st.DrawFn, held: dict[str, Tensor]) -> tuple[str, str, dict[str, Tensor]]:
    """What was done, to which tensor, and the tensors then."""
    name = draw(st.sampled_from(sorted(held)))
    tensor, rest = held[name], {other: t for other, t in held.items() if other != name}
    what = draw(st.sampled_from(["dropped", "renamed", "doubled", "transposed", "resized", "squeezed"]))
    if what == "dropped":
        return what, name, rest
    if what in ("renamed", "doubled"):
        new = draw(st.sampled_from(renamed(name)))
        return f"{what} {new}", name, (held if what == "doubled" else rest) | {new: tensor * 1.5}
    if what == "transposed" and tensor.dim() > 1:
        return (
            what,
            name,
            rest | {name: tensor.transpose(*draw(st.sampled_from(list(itertools.combinations(range(tensor.dim()), 2)))))},
        )
    if what == "squeezed":
        return (
            what,
            name,
            rest | {name: draw(st.sampled_from([tensor.squeeze(), tensor[None], tensor[..., None], tensor.flatten()]))},
        )
    dim = draw(st.integers(0, max(0, tensor.dim() - 1)))
    wide = tensor if tensor.dim() else tensor[None]
    size = wide.shape[dim]
    sizes = [n for n in (size - 1, size + 1, 2 * size) if n > 0]
    grown = torch.cat([wide, wide * 0.5, wide], dim).narrow(dim, 0, draw(st.sampled_from(sizes)))
    return what, name, rest | {name: grown}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_change_passes_unnoticed(place, kind):
    held = numbers(ADAPTERS[kind])
    good = write(place / f"{kind}.safetensors", held, REMARKS.get(kind))
    lorafold.merge(place / "base", [good], place / kind)
    wanted = load_file(place / kind / "model.safetensors")

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mutation=mutations(held))
    def check(mutation: tuple[str, str, dict[str, Tensor]]) -> None:
        what, name, tensors = mutation
        if {n: tensor.shape for n, tensor in tensors.items()} == {n: tensor.shape for n, tensor in held.items()}:
            return  # the same but for its numbers: no file can show that it was not so meant
        folder = place / f"{kind}-{next(COUNT)}"
        folder.mkdir()
        adapter = write(folder / "changed.safetensors", tensors, REMARKS.get(kind))
        known = {each for changed in (name, *(tensors.keys() - held.keys())) for each in spellings(changed)}
        error = None
        try:
            report = lorafold.merge(place / "base", [adapter], folder / "out")
        except InputError as caught:
            error = str(caught)
        if error is not None:
            assert any(each in error for each in known), (what, name, error)
            assert sorted(os.listdir(folder)) == ["changed.safetensors"]
            return
        found = load_file(folder / "out" / "model.safetensors")
        same = found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
        noted = any(each in note for each in known for note in report.plan.notes)
        assert same or noted, (what, name, report.plan.notes)

    check()
