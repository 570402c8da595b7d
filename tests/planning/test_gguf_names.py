"""Adapters of transformers on a base in GGUF: llama.cpp's names, from its own tables, and its order of rows."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import lorafold
from gguf_models import as_tensor, paired, stated_by, tensors_of, tiny, write_gguf
from lorafold import LowRankUpdate
from lorafold.errors import AdapterError, InputError, LorafoldError, UnmatchedAdapterError, UnsupportedAdapterError
from lorafold.planning.names.gguf_names import ORDERS, TABLE
from models import edit_json, peft_edits, save_adapter
from oracle import correctly_rounded

ROOT = Path(__file__).parents[2]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_the_table_is_that_of_the_gguf_package() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_gguf_names.py"))["text"]()
    assert made == TABLE.read_text(encoding="utf-8")
    assert set(ORDERS) <= set(gguf.MODEL_ARCH_NAMES.values())


def merged_weights(tmp_path: Path, model: object, architecture: str, adapter: Path, **options: object) -> dict[str, np.ndarray]:
    """What the base in F32 and `adapter` make, by llama.cpp's names."""
    heads = (4, 2) if ORDERS.get(architecture) == "paired" else None
    write_gguf(tmp_path / "base.gguf", tensors_of(model, architecture, heads), "F32", architecture=architecture)
    lorafold.merge(tmp_path / "base.gguf", [adapter], tmp_path / "out.gguf", **options)
    return stated_by(tmp_path / "out.gguf")


