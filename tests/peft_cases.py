"""The table of `test_cases`: modules, what PEFT puts on them, and the formula of every tensor that must change."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_formulas as f
from models import save_adapter
from peft_formulas import Formula


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, seed: int) -> Tensor:
        return self.head(self.lin1(self.lin0(inputs(seed, 5, 8)).tanh()).tanh())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 6, bias=False)

    def forward(self, seed: int) -> Tensor:
        return self.lin(self.emb(torch.arange(20)).tanh())


class GPT(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn, self.c_proj = Conv1D(8, 8), Conv1D(12, 8)

    def forward(self, seed: int) -> Tensor:
        return self.c_proj(self.c_attn(inputs(seed, 5, 8)).tanh())


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(6, 8, (3, 5), stride=2)
        self.pointwise, self.three = nn.Conv2d(8, 4, 1, bias=False), nn.Conv3d(4, 6, (1, 2, 2))

    def forward(self, seed: int) -> Tensor:
        x = self.one(inputs(seed, 9, 4, 11)).tanh().transpose(0, 1)[None]
        x = self.pointwise(self.two(x).tanh())
        return self.three(x.tanh()[:, :, None])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, seed: int) -> Tensor:
        x = inputs(seed, 2, 5, 8)
        return self.lin(self.attn(x, x, x)[0])


class Stack(nn.Module):
    """Three experts, each gate and up in one; a bare matrix beside them."""

    def __init__(self, in_out: bool = False) -> None:
        super().__init__()
        shapes = [(3, 8, 10), (3, 5, 8)] if in_out else [(3, 10, 8), (3, 8, 5)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)
        self.two = nn.Parameter(torch.randn(6, 8))
        self.is_transposed = in_out

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        up, down = (up, down) if self.is_transposed else (up.transpose(1, 2), down.transpose(1, 2))
        gate, value = (x @ up).chunk(2, dim=-1)
        return ((gate.tanh() * value) @ down).sum(0) @ self.two.T


class MoE(nn.Module):
    def __init__(self, in_out: bool = False) -> None:
        super().__init__()
        self.lin, self.experts = nn.Linear(8, 8), Stack(in_out)

    def forward(self, seed: int) -> Tensor:
        return self.experts(self.lin(inputs(seed, 5, 8)))


class Square(nn.Module):
    """Experts whose matrices are square: how they lie is for the family of the model to say."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Stack()
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 8) / 3)
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 16, 8) / 3)

    def forward(self, seed: int) -> Tensor:
        return self.experts(inputs(seed, 5, 8))


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    model: Callable[[], nn.Module]
    config: dict[str, Any]
    changed: Mapping[str, Formula]
    dtype: torch.dtype = torch.bfloat16
    base_config: dict[str, Any] = field(default_factory=dict)
    decomposed: bool = False  # PEFT computes with the base weight in float32 before training, and refuses float64
    bug: str = ""


