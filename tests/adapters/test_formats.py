"""The same update in every format: detected, said, and merged to the same bits; and what two formats could both mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import lorafold
from lorafold.adapters.adapter import WeightedAdapter
from lorafold.adapters.formats.table import FORMATS
from lorafold.adapters.load import is_adapter
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AdapterError, InputError, LorafoldError, UnsupportedAdapterError

OPTIONS = ReadOptions(lora_alpha=formats.ALPHA, allow_pickle=True)


@pytest.fixture(params=formats.WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_format_gives_the_same_weights(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    base, held = formats.base(tmp_path / "base"), formats.pairs()
    path = formats.WRITERS[kind](tmp_path / "adapter", held)
    options = OPTIONS if kind in ("loralib",) else ReadOptions(allow_pickle=True)
    plan = lorafold.plan(base, [path], read_options=options)
    assert plan.adapters[0].format == kind
    lorafold.merge(base, [path], tmp_path / "out", read_options=options)
    before, after, deltas = (
        load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"), formats.deltas(held)
    )  # fmt: skip
    for name, weight in before.items():
        assert torch.equal(after[name], weight + deltas[name] if name in deltas else weight), name
    assert not lorafold.verify(tmp_path / "out", base, [path], read_options=options).failures


@pytest.mark.parametrize("kind", ["torchtune", "gguf"])
def test_an_order_that_only_the_base_knows(tmp_path: Path, kind: str) -> None:
    path = formats.WRITERS[kind](tmp_path / "adapter", formats.pairs())
    for config in ({"num_attention_heads": None}, {"num_attention_heads": 3, "num_key_value_heads": 3}):
        base = formats.base(tmp_path / "base", **config)
        with pytest.raises(AdapterError, match="heads"):
            lorafold.plan(base, [path], read_options=OPTIONS)
    if kind == "torchtune":
        with pytest.raises(UnsupportedAdapterError, match="model_type 'falcon'"):
            lorafold.plan(formats.base(tmp_path / "base", "falcon"), [path], read_options=OPTIONS)
    from lorafold.planning.make import make_plan

    adapter = lorafold.load_adapter(path, OPTIONS)
    with pytest.raises(LorafoldError, match="leaves something to the base"):
        make_plan(lorafold.open_checkpoint(base), [WeightedAdapter(adapter)])


def test_litgpt_with_some_of_queries_keys_and_values(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, held = formats.base(tmp_path / "base"), formats.pairs()
    path = formats.litgpt(tmp_path / "adapter", held)
    tensors = torch.load(path / "lit_model.pth.lora")["model"]
    for i in range(2):
        three = [held[f"model.layers.{i}.self_attn.{each}_proj"] for each in "qv"]
        tensors[f"transformer.h.{i}.attn.qkv.lora_A"] = torch.cat([A for A, _ in three])
        tensors[f"transformer.h.{i}.attn.qkv.lora_B"] = torch.cat([B for _, B in three])
    torch.save({"model": tensors}, path / "lit_model.pth.lora")
    text = path / "hyperparameters.yaml"
    text.write_text(text.read_text().replace("lora_key: true", "lora_key: false  # not this one"))
    lorafold.merge(base, [path], tmp_path / "out", read_options=OPTIONS)
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    deltas = {name: delta for name, delta in formats.deltas(held).items() if "k_proj" not in name}
    assert all(torch.equal(after[name], before[name] + deltas.get(name, 0)) for name in before)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    path = formats.gguf(tmp_path / "adapter", formats.pairs())
    assert lorafold.plan(formats.base(tmp_path / "base", "mistral"), [path]).count("merge") == 15
    with pytest.raises(AdapterError, match="is for the architecture 'llama', and the base is 'qwen2'"):
        lorafold.plan(formats.base(tmp_path / "base", "qwen2"), [path])


def test_torchtune_dora_turns_the_magnitudes_too(tmp_path: Path) -> None:
    torch.manual_seed(7)
    base, name = formats.base(tmp_path / "base"), "model.layers.0.self_attn.q_proj"
    held = {name: (torch.randn(2, 8), torch.randn(8, 2))}
    m = torch.rand(8) + 1
    one = formats.peft(tmp_path / "one", held)
    fields = json.loads((one / "adapter_config.json").read_text()) | {"use_dora": True}
    (one / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(one / "adapter_model.safetensors") | {f"base_model.model.{name}.lora_magnitude_vector": m}
    save_file(tensors, one / "adapter_model.safetensors")
    two = formats.torchtune(tmp_path / "two", held)
    turned = formats.llama_rows(m[:, None], formats.HEADS)[:, 0].contiguous()
    torch.save(torch.load(two / "adapter_model.pt") | {"layers.0.attn.q_proj.magnitude": turned}, two / "adapter_model.pt")
    lorafold.merge(base, [one], tmp_path / "a")
    lorafold.merge(base, [two], tmp_path / "b", read_options=OPTIONS)
    a, b = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    assert all(torch.equal(a[each], b[each]) for each in a)
    assert not torch.equal(a[f"{name}.weight"], load_file(base / "model.safetensors")[f"{name}.weight"])


def mlx_dora(folder: Path, name: str, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> Path:
    folder.mkdir()
    fields = {"fine_tune_type": "dora", "lora_parameters": {"rank": a.shape[-1], "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file({f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}, folder / "adapters.safetensors")
    return folder


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.up_proj"])
def test_mlx_dora_scales_rows_of_linears_and_embeddings(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    base = formats.base(tmp_path / "base")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    out, inner = weight.shape
    a, b = (torch.randn(out, 2), torch.randn(2, inner)) if "embed" in name else (torch.randn(inner, 2), torch.randn(2, out))
    m = torch.rand(out) + 1
    delta = 2.0 * (a.double() @ b.double())
    adapted = weight.double() + (delta if "embed" in name else delta.T)
    path = mlx_dora(tmp_path / "adapter", name, a, b, m)
    lorafold.merge(base, [path], tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    wanted = (m.double()[:, None] / adapted.norm(dim=1, keepdim=True) * adapted).float()
    # the reference's float64 and the merge's may round to neighbouring float32 numbers: one ulp, 2^-23 of the number
    assert torch.allclose(after, wanted, rtol=2**-23, atol=0)


def test_mlx_changes_a_tied_head_with_its_embedding(tmp_path: Path) -> None:
    torch.manual_seed(9)
    base = formats.base(tmp_path / "base", tie_word_embeddings=True)
    held = load_file(base / "model.safetensors")
    save_file({n: t for n, t in held.items() if n != "lm_head.weight"}, base / "model.safetensors", metadata={"format": "pt"})
    path = formats.mlx(tmp_path / "adapter", {"model.embed_tokens": (formats.numbers(2, formats.VOCAB), formats.numbers(8, 2))})
    plan = lorafold.plan(base, [path])
    assert any("the base's head is tied to model.embed_tokens" in note for note in plan.notes)
    lorafold.merge(base, [path], tmp_path / "out")
    after, factors = load_file(tmp_path / "out" / "model.safetensors"), load_file(path / "adapters.safetensors")
    name = "model.embed_tokens"
    delta = factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"] * (formats.ALPHA / formats.R)
    assert torch.equal(after[f"{name}.weight"], held[f"{name}.weight"] + delta)
    assert "lm_head.weight" not in after
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_mlx_experts(tmp_path: Path) -> None:
    torch.manual_seed(3)
    (tmp_path / "base").mkdir()
    shapes = {"w1": (6, 8), "w2": (8, 6), "w3": (6, 8)}
    held = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": formats.numbers(*shapes[w]) for e in range(3) for w in shapes
    }
    save_file(held, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tensors, wanted = {}, dict(held)
    for w, last in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        a, b = formats.numbers(3, 2, shapes[w][1]), formats.numbers(3, shapes[w][0], 2)
        where = f"model.layers.0.block_sparse_moe.switch_mlp.{last}"
        tensors |= {f"{where}.lora_a": a, f"{where}.lora_b": b}
        for e in range(3):
            name = f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"
            wanted[name] = held[name] + 2.0 * b[e] @ a[e]
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_several_formats_in_one_folder(tmp_path: Path) -> None:
    base = formats.base(tmp_path / "base")
    both = formats.peft(tmp_path / "both", formats.pairs())
    other = formats.mlx(tmp_path / "other", formats.pairs())
    shutil.copy(other / "adapters.safetensors", both)
    with pytest.raises(AdapterError, match=r"(?s)in 2 formats: peft \(.*\) or mlx \(.*ReadOptions\(format='peft'\)"):
        lorafold.plan(base, [both])
    assert lorafold.plan(base, [both], read_options=ReadOptions(format="peft")).adapters[0].format == "peft"
    with pytest.raises(InputError, match=r"(?s)'pfet' is not a format of adapters; there are peft, .*hint: did you mean peft"):
        lorafold.plan(base, [both], read_options=ReadOptions(format="pfet"))
    for each in FORMATS:
        if each.name not in ("peft", "mlx"):
            with pytest.raises(AdapterError):
                lorafold.plan(base, [both], read_options=ReadOptions(format=each.name))


def test_nothing_that_fits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.foo": torch.ones(2)}, path)
    with pytest.raises(AdapterError) as caught:
        lorafold.load_adapter(path)
    text = str(caught.value)
    assert "x.safetensors is in no format that is known: it holds the tensor a.foo" in text
    assert all(f"\n  {each.name} " in text for each in FORMATS)


def test_pefts_pickle_holds_what_its_safetensors_does(tmp_path: Path) -> None:
    torch.manual_seed(4)
    base, path = formats.base(tmp_path / "base"), formats.peft(tmp_path / "adapter", formats.pairs())
    lorafold.merge(base, [path], tmp_path / "wanted")
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedAdapterError, match="a pickle"):
        lorafold.plan(base, [path])
    lorafold.merge(base, [path], tmp_path / "out", read_options=ReadOptions(allow_pickle=True))
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("wanted", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


CONFIGS = {
    "mlx rank": ("mlx", {"lora_parameters": {"rank": 3, "scale": 1.0}}, "has rank 2, but lora_parameters.rank is 3"),
    "mlx no scale": (
        "mlx",
        {"lora_parameters": {"rank": 2, "alpha": 16}},
        "lora_parameters.scale must be a finite number, not None",
    ),
    "mlx full": ("mlx", {"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
    "mlx dora": ("mlx", {"fine_tune_type": "dora"}, "fine_tune_type is 'dora', but its m is missing"),
    "mlx nothing": ("mlx", {"lora_parameters": None}, "lora_parameters must be an object"),
    "torchtune rank": ("torchtune", {"r": 3}, "has rank 2, but adapter_config.json says 3"),
    "torchtune alpha": ("torchtune", {"lora_alpha": None}, "does not say r and lora_alpha"),
    "torchtune rslora": ("torchtune", {"use_rslora": True}, "asks for rsLoRA or patterns"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_do_not_fit(tmp_path: Path, case: str) -> None:
    kind, fields, words = CONFIGS[case]
    path = formats.WRITERS[kind](tmp_path / "adapter", formats.pairs())
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(AdapterError, match=words):
        lorafold.load_adapter(path, ReadOptions(allow_pickle=True))


def test_an_alpha_is_given_only_where_the_files_have_none(tmp_path: Path) -> None:
    path = formats.torchtune(tmp_path / "adapter", formats.pairs())
    given = ReadOptions(lora_alpha=99, allow_pickle=True)
    assert {module.scaling.lora_alpha for module in lorafold.load_adapter(path, given).modules.values()} == {formats.ALPHA}
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="lora_alpha="):
        lorafold.load_adapter(path, ReadOptions(allow_pickle=True))
    scalings = {module.scaling.why for module in lorafold.load_adapter(path, given).modules.values()}
    assert scalings == {"lora_alpha 99 as given / r 2"}
    with pytest.raises(InputError, match="finite"):
        lorafold.load_adapter(path, ReadOptions(lora_alpha=float("nan"), allow_pickle=True))


YAML = {
    "no alpha": ("lora_alpha: 6\n", "", "does not say lora_alpha"),
    "twice": ("lora_alpha: 6\n", "lora_alpha: 6\nlora_alpha: 7\n", "lora_alpha stands twice"),
    "words": ("lora_alpha: 6\n", "lora_alpha: &x !!python/object 6\n", "is not what it must be"),
    "dots": ("lora_alpha: 6\n", "lora_alpha: 1.2.3\n", "lora_alpha in hyperparameters.yaml must be a number"),
    "rank": ("lora_r: 2\n", "lora_r: 3\n", r"must be \(3 · r 3, in\)"),
    "flags": ("lora_key: true\n", "lora_key: false\n", r"must be \(2 · r 2, in\)"),
}


@pytest.mark.parametrize("case", YAML)
def test_hyperparameters_that_do_not_fit(tmp_path: Path, case: str) -> None:
    old, new, words = YAML[case]
    path = formats.litgpt(tmp_path / "adapter", formats.pairs())
    text = (path / "hyperparameters.yaml").read_text()
    assert old in text
    (path / "hyperparameters.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(AdapterError, match=words):
        lorafold.load_adapter(path, OPTIONS)
    (path / "hyperparameters.yaml").unlink()
    with pytest.raises(AdapterError, match=r"holds no hyperparameters\.yaml"):
        lorafold.load_adapter(path, OPTIONS)


def test_experts_of_torchtune_are_refused_by_name(tmp_path: Path) -> None:
    path = formats.torchtune(tmp_path / "adapter", formats.pairs())
    held = torch.load(path / "adapter_model.pt") | {"layers.0.mlp.experts.lora_gate_a": torch.ones(2, 8, 2)}
    torch.save(held, path / "adapter_model.pt")
    with pytest.raises(UnsupportedAdapterError, match=r"'layers\.0\.mlp\.experts\.lora_gate_a' belongs to torchtune's experts"):
        lorafold.load_adapter(path, OPTIONS)


def test_what_llama_cpp_has_and_a_merge_has_not(tmp_path: Path) -> None:
    from lorafold.adapters.adapter import Base, on_base
    from lorafold.adapters.formats.gguf.writer import gguf_bytes

    good = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    tensors = {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 8), "blk.0.ffn_up.weight.lora_b": torch.ones(6, 2)}
    experts = {name.replace("ffn_up", "ffn_gate_exps"): tensor for name, tensor in tensors.items()}
    cases = {
        "is not a LoRA adapter: general.type is 'model'": ({"general.type": "model"}, tensors),
        "aLoRA acts on some tokens only": ({"adapter.alora.invocation_tokens": "x"}, tensors),
        "adapter.lora.alpha must be a finite number": ({"adapter.lora.alpha": float("nan")}, tensors),
        "'blk.0.attn_norm.weight' is no part": ({}, tensors | {"blk.0.attn_norm.weight": torch.ones(8)}),
        "must be \\(experts, out, r\\)": (
            {},
            {"blk.0.ffn_up.weight.lora_a": torch.ones(3, 2, 8), "blk.0.ffn_up.weight.lora_b": torch.ones(6, 2)},
        ),
    }
    for words, (fields, held) in cases.items():
        (tmp_path / "a.gguf").write_bytes(gguf_bytes(good | fields, held))
        with pytest.raises(AdapterError, match=words):
            lorafold.load_adapter(tmp_path / "a.gguf")
    others = {
        "the architecture 'mamba'": ({"general.architecture": "mamba"}, tensors),
        "blk.0.ffn_gate_exps is a tensor of the architecture": ({}, experts),
    }
    for words, (fields, held) in others.items():  # they may be for a base in GGUF
        (tmp_path / "a.gguf").write_bytes(gguf_bytes(good | fields, held))
        adapter = lorafold.load_adapter(tmp_path / "a.gguf")
        with pytest.raises(AdapterError, match=words):
            on_base(adapter, Base({}, {}))
        assert on_base(adapter, Base({}, dict.fromkeys((m.tensor for m in adapter.modules.values()), (6, 8)))).on_base is None
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({key: value for key, value in good.items() if "alpha" not in key}, tensors))
    (module,) = lorafold.load_adapter(tmp_path / "a.gguf").modules.values()
    assert (module.scaling.value, module.scaling.why) == (1.0, "adapter.lora.alpha is 0 or missing: 1")


class Config:
    """What a transformers model has."""

    def to_dict(self) -> dict[str, object]:
        return {"model_type": "llama", "num_attention_heads": formats.HEADS, "num_key_value_heads": formats.KEYS}


def live(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model with the weights of `state` under the same names."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *above, last, _ = name.split(".")
        module = root
        for part in above:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        kind = torch.nn.Embedding if last == "embed_tokens" else torch.nn.Linear
        leaf = kind(*tensor.shape) if kind is torch.nn.Embedding else kind(*tensor.shape[::-1], bias=False)
        leaf.weight.data = tensor.clone()
        module.add_module(last, leaf)
    root.config = Config()  # type: ignore[assignment]
    return root


def test_a_live_model_takes_every_format(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(8)
    state, held = load_file(formats.base(tmp_path / "base") / "model.safetensors"), formats.pairs()
    path = formats.WRITERS[kind](tmp_path / "adapter", held)
    model = live(state)
    lorafold.nn.load_adapter_into(model, path, read_options=OPTIONS if kind == "loralib" else ReadOptions(allow_pickle=True))
    model.eval()
    deltas = formats.deltas(held)
    found = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name] + deltas.get(name, 0)) for name in state)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_own_layers_fuse_to_the_same_weights(tmp_path: Path, kind: str) -> None:
    """golden/mlx.safetensors holds what mlx-lm 0.32.2 made of them: linear layers, embeddings, experts; DoRA."""
    held = load_file(Path(__file__).parent / "golden" / "mlx.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"base": {}, "adapter": {}, "fused": {}}
    for name, tensor in held.items():
        which, part, plain = name.split("/")
        if which != kind:
            continue
        if "switch_mlp" in plain and part != "adapter":  # a checkpoint of transformers has each expert by itself
            for e, expert in enumerate(tensor):
                parts[part][plain.replace("switch_mlp", f"experts.{e}")] = expert.clone()
        else:
            parts[part][plain] = tensor
    for each in ("base", "adapter"):
        (tmp_path / each).mkdir()
    save_file(parts["base"], tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    save_file(parts["adapter"], tmp_path / "adapter" / "adapters.safetensors")
    fields = {"fine_tune_type": kind, "lora_parameters": {"rank": 2, "scale": 3.0}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == parts["fused"].keys()
    for name, fused in parts["fused"].items():
        # mlx sums two products, scales and adds in float32: four roundings of numbers no larger than the largest; DoRA's norm and
        # quotient are three more
        assert torch.allclose(
            merged[name], fused, rtol=0, atol=8 * 2**-24 * float(fused.abs().max() + parts["base"][name].abs().max())
        )


def test_what_lies_in_a_base_is_left_alone(tmp_path: Path) -> None:
    """A pickle and a GGUF model beside the weights are neither opened nor taken for adapters."""
    base = formats.base(tmp_path / "base")
    (base / "training_args.bin").write_bytes(b"\x80\x04no pickle")
    (base / "model.gguf").write_bytes(b"no GGUF")
    (base / "old.pt").write_bytes(b"PK\x03\x04")
    assert not is_adapter(base)
    with pytest.raises(AdapterError, match="it looks like a base model"):
        lorafold.load_adapter(base)
    adapter = formats.peft(tmp_path / "adapter", formats.pairs())
    (adapter / "training_args.bin").write_bytes(b"\x80\x04no pickle")
    (adapter / "optimizer.pt").write_bytes(b"PK\x03\x04")
    assert lorafold.load_adapter(adapter).format == "peft"
