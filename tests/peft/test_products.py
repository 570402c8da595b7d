"""PEFT's LoHa and LoKr, held to PEFT's own merge: its alpha and rank, for every layer that it knows."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold import ReadOptions
from lorafold.engine import produce
from lorafold.errors import AdapterError, UnsupportedAdapterError
from models import different, edit_json, edit_tensors, refused, save_adapter
from oracle import round_fraction


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other, self.head = nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 3)
        self.conv, self.one, self.line = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv1d(4, 6, 3)


def made(path: Path, kind: str, **config: Any) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    """Base, adapter, the base's tensors, and what PEFT merges both to, in float64."""
    import peft

    torch.manual_seed(0)
    model = Layers().double()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    (path / "base").mkdir()
    save_file(held, path / "base" / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(init_weights=False, **config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and "modules_to_save" in name:
                    parameter.add_(0.5)
        wrapped.save_pretrained(path / "adapter")
        merged = wrapped.double().merge_and_unload().state_dict()
    return path / "base", path / "adapter", held, {name: value.clone() for name, value in merged.items()}


FLAT, ALL = ["lin", "other"], ["lin", "other", "conv", "one", "line"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHa", {"target_modules": ALL, "r": 3, "alpha": 16}),
    "LoHa of low rank": ("LoHa", {"target_modules": ALL, "r": 1, "alpha": 5}),
    "LoHa with core tensors": ("LoHa", {"target_modules": ALL, "r": 2, "alpha": 8, "use_effective_conv2d": True}),
    "LoHa, patterns": (
        "LoHa", {"target_modules": FLAT, "r": 4, "alpha": 8, "rank_pattern": {"lin": 2}, "alpha_pattern": {"^other": 3}},
    ),
    "LoHa, a head saved": ("LoHa", {"target_modules": FLAT, "r": 2, "alpha": 8, "modules_to_save": ["head"]}),
    "LoKr": ("LoKr", {"target_modules": [*FLAT, "conv", "one"], "r": 2, "alpha": 16}),
    "LoKr, both decomposed": (
        "LoKr", {"target_modules": FLAT, "r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    ),
    "LoKr, both whole": ("LoKr", {"target_modules": FLAT, "r": 32, "alpha": 8, "rank_pattern": {"other": 64}}),
    "LoKr with core tensors": ("LoKr", {"target_modules": ["conv"], "r": 1, "alpha": 4, "use_effective_conv2d": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_as_peft_merges_it(tmp_path: Path, case: str) -> None:
    """In float64; PEFT saves and adds its factors in float32, whose 24 bits hold some 2⁻²⁰ of sums of products of four."""
    kind, config = KINDS[case]
    base, adapter, held, wanted = made(tmp_path, kind, **config)
    lorafold.merge(base, [adapter], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in held if not torch.equal(held[name], found[name])}
    assert changed >= {f"{name}.weight" for name in config["target_modules"]}
    for name, value in wanted.items():
        difference, size = (found[name] - value).norm(), (held[name] - value).norm()
        assert difference <= 2.0**-18 * size, (name, difference / size if size else difference)
    with pytest.raises(lorafold.LorafoldError):
        lorafold.plan(base, [adapter], read_options=ReadOptions(format="lycoris"))


def test_what_it_lacks_is_refused(tmp_path: Path) -> None:
    base, adapter, _, _ = made(tmp_path, "LoHa", target_modules=FLAT, r=2, alpha=8)
    whole = load_file(adapter / "adapter_model.safetensors")
    edit_tensors(adapter, lambda held: {name: t for name, t in held.items() if "lin.hada_w2_b" not in name})
    refused(base, [adapter], AdapterError, "lin has hada_w1_a, hada_w1_b, hada_w2_a, but no hada_w2_b")
    edit_tensors(adapter, lambda held: {name: t for name, t in whole.items() if ".other." not in name})
    refused(base, [adapter], AdapterError, "holds nothing for 1 of the 2 target_modules", "other")
    edit_tensors(adapter, lambda held: whole | {"base_model.model.norm.weight": torch.ones(3)})
    refused(base, [adapter], AdapterError, "norm.weight")
    edit_tensors(adapter, lambda held: whole)
    edit_json(adapter / "adapter_config.json", r=3)
    refused(base, [adapter], AdapterError.__subclasses__()[0], "r says rank 3 for lin")
    edit_json(adapter / "adapter_config.json", r=2, use_dora=True)
    refused(base, [adapter], UnsupportedAdapterError, "use_dora beside peft_type LOHA")


def test_a_convolution_of_one_dimension_in_lokr_is_refused(tmp_path: Path) -> None:
    base, adapter, _, _ = made(tmp_path, "LoKr", target_modules=["line"], r=8, alpha=8)
    refused(base, [adapter], UnsupportedAdapterError, "line is LoKr on a convolution of one dimension")


def test_a_lora_that_calls_itself_loha_is_refused(tmp_path: Path) -> None:
    base, _, _, _ = made(tmp_path, "LoHa", target_modules=FLAT, r=2, alpha=8)
    adapter = save_adapter(Layers(), tmp_path / "lora", target_modules=FLAT)
    edit_json(adapter / "adapter_config.json", peft_type="LOHA")
    refused(base, [adapter], UnsupportedAdapterError, "peft_type is 'LOHA'")


# --- exact: the real sum of what is stored, rounded once


def rational(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in matrix.double().tolist()]


def product(one: list[list[Fraction]], other: list[list[Fraction]]) -> list[list[Fraction]]:
    columns = list(zip(*other, strict=True))
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in columns] for row in one]


def core(t: Tensor, b: Tensor) -> Tensor:
    """What a core tensor makes of a factor, (p, in · kernel): products of float64 added one after another."""
    p, q, *kernel = t.shape
    found = torch.zeros(p, b.shape[1], *kernel, dtype=torch.float64)
    for n in range(q):
        found += t[:, n, None].double() * b[n].double().view(1, -1, *(1 for _ in kernel))
    return found.flatten(1)


def side(parts: dict[str, Tensor], name: str, t: str) -> list[list[Fraction]]:
    if name in parts:
        return rational(parts[name].flatten(1))
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return product(rational(a.T), rational(core(parts[t], b))) if t in parts else product(rational(a), rational(b.flatten(1)))


def real_sum(weight: Tensor, parts: dict[str, Tensor], scaling: float) -> list[list[Fraction]]:
    s, base = Fraction(scaling), rational(weight.flatten(1))
    if "hada_w1_a" in parts:
        P, Q = side(parts, "hada_w1", "hada_t1"), side(parts, "hada_w2", "hada_t2")
        delta = [[p * q for p, q in zip(*rows, strict=True)] for rows in zip(P, Q, strict=True)]
    else:
        P, Q = side(parts, "lokr_w1", ""), side(parts, "lokr_w2", "lokr_t2")
        delta = [[p * q for p in of_P for q in of_Q] for of_P in P for of_Q in Q]
    return [[w + s * x for w, x in zip(*rows, strict=True)] for rows in zip(base, delta, strict=True)]


def exactly(held: dict[str, Tensor], adapter: Path, alpha: float, r: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The merged weights of an adapter, by rational numbers."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".")
        found.setdefault(module, {})[part] = value
    merged = {}
    for module, parts in found.items():
        weight = held[f"{module}.weight"]
        real = real_sum(weight, parts, alpha / r)
        rounded = torch.tensor([[round_fraction(x, dtype) for x in row] for row in real], dtype=torch.float64)
        merged[f"{module}.weight"] = rounded.to(dtype).view(weight.shape)
    return merged


EXACT = {name: KINDS[name] for name in KINDS if "patterns" not in name and "saved" not in name and "whole" not in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXACT)
def test_the_real_sum_rounded_once(tmp_path: Path, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of memory and from file to file; also where the product of the ranks is more than the rank of any such matrix."""
    kind, config = EXACT[case]
    base, adapter, held, _ = made(tmp_path, kind, **config)
    held = {name: value.to(dtype) for name, value in held.items()}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    wanted = exactly(held, adapter, config["alpha"], config["r"], dtype)
    for least in (0, 1 << 40):
        monkeypatch.setattr(produce, "LEAST", least)
        lorafold.merge(base, [adapter], tmp_path / f"out{least}")
        found = load_file(tmp_path / f"out{least}" / "model.safetensors")
        assert not different({name: found[name] for name in wanted}, wanted)


def test_several_kinds_are_one_sum(tmp_path: Path) -> None:
    """Two LoHa, a LoKr and a LoRA with weights of their own: in any order, and each sum is rounded once."""
    base, first, held, _ = made(tmp_path, "LoHa", target_modules=FLAT, r=3, alpha=16)
    held = {name: value.to(torch.bfloat16) for name, value in held.items()}
    others = []
    for i, (kind, r) in enumerate((("LoHa", 2), ("LoKr", 2))):
        (tmp_path / f"{i}").mkdir()
        others.append(made(tmp_path / f"{i}", kind, target_modules=FLAT, r=r, alpha=8)[1])
    lora = save_adapter(Layers(), tmp_path / "lora", target_modules=["lin", "conv"])
    save_file(held, base / "model.safetensors", {"format": "pt"})
    adapters = [(first, 1.0), (others[0], 0.5), (others[1], -0.7), (lora, 1.0)]
    outs = []
    for i, order in enumerate((adapters, adapters[::-1])):
        lorafold.merge(base, order, tmp_path / f"out{i}", undo=tmp_path / f"undo{i}")
        outs.append(load_file(tmp_path / f"out{i}" / "model.safetensors"))
    assert not different(*outs)
    A, B = (load_file(lora / "adapter_model.safetensors")[f"base_model.model.lin.lora_{x}.weight"] for x in "AB")
    total = [[Fraction(6) / 4 * x for x in row] for row in product(rational(B), rational(A))]
    for adapter, scaling in ((first, 16 / 3), (others[0], 8 / 2 * 0.5), (others[1], 8 / 2 * -0.7)):
        stored = load_file(adapter / "adapter_model.safetensors")
        parts = {n.rpartition(".")[2]: t for n, t in stored.items() if ".lin." in n}
        delta = real_sum(torch.zeros(20, 12), parts, scaling)
        total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(total, delta, strict=True)]
    real = [[w + x for w, x in zip(*rows, strict=True)] for rows in zip(rational(held["lin.weight"]), total, strict=True)]
    assert outs[0]["lin.weight"].tolist() == [[round_fraction(x, torch.bfloat16) for x in row] for row in real]
    lorafold.unmerge(tmp_path / "out0", tmp_path / "back", undo=tmp_path / "undo0")
    assert not different(load_file(tmp_path / "back" / "model.safetensors"), held)


def test_into_a_model_in_memory(tmp_path: Path) -> None:
    base, adapter, held, _ = made(tmp_path, "LoHa", target_modules=ALL, r=3, alpha=16)
    lorafold.merge(base, [adapter], tmp_path / "out")
    model = Layers().double()
    model.load_state_dict(held)
    lorafold.merge_into(model, [adapter])
    assert not different(model.state_dict(), load_file(tmp_path / "out" / "model.safetensors"))


def test_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D are (in, out): the bits of the transpose."""
    generator = torch.Generator().manual_seed(3)
    name, weight = "h.0.attn.c_attn", torch.randn(10, 24, generator=generator).bfloat16()
    (tmp_path / "adapter").mkdir()
    factors = {
        f"base_model.model.{name}.hada_w{n}_{x}": torch.randn(shape, generator=generator)
        for n in (1, 2)
        for x, shape in (("a", (24, 3)), ("b", (3, 10)))
    }
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LOHA", "r": 3, "alpha": 8, "target_modules": ["c_attn"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    found = []
    for way, stored in (("there", weight.T.contiguous()), ("turned", weight)):
        (tmp_path / way).mkdir()
        save_file({f"{name}.weight": stored}, tmp_path / way / "model.safetensors", {"format": "pt"})
        (tmp_path / way / "config.json").write_text(json.dumps({"model_type": "gpt2"} if way == "turned" else {}))
        lorafold.merge(tmp_path / way, [tmp_path / "adapter"], tmp_path / f"out-{way}")
        found.append(load_file(tmp_path / f"out-{way}" / "model.safetensors")[f"{name}.weight"])
    assert torch.equal(found[0].T, found[1])
    assert not torch.equal(found[1], weight)