CASES = {
    "llama": ("Llama", {}, {"target_modules": ALL}),
    "llama-dora": ("Llama", {"attention_bias": True}, {"target_modules": ["q_proj", "k_proj", "up_proj"], "use_dora": True}),
    "llama-bias": ("Llama", {"attention_bias": True}, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "granite": ("Granite", {}, {"target_modules": ALL}),
    "smollm3": ("SmolLM3", {}, {"target_modules": ALL}),
    "olmo": ("Olmo", {}, {"target_modules": ALL}),
    "qwen2": ("Qwen2", {}, {"target_modules": ALL}),
    "qwen3": ("Qwen3", {"head_dim": 64}, {"target_modules": ALL}),
    "gemma2": ("Gemma2", {"head_dim": 64, "tie_word_embeddings": True}, {"target_modules": ALL}),
    "phi3": ("Phi3", {}, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "starcoder2": ("Starcoder2", {}, {"target_modules": ["q_proj", "o_proj", "c_fc", "c_proj"]}),
    "olmo2": ("Olmo2", {}, {"target_modules": ALL}),
    "stablelm": ("StableLm", {}, {"target_modules": ALL}),
    "command-r": ("Cohere", {"tie_word_embeddings": True}, {"target_modules": ALL}),
    "nemotron": ("Nemotron", {}, {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}),
    "gpt2": ("GPT2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_inner": 512}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_update_lands_in_its_rows(tmp_path: Path, case: str) -> None:
    """Against what PEFT's own layers hold, each weight put through what the converter does to it."""
    kind, fields, config = CASES[case]
    architecture = case.partition("-")[0] if case not in ORDERS else case
    model = getattr_model(kind, fields)
    heads = (4, 2) if ORDERS[architecture] == "paired" else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = tensors_of(model, architecture, heads)
    base = {name: array.T.copy() if kind == "GPT2" and is_conv1d(name) else array for name, array in base.items()}
    write_gguf(tmp_path / "base.gguf", base, "F32", architecture=architecture)
    save_adapter(getattr_model(kind, fields), tmp_path / "adapter", init_lora_weights=True, **config)
    report = lorafold.merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "out.gguf")
    found = stated_by(tmp_path / "out.gguf")
    wanted = expected_weights(model, tmp_path / "adapter", before)
    names = gguf.get_tensor_name_map({name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2)
    changed = 0
    for name, weight in wanted.items():
        called = names.get_name(name, (".weight", ".bias"))
        assert called is not None
        array = weight.T.copy() if kind == "GPT2" and is_conv1d(called) else weight
        array = (
            paired(array, 4) if heads and ".attn_q." in called else paired(array, 2) if heads and ".attn_k." in called else array
        )
        if config.get("use_dora"):  # PEFT rounds in between
            assert np.allclose(found[called], array, rtol=1e-5, atol=1e-6), called
        else:
            assert np.array_equal(found[called], array), called
        changed += not np.array_equal(found[called], base[called])
    assert changed == len(wanted) == report.plan.count("merge")
    untouched = base.keys() - {names.get_name(name, (".weight", ".bias")) for name in wanted}
    assert all(np.array_equal(found[name], base[name]) for name in untouched)


def getattr_model(kind: str, fields: dict[str, object]) -> object:
    if kind == "GPT2":
        import transformers

        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_positions=32, **fields)).eval()
    return tiny(kind, **fields)


def is_conv1d(name: str) -> bool:
    return name.endswith((".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight"))


def expected_weights(model: object, adapter: Path, before: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """By transformers' names, what merging `adapter` makes of the weights `before`; DoRA's as PEFT computes it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
    if wrapped.peft_config["default"].use_dora:
        merged = wrapped.merge_and_unload().state_dict()
        return {name: after.numpy() for name, after in merged.items() if not torch.equal(after, before[name])}
    updates, _ = peft_edits(wrapped)
    found = {}
    for name, each in updates.items():
        rows = before[name].reshape(before[name].shape[0], -1)
        found[name] = correctly_rounded(rows, each, torch.float32).reshape(before[name].shape)
    return found


@pytest.mark.parametrize("wrapper", ["model.language_model.", "language_model.model."])
def test_what_wraps_a_language_model_is_left_out(tmp_path: Path, wrapper: str) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(tiny(), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    plain = merged_weights(tmp_path, tiny(), "llama", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {name.replace("base_model.model.model.", f"base_model.model.{wrapper}"): t for name, t in load_file(file).items()}
    save_file(held, file)
    (tmp_path / "out.gguf").unlink()
    again = merged_weights(tmp_path, tiny(), "llama", tmp_path / "adapter")
    assert all(np.array_equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_experts_are_in_stacks(tmp_path: Path, architecture: str) -> None:
    """Of layers of one expert each, as the makers' files have them: names, stacks and indices by hand."""
    from safetensors.torch import save_file

    generator = np.random.default_rng(0)
    names = {"gate": ("gate_proj", "w1", (512, 256)), "down": ("down_proj", "w2", (256, 512)), "up": ("up_proj", "w3", (512, 256))}
    base = {f"blk.0.ffn_{part}_exps.weight": generator.normal(size=(3, *shape)) for part, (_, _, shape) in names.items()}
    base["token_embd.weight"] = generator.normal(size=(64, 256))
    write_gguf(tmp_path / "base.gguf", base, "F32", architecture=architecture)
    held, sums = {}, {name: array.astype(np.float32) for name, array in base.items()}
    for part, (new, old, shape) in names.items():
        for expert in (0, 2):
            A, B = (torch.from_numpy(generator.normal(size=size)).float() for size in ((4, shape[1]), (shape[0], 4)))
            around = f"block_sparse_moe.experts.{expert}.{old}" if architecture == "llama" else f"mlp.experts.{expert}.{new}"
            stem = f"base_model.model.model.layers.0.{around}"
            held |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
            weight = sums[f"blk.0.ffn_{part}_exps.weight"][expert]
            weight[:] = correctly_rounded(as_tensor(weight), [LowRankUpdate(A, B, 2.0)], torch.float32)
    (tmp_path / "adapter").mkdir()
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"]}'
    )
    lorafold.merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "out.gguf")
    found = stated_by(tmp_path / "out.gguf")
    assert all(np.array_equal(found[name], sums[name]) for name in base)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_stacks_that_were_trained_whole(tmp_path: Path, kind: str) -> None:
    """PEFT's target_parameters: gate and up of one stack, which llama.cpp has apart. Within 1e-5: PEFT rounds in between."""
    import peft

    def made() -> object:
        fields = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 512, "head_dim": 64, "num_experts_per_tok": 2}
        return tiny(kind, mlp_only_layers=[], decoder_sparse_step=1, **fields)

    def apart(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        found = {}
        for name, tensor in state.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                front, array = name.partition("mlp.experts.")[0].replace("model.layers.", "blk."), tensor.numpy()
                half = array.shape[1] // 2
                parts = {"down": array} if "down" in name else {"gate": array[:, :half], "up": array[:, half:]}
                found |= {f"{front}ffn_{part}_exps.weight": np.array(each) for part, each in parts.items()}
        return found

    model = made()
    base = apart(model.state_dict()) | {"token_embd.weight": np.zeros((64, 256))}
    write_gguf(tmp_path / "base.gguf", base, "F32", architecture="qwen3moe" if kind == "Qwen3Moe" else "llama")
    save_adapter(made(), tmp_path / "adapter", target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    lorafold.merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "out.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = apart(peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict())
    found = stated_by(tmp_path / "out.gguf")
    assert len(wanted) == 6
    for name, array in wanted.items():
        assert np.allclose(found[name], array, rtol=1e-5, atol=1e-5), name
        assert np.abs(array - base[name]).max() > 0.01


def refused(tmp_path: Path, words: str, kind: type[LorafoldError] = UnsupportedAdapterError, **options: object) -> str:
    with pytest.raises(kind, match=words) as caught:
        lorafold.merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    return str(caught.value)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    tensors = tensors_of(tiny(), "llama")
    save_adapter(tiny(), tmp_path / "adapter", target_modules=["q_proj"])
    write_gguf(tmp_path / "base.gguf", tensors, "F32", architecture="deepseek2")
    assert "convert_lora_to_gguf.py" in refused(tmp_path, "architecture 'deepseek2', and what llama.cpp's converter does")
    write_gguf(tmp_path / "base.gguf", {name: a for name, a in tensors.items() if ".attn_q." not in name}, "Q8_0")
    refused(tmp_path, "none of the 2 adapter modules has a tensor", UnmatchedAdapterError, output_format="same")
    write_gguf(tmp_path / "base.gguf", tensors, "F32")
    raw = (tmp_path / "base.gguf").read_bytes()
    key = b"llama.attention.head_count"
    at = raw.index(key + b"\x04") + len(key)
    (tmp_path / "base.gguf").write_bytes(raw[: at + 4] + b"\x07" + raw[at + 5 :])
    refused(tmp_path, r"256 rows of attn_q .* the base says that they are 7 heads \(llama.attention.head_count\)", InputError)
    (tmp_path / "base.gguf").write_bytes(raw.replace(key + b"\x04", b"llama.attention.head_c_unt\x04"))
    refused(tmp_path, "the base says that they are no number of heads", InputError)
    (tmp_path / "base.gguf").write_bytes(raw)
    edit_json(tmp_path / "adapter" / "adapter_config.json", layer_replication=[[0, 2], [0, 2]])
    refused(tmp_path, "layer_replication", LorafoldError)


def test_a_norm_is_not_replaced(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", tensors_of(tiny("Gemma2", head_dim=64, tie_word_embeddings=True), "gemma2", None), "F32",
               architecture="gemma2")  # fmt: skip
    model = tiny("Gemma2", head_dim=64, tie_word_embeddings=True)
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])
    refused(tmp_path, r"replaces model.layers.0.post_attention_layernorm.weight as a whole, and how llama.cpp stores that")


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(tmp_path: Path, where: str, tied: bool) -> None:
    """Where no head is stored llama.cpp takes the embedding; one that then changes alone gets a tensor of its own."""
    model = tiny(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(tiny(tie_word_embeddings=tied), tmp_path / "adapter", target_modules=[where, "q_proj"])
    found = merged_weights(tmp_path, model, "llama", tmp_path / "adapter")
    wanted = expected_weights(model, tmp_path / "adapter", before)
    changed, other = ("token_embd", "output") if where == "embed_tokens" else ("output", "token_embd")
    name = "model.embed_tokens.weight" if where == "embed_tokens" else "lm_head.weight"
    assert np.array_equal(found[f"{changed}.weight"], wanted[name])
    theirs = "lm_head.weight" if where == "embed_tokens" else "model.embed_tokens.weight"
    assert np.array_equal(found[f"{other}.weight"], before[theirs].numpy())
    assert lorafold.verify(tmp_path / "out.gguf", tmp_path / "base.gguf", [tmp_path / "adapter"]).ok


def test_adapters_in_gguf(tmp_path: Path) -> None:
    """As llama.cpp's converter writes them, for any architecture, experts in stacks; the sum is B @ A as the file has it."""
    generator = np.random.default_rng(3)
    shapes = {"blk.0.attn_q": (256, 256), "blk.0.ssm_in": (512, 256), "blk.1.ffn_up_exps": (3, 512, 256), "token_embd": (64, 256)}
    base = {f"{name}.weight": generator.normal(size=shape) for name, shape in shapes.items()}
    for architecture in ("llama", "mamba"):
        write_gguf(tmp_path / "base.gguf", base, "F32", architecture=architecture)
        writer, sums = gguf.GGUFWriter(tmp_path / "a.gguf", architecture), {}
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        for name, shape in shapes.items():
            *experts, rows, columns = shape
            A, B = (generator.normal(size=(*experts, *size)).astype(np.float32) for size in ((4, columns), (rows, 4)))
            if name == "token_embd":
                A, B = (generator.normal(size=size).astype(np.float32) for size in ((4, rows), (columns, 4)))
            writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(A.T) if name == "token_embd" else A)
            writer.add_tensor(f"{name}.weight.lora_b", B)
            weight = base[f"{name}.weight"].astype(np.float32)
            for i in range(experts[0] if experts else 1):
                update = LowRankUpdate(as_tensor(A[i] if experts else A), as_tensor(B[i] if experts else B), 2.0)
                update = update.T if name == "token_embd" else update
                part = weight[i] if experts else weight
                part[:] = correctly_rounded(as_tensor(part), [update], torch.float32)
            sums[f"{name}.weight"] = weight
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        lorafold.merge(tmp_path / "base.gguf", [tmp_path / "a.gguf"], tmp_path / "out.gguf", overwrite=True)
        found = stated_by(tmp_path / "out.gguf")
        assert all(np.array_equal(found[name], sums[name]) for name in base)
    write_gguf(tmp_path / "base.gguf", base, "F32", architecture="qwen2")
    with pytest.raises(AdapterError, match=re.escape("is for the architecture 'mamba', and the base is of 'qwen2'")):
        lorafold.plan(tmp_path / "base.gguf", [tmp_path / "a.gguf"])