LIN0, LIN1 = "lin0.weight", "lin1.weight"
MLP2 = {"target_modules": ["lin0", "lin1"]}
CONVS = ["one", "two", "pointwise", "three"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def both(formula: Formula) -> dict[str, Formula]:
    return {LIN0: formula, LIN1: formula}


def gpt(formula: Callable[..., Formula], *args: Any) -> dict[str, Formula]:
    return {f"{name}.weight": formula(*args, turned=True) for name in ("c_attn", "c_proj")}


GPT2 = {"base_config": {"model_type": "gpt2"}}
MOE = {"base_config": {"model_type": "qwen3_moe"}}
FIO = {"fan_in_fan_out": True}
SAVED = {f"head.{name}": f.saved() for name in ("weight", "bias")}
BIASES = {f"{name}.bias": f.saved(f"{name}.base_layer.bias") for name in ("lin0", "lin1")}

CASES: dict[str, Case] = {  # r = 4 and lora_alpha = 6 unless a case says otherwise, so 1.5
    "mlp": Case(MLP, MLP2, both(f.linear(1.5))),
    "mlp float16": Case(MLP, MLP2, both(f.linear(1.5)), torch.float16),
    "mlp float32": Case(MLP, MLP2, both(f.linear(1.5)), torch.float32),
    "mlp float64": Case(MLP, MLP2, both(f.linear(1.5)), torch.float64),
    "mlp rslora": Case(MLP, MLP2 | {"use_rslora": True}, both(f.linear(3.0))),
    "mlp rank_pattern": Case(MLP, MLP2 | {"rank_pattern": {"lin1": 2}}, {LIN0: f.linear(1.5), LIN1: f.linear(3.0)}),
    "mlp alpha_pattern": Case(MLP, MLP2 | {"alpha_pattern": {"^lin0": 1}}, {LIN0: f.linear(0.25), LIN1: f.linear(1.5)}),
    "mlp both patterns and rslora": Case(
        MLP, MLP2 | {"rank_pattern": {"lin.*": 9}, "alpha_pattern": {"lin1": 12}, "use_rslora": True},
        {LIN0: f.linear(2.0), LIN1: f.linear(4.0)},
    ),
    "mlp negative alpha": Case(MLP, MLP2 | {"lora_alpha": -4}, both(f.linear(-1.0))),
    "mlp regex": Case(MLP, {"target_modules": r"lin[01]"}, both(f.linear(1.5))),
    "mlp lora_bias": Case(
        MLP, MLP2 | {"lora_bias": True}, both(f.linear(1.5)) | {f"{name}.bias": f.bias(1.5) for name in ("lin0", "lin1")}
    ),
    "mlp bias lora_only": Case(MLP, MLP2 | {"bias": "lora_only"}, both(f.linear(1.5)) | BIASES),
    "mlp bias all": Case(MLP, MLP2 | {"bias": "all"}, both(f.linear(1.5)) | BIASES | {"head.bias": f.saved()}),
    "mlp modules_to_save": Case(MLP, MLP2 | {"modules_to_save": ["head"]}, both(f.linear(1.5)) | SAVED),
    "mlp modules_to_save, bias all": Case(
        MLP, MLP2 | {"modules_to_save": ["head"], "bias": "all"}, both(f.linear(1.5)) | SAVED | BIASES
    ),
    "mlp dora": Case(MLP, MLP2 | {"use_dora": True}, both(f.dora(1.5))),
    "mlp dora rslora": Case(MLP, MLP2 | {"use_dora": True, "use_rslora": True}, both(f.dora(3.0)), torch.float16),
    "mlp dora bias lora_only": Case(MLP, MLP2 | {"use_dora": True, "bias": "lora_only"}, both(f.dora(1.5)) | BIASES),
    "mlp gaussian": Case(MLP, MLP2 | {"init_lora_weights": "gaussian"}, both(f.linear(1.5))),
    "mlp orthogonal": Case(MLP, MLP2 | {"init_lora_weights": "orthogonal"}, both(f.linear(1.5))),
    "mlp mica": Case(MLP, MLP2 | {"init_lora_weights": "mica"}, both(f.linear(1.5)), decomposed=True),
    "mlp velora": Case(MLP, MLP2 | {"velora_config": {"num_groups": 2}}, both(f.linear(1.5))),
    "mlp monteclora": Case(MLP, MLP2 | {"monteclora_config": {"num_samples": 2}}, both(f.linear(1.5))),
    "mlp kasa": Case(MLP, MLP2 | {"kasa_config": {}}, both(f.residual("kasa", 4, 1.5)), decomposed=True),
    "mlp kasa float32": Case(MLP, MLP2 | {"kasa_config": {}}, both(f.residual("kasa", 4, 1.5)), torch.float32, decomposed=True),
    "mlp pissa": Case(MLP, MLP2 | {"init_lora_weights": "pissa"}, both(f.residual("pissa", 4, 1.5)), decomposed=True),
    "mlp pissa float16": Case(
        MLP, MLP2 | {"init_lora_weights": "pissa", "use_rslora": True}, both(f.residual("pissa", 4, 3.0)), torch.float16,
        decomposed=True,
    ),
    "mlp pissa float32": Case(
        MLP, MLP2 | {"init_lora_weights": "pissa"}, both(f.residual("pissa", 4, 1.5)), torch.float32, decomposed=True
    ),
    "mlp olora": Case(MLP, MLP2 | {"init_lora_weights": "olora"}, both(f.residual("olora", 4, 1.5)), decomposed=True),
    "mlp olora float32": Case(
        MLP, MLP2 | {"init_lora_weights": "OLoRA"}, both(f.residual("olora", 4, 1.5)), torch.float32, decomposed=True
    ),
    "mlp bdlora": Case(
        MLP, MLP2 | {"use_bdlora": {"target_modules_bd_a": ["lin1"], "target_modules_bd_b": ["lin0"], "nblocks": 2}},
        {LIN0: f.blocks(1.5, "B", 2), LIN1: f.blocks(1.5, "A", 2)},
    ),
    "mlp bdlora beside lora": Case(
        MLP, MLP2 | {"use_bdlora": {"target_modules_bd_a": ["lin1"], "nblocks": 4, "match_strict": False}},
        {LIN0: f.linear(1.5), LIN1: f.blocks(1.5, "A", 4)},
    ),
    "mlp qalora, which pools for GPTQ alone": Case(
        MLP, MLP2 | {"use_qalora": True, "qalora_group_size": 4}, both(f.linear(1.5))
    ),
    "mlp target_parameters": Case(MLP, {"target_modules": [], "target_parameters": ["lin0.weight"]}, {LIN0: f.linear(1.5)}),
    "embedding": Case(Words, {"target_modules": ["emb"]}, {"emb.weight": f.embedding(1.5)}),
    "embedding rslora": Case(Words, {"target_modules": ["emb", "lin"], "use_rslora": True},
                             {"emb.weight": f.embedding(3.0), "lin.weight": f.linear(3.0)}),
    "embedding patterns": Case(Words, {"target_modules": ["emb"], "rank_pattern": {"emb": 3}}, {"emb.weight": f.embedding(2.0)}),
    "embedding dora": Case(Words, {"target_modules": ["emb"], "use_dora": True}, {"emb.weight": f.dora(1.5, embedded=True)}),
    "embedding mica": Case(Words, {"target_modules": ["emb"], "init_lora_weights": "mica"}, {"emb.weight": f.embedding(1.5)},
                           decomposed=True),
    "embedding saved": Case(Words, {"target_modules": ["lin"], "modules_to_save": ["emb"]},
                            {"lin.weight": f.linear(1.5), "emb.weight": f.saved()}),
    "embedding parameter": Case(Words, {"target_modules": [], "target_parameters": ["emb.weight"]}, {"emb.weight": f.linear(1.5)}),
    "tokens": Case(Words, {"target_modules": ["lin"], "trainable_token_indices": {"emb": [3, 19, 0]}},
                   {"lin.weight": f.linear(1.5), "emb.weight": f.rows([3, 19, 0])}),
    "Conv1D": Case(GPT, {"target_modules": ["c_attn", "c_proj"], **FIO}, gpt(f.linear, 1.5), **GPT2),
    "Conv1D rslora": Case(GPT, {"target_modules": ["c_proj"], "use_rslora": True, **FIO},
                          {"c_proj.weight": f.linear(3.0, turned=True)}, **GPT2),
    "Conv1D lora_bias": Case(
        GPT, {"target_modules": ["c_proj"], "lora_bias": True, **FIO},
        {"c_proj.weight": f.linear(1.5, turned=True), "c_proj.bias": f.bias(1.5)}, **GPT2,
    ),
    "Conv1D dora": Case(GPT, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, **FIO}, gpt(f.dora, 1.5), **GPT2),
    "Conv1D pissa": Case(GPT, {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa", **FIO},
                         gpt(f.residual, "pissa", 4, 1.5), decomposed=True, **GPT2),
    "convolutions": Case(Convs, {"target_modules": CONVS}, {f"{name}.weight": f.linear(1.5) for name in CONVS}),
    "convolutions float32": Case(
        Convs, {"target_modules": CONVS}, {f"{name}.weight": f.linear(1.5) for name in CONVS}, torch.float32
    ),
    "convolutions rslora, patterns": Case(
        Convs, {"target_modules": ["one", "three"], "use_rslora": True, "rank_pattern": {"one": 9}},
        {"one.weight": f.linear(2.0), "three.weight": f.linear(3.0)},
    ),
    "convolutions lora_bias": Case(Convs, {"target_modules": ["one"], "lora_bias": True},
                                   {"one.weight": f.linear(1.5), "one.bias": f.bias(1.5)}),
    "convolutions bias lora_only": Case(Convs, {"target_modules": ["two"], "bias": "lora_only"},
                                        {"two.weight": f.linear(1.5), "two.bias": f.saved("two.base_layer.bias")}),
    "convolutions dora": Case(
        Convs, {"target_modules": CONVS, "use_dora": True}, {f"{name}.weight": f.dora(1.5) for name in CONVS}
    ),
    "attention": Case(
        Attention, {"target_modules": ["attn", "lin"]},
        {"attn.in_proj_weight": f.linear(1.5, "attn"), "attn.out_proj.weight": f.linear(3.0, "attn.base_layer.out_proj"),
         "lin.weight": f.linear(1.5)},
        bug="adds the update of out_proj twice, in the forward and in the merge (huggingface/peft#3774)",
    ),
    "attention rslora, bias all": Case(
        Attention, {"target_modules": ["attn"], "use_rslora": True, "bias": "all"},
        {"attn.in_proj_weight": f.linear(3.0, "attn"), "attn.out_proj.weight": f.linear(6.0, "attn.base_layer.out_proj"),
         "attn.out_proj.bias": f.saved("attn.base_layer.out_proj.base_layer.bias"), "lin.bias": f.saved()},
        bug="the same; and in_proj_bias, which it does not train, is not saved",
    ),
    "attention in_proj as a parameter": Case(
        Attention, {"target_modules": ["lin"], "target_parameters": ["attn.in_proj_weight"]},
        {"attn.in_proj_weight": f.linear(1.5, "attn"), "lin.weight": f.linear(1.5)},
    ),
    "experts": Case(
        MoE, {"target_modules": [], "target_parameters": EXPERTS},
        {UP: f.experts(1.5, "experts.base_layer", 3), DOWN: f.experts(1.5, "experts", 3)}, **MOE,
    ),
    "experts, one parameter and a module": Case(
        MoE, {"target_modules": ["lin"], "target_parameters": ["down_proj"]},
        {DOWN: f.experts(1.5, "experts", 3), "lin.weight": f.linear(1.5)}, **MOE,
    ),
    "experts rslora, patterns": Case(
        MoE, {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True, "rank_pattern": {"experts.down_proj": 9}},
        {UP: f.experts(3.0, "experts.base_layer", 3), DOWN: f.experts(2.0, "experts", 3)}, **MOE,
    ),
    "experts and a bare matrix": Case(
        MoE, {"target_modules": [], "target_parameters": [*EXPERTS, "experts.two"]},
        {UP: f.experts(1.5, "experts.base_layer.base_layer", 3), DOWN: f.experts(1.5, "experts.base_layer", 3),
         "experts.two": f.linear(1.5, "experts")}, **MOE,
    ),
    "experts stored (in, out)": Case(
        lambda: MoE(True), {"target_modules": [], "target_parameters": EXPERTS},
        {UP: f.experts(1.5, "experts.base_layer", 3, in_out=True), DOWN: f.experts(1.5, "experts", 3, in_out=True)},
        base_config={"model_type": "gpt_oss"},
    ),
    "square experts of a known family": Case(
        Square, {"target_modules": [], "target_parameters": ["experts.down_proj"]}, {DOWN: f.experts(1.5, "experts", 3)}, **MOE
    ),
}  # fmt: skip


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def build(case: Case, path: Path) -> tuple[Path, dict[str, Tensor], Path, dict[str, Tensor]]:
    """A base in the case's dtype and its tensors, an adapter that PEFT trained on it and its tensors, with short names."""
    torch.manual_seed(11)
    base = path / "base"
    base.mkdir()
    held = {name: value.to(case.dtype).contiguous() for name, value in noisy(case.model()).state_dict().items()}
    save_file(held, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(case.base_config))
    adapter = save_adapter(
        loaded(case, held, case.dtype if case.decomposed else torch.float32), path / "adapter", **configured(case)
    )
    own = load_file(adapter / "adapter_model.safetensors")
    return base, held, adapter, {name.removeprefix("base_model.model."): value for name, value in own.items()}


def configured(case: Case) -> dict[str, Any]:
    from peft.tuners.lora import config as kinds

    made = dict(case.config)
    for name, kind in (
        ("kasa_config", kinds.KasaConfig), ("velora_config", kinds.VeloraConfig), ("monteclora_config", kinds.MontecloraConfig),
        ("use_bdlora", kinds.BdLoraConfig),
    ):  # fmt: skip
        if name in made:
            made[name] = kind(**made[name])
    return made


def loaded(case: Case, held: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model = case.model().to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in held.items()})
    return model.eval()


def unmerged(case: Case, held: Mapping[str, Tensor], adapter: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(case, held, case.dtype if case.decomposed else torch.float64)
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=case.decomposed).double().eval()
