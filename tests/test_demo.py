"""The demo, run once as `make demo` runs it, and what it leaves: a real base, a real adapter, a merged checkpoint."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafold.kernel.update import LowRankUpdate
from oracle import correctly_rounded

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def updates(directory: Path) -> dict[str, LowRankUpdate]:
    """The updates of a PEFT adapter by tensor name, read without lorafold."""
    config = json.loads((directory / "adapter_config.json").read_text())
    factors = tensors(directory)
    return {
        name.removeprefix("base_model.model.").replace(".lora_A.", "."): LowRankUpdate(
            lora_A, factors[name.replace(".lora_A.", ".lora_B.")], config["lora_alpha"] / config["r"]
        )
        for name, lora_A in factors.items()
        if ".lora_A." in name
    }


def test_the_base_holds_the_numbers_of_the_gguf_file(demo):
    gguf = pytest.importorskip("gguf")
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import gguf_file

    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file()).tensors}
    base = tensors(demo / "base")

    def unpacked(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(packed[name].data, packed[name].tensor_type).copy()).bfloat16()

    assert torch.equal(base["model.embed_tokens.weight"], unpacked("token_embd.weight"))
    assert torch.equal(base["model.layers.7.mlp.down_proj.weight"], unpacked("blk.7.ffn_down.weight"))
    # the rows of a head are interleaved in GGUF: first halves and second halves of the rotary pairs, (heads, 32, 2, in)
    q = unpacked("blk.7.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(base["model.layers.7.self_attn.q_proj.weight"], q)
    assert len(list((demo / "base").glob("*.safetensors"))) >= 4
    assert "lm_head.weight" not in base  # tied to the embedding


def test_the_demo_says_what_it_proved(demo):
    printed = (demo.parent / "printed").read_text()
    assert "Captain's log" in printed
    assert "the base again, bit for bit" in printed
    assert "\x1b" not in printed  # no colour in a pipe


def test_untouched_tensors_are_the_base_s_and_all_others_moved(demo):
    base, merged, touched = tensors(demo / "base"), tensors(demo / "merged"), updates(demo / "adapter")
    assert base.keys() == merged.keys()
    assert len(touched) == 60
    for name in base:
        assert torch.equal(base[name], merged[name]) == (name not in touched), name


def test_exact_is_the_correctly_rounded_sum(demo):
    base, merged = tensors(demo / "base"), tensors(demo / "merged")
    for name, update in updates(demo / "adapter").items():
        rows = slice(0, 32)
        expected = correctly_rounded(base[name][rows], [update.narrow(0, 0, 32)], torch.bfloat16)
        assert (merged[name][rows].double().numpy() == expected).all(), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's use of transformers
def test_fast_differs_from_peft_only_beside_ties(demo, tmp_path):
    """Both take a float32 sum and round it to bfloat16, in different orders of operations.

    So they can differ only where the float32 sums fall on different sides of a tie, and there the two results are neighbours,
    of which the correctly rounded one is nearest to the real sum.
    """
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from lorafold import merge

    merge(demo / "base", [demo / "adapter"], tmp_path / "fast", precision="fast", verify=False)
    fast, exact, touched = tensors(tmp_path / "fast"), tensors(demo / "merged"), updates(demo / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "base")
    theirs = peft.PeftModel.from_pretrained(model, demo / "adapter").merge_and_unload().state_dict()
    elements = differing = 0
    for name in fast:
        wrong = fast[name] != theirs[name]
        assert not (wrong & (fast[name] != exact[name]) & (theirs[name] != exact[name])).any(), name
        elements += wrong.numel() if name in touched else 0
        differing += int(wrong.sum())
    # a float32 sum of r + 1 = 9 terms is off by at most some 9 · 2⁻²⁴ of its size, to either side, and ties lie 2⁻⁸ of it apart
    assert differing <= elements * 2 * 9 * 2**-16
