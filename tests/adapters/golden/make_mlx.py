"""Writes mlx.safetensors: weights, factors and what mlx-lm's own layers fuse them to. Run where mlx and mlx-lm are installed:

python tests/adapters/golden/make_mlx.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

R, SCALE = 2, 3.0


def tensors() -> dict[str, Any]:
    """Arrays by kind of layer, what they are, and the module."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    mx.random.seed(0)
    held = {}
    for kind, of_linear, of_embedding in (("lora", LoRALinear, LoRAEmbedding), ("dora", DoRALinear, DoRAEmbedding)):
        linear, embedding, experts = nn.Linear(6, 4, bias=False), nn.Embedding(9, 6), SwitchLinear(6, 4, 3, bias=False)
        layers = {
            "model.layers.0.mlp.up_proj": (linear, of_linear.from_base(linear, r=R, scale=SCALE)),
            "model.embed_tokens": (embedding, of_embedding.from_base(embedding, r=R, scale=SCALE)),
        }
        if kind == "lora":
            layers["model.layers.0.mlp.switch_mlp.gate_proj"] = (experts, LoRASwitchLinear.from_base(experts, r=R, scale=SCALE))
        for name, (base, layer) in layers.items():
            layer.lora_a, layer.lora_b = mx.random.normal(layer.lora_a.shape), mx.random.normal(layer.lora_b.shape)
            held |= {f"{kind}/adapter/{name}.lora_a": layer.lora_a, f"{kind}/adapter/{name}.lora_b": layer.lora_b}
            if kind == "dora":
                layer.m = layer.m * (1 + 0.3 * mx.random.uniform(shape=layer.m.shape))
                held[f"{kind}/adapter/{name}.m"] = layer.m
            held |= {f"{kind}/base/{name}.weight": base.weight, f"{kind}/fused/{name}.weight": layer.fuse().weight}
    return held


if __name__ == "__main__":
    import mlx.core

    mlx.core.save_safetensors(str(Path(__file__).parent / "mlx.safetensors"), tensors())
