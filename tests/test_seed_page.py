"""The documented pattern of merging in loralib, run as it stands under both import names.

The snippets are those of the public page "Implementation: Microsoft LoRA LoRA Weight Merging"; a small model fills the
placeholders.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NAMES = ["loralib", "lorafold.nn"]

MERGE_LOGIC = '''
def train(self, mode: bool = True):
    """Override train() to handle weight merge/unmerge.

    On eval (mode=False): merge LoRA into base weight
    On train (mode=True): unmerge LoRA from base weight
    """
    nn.Linear.train(self, mode)
    if mode:
        # Switching to train mode: unmerge if currently merged
        if self.merge_weights and self.merged:
            if self.r > 0:
                self.weight.data -= (self.lora_B @ self.lora_A) * self.scaling
            self.merged = False
    else:
        # Switching to eval mode: merge if not already merged
        if self.merge_weights and not self.merged:
            if self.r > 0:
                self.weight.data += (self.lora_B @ self.lora_A) * self.scaling
            self.merged = True
'''

INFERENCE_DEPLOYMENT = """
import torch
import loralib as lora

# 1. Load base model with LoRA layer structure
model = create_model_with_lora_layers(r=8, lora_alpha=16)

# 2. Load trained LoRA weights
lora_dict = torch.load('lora_checkpoint.pt')
model.load_state_dict(lora_dict, strict=False)

# 3. Merge LoRA weights into base weights (triggered by eval())
model.eval()
# At this point, model.weight contains W + BA * (alpha/r)
# No extra computation paths exist; inference is zero-overhead

# 4. Run inference
with torch.no_grad():
    output = model(input_data)
"""

EVAL_DURING_TRAINING = """
for epoch in range(num_epochs):
    # Training phase (unmerged weights)
    model.train()
    for batch in train_loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Evaluation phase (merged weights for accurate metrics)
    model.eval()  # Triggers merge: W' = W + BA * (alpha/r)
    with torch.no_grad():
        for batch in eval_loader:
            output = model(**batch)
            # ... compute metrics ...

    # Back to training (triggers unmerge: W = W' - BA * (alpha/r))
    model.train()
"""

BASIC_INFERENCE = """
import torch
import loralib as lora

model = create_lora_model()
lora_dict = torch.load('adapter.pt')
model.load_state_dict(lora_dict, strict=False)

# Merge and run inference
model.eval()
with torch.no_grad():
    result = model(input_ids)
"""

VERIFY_MERGE_BEHAVIOR = """
import torch
import loralib as lora

# Create a simple LoRA layer
layer = lora.Linear(768, 768, r=8, lora_alpha=16)

# Before merge: check weight
original_weight = layer.weight.data.clone()

# Trigger merge
layer.eval()
merged_weight = layer.weight.data.clone()

# The weights should differ by the LoRA contribution
diff = merged_weight - original_weight
expected = (layer.lora_B @ layer.lora_A) * layer.scaling
print(f"Merge correct: {torch.allclose(diff, expected)}")

# Trigger unmerge
layer.train()
unmerged_weight = layer.weight.data.clone()

# Should be back to original
print(f"Unmerge correct: {torch.allclose(unmerged_weight, original_weight)}")
"""

EXPORT_MERGED_MODEL = """
import torch
import loralib as lora

# Load model with LoRA
model = create_lora_model()
lora_dict = torch.load('adapter.pt')
model.load_state_dict(lora_dict, strict=False)

# Merge weights
model.eval()

# Save the full merged state dict (no longer needs LoRA-aware loading)
torch.save(model.state_dict(), 'merged_model.pt')

# This merged model can be loaded as a standard model without loralib
"""

DISABLE_MERGING = """
import loralib as lora

# If you do NOT want automatic merge on eval(), set merge_weights=False
layer = lora.Linear(768, 768, r=8, lora_alpha=16, merge_weights=False)

# Now eval() will NOT merge; the LoRA path remains separate
layer.eval()
# Forward pass still computes: h = Wx + BAx * (alpha/r)
# Two separate matrix multiplications are performed
"""


class Model(nn.Module):
    """Token numbers to a loss and logits, as transformers' models have it."""

    def __init__(self, lora: Any, r: int = 8, lora_alpha: int = 16) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.fc = lora.Linear(16, 16, r=r, lora_alpha=lora_alpha)
        self.head = lora.Linear(16, 20, r=r, lora_alpha=lora_alpha)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.fc(self.emb(input_ids)).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class World:
    """What a snippet finds around it, in a folder with its files."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.lora = name, importlib.import_module(name)
        monkeypatch.chdir(folder)
        self.tokens = torch.arange(12).view(2, 6)
        torch.manual_seed(0)
        self.base = Model(self.lora).state_dict()
        trained = self.model()
        for key, parameter in trained.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.1)
        self.adapter = self.lora.lora_state_dict(trained)
        for file in ("lora_checkpoint.pt", "adapter.pt"):
            torch.save(self.adapter, file)

    def model(self, **settings: Any) -> Model:
        model = Model(self.lora, **settings)
        model.load_state_dict(self.base)
        return model

    def merged_weight(self, layer: str) -> Tensor:
        """W + BA · (alpha / r)"""
        return self.base[f"{layer}.weight"] + self.adapter[f"{layer}.lora_B"] @ self.adapter[f"{layer}.lora_A"] * 2.0

    def run(self, snippet: str, **given: Any) -> dict[str, Any]:
        source = snippet.replace("import loralib as lora", f"import {self.name} as lora")
        names = {"create_model_with_lora_layers": self.model, "create_lora_model": self.model, **given}
        exec(compile(source, "<snippet>", "exec"), names)
        return names


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(request.param, tmp_path, monkeypatch)


def test_inference_deployment(world: World) -> None:
    after = world.run(INFERENCE_DEPLOYMENT, input_data=world.tokens)
    torch.testing.assert_close(after["model"].fc.weight.detach(), world.merged_weight("fc"))
    assert after["output"].logits.shape == (2, 6, 20)


def test_basic_inference(world: World) -> None:
    after = world.run(BASIC_INFERENCE, input_ids=world.tokens)
    unmerged = world.model()
    unmerged.load_state_dict(world.adapter, strict=False)
    torch.testing.assert_close(after["result"].logits, unmerged(world.tokens).logits.detach())


def test_eval_during_training(world: World) -> None:
    model = world.model()
    world.lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batches = [{"input_ids": world.tokens, "labels": world.tokens}] * 3
    before = model(world.tokens, world.tokens).loss.item()
    after = world.run(
        EVAL_DURING_TRAINING,
        model=model,
        optimizer=optimizer,
        num_epochs=4,
        train_loader=batches,
        eval_loader=batches[:1],
        torch=torch,
    )
    assert after["output"].loss.item() < before
    for name, tensor in world.base.items():
        if "lora_" not in name:
            assert torch.equal(model.state_dict()[name], tensor)  # four cycles, and the base is what it was


def test_verify_merge_behavior(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.run(VERIFY_MERGE_BEHAVIOR)
    assert capsys.readouterr().out == "Merge correct: True\nUnmerge correct: True\n"


def test_verify_merge_behavior_of_a_trained_layer(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with a B that is not zero, as it is in a fresh layer."""
    trained = VERIFY_MERGE_BEHAVIOR.replace("# Before merge", "torch.nn.init.normal_(layer.lora_B, std=0.02)\n# Before merge")
    after = world.run(trained)
    assert capsys.readouterr().out == "Merge correct: True\nUnmerge correct: True\n"
    assert torch.equal(after["unmerged_weight"], after["original_weight"])


def test_export_merged_model(world: World) -> None:
    after = world.run(EXPORT_MERGED_MODEL)
    exported = torch.load("merged_model.pt")
    plain = nn.Linear(16, 16)
    plain.load_state_dict({"weight": exported["fc.weight"], "bias": exported["fc.bias"]})
    torch.testing.assert_close(plain.weight.detach(), world.merged_weight("fc"))
    again = world.model()
    again.load_state_dict(exported)
    assert torch.equal(again.eval()(world.tokens).logits, after["model"](world.tokens).logits)


def test_disable_merging(world: World) -> None:
    layer = world.run(DISABLE_MERGING)["layer"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 768)
    assert not layer.merged
    expected = nn.functional.linear(x, layer.weight, layer.bias) + (x @ layer.lora_A.T @ layer.lora_B.T) * (16 / 8)
    # float32 sums of 768 terms and of 8 terms, in another order
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_the_merge_logic_as_a_layer_of_ones_own(world: World) -> None:
    train = world.run(MERGE_LOGIC, nn=nn)["train"]

    class Own(nn.Linear, world.lora.LoRALayer):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            nn.Linear.__init__(self, 6, 6)
            world.lora.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.0, merge_weights=True)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
            self.scaling = self.lora_alpha / self.r

    Own.train = train
    model = nn.Sequential(Own())
    original = model[0].weight.detach().clone()
    model.eval()
    assert model[0].merged
    torch.testing.assert_close(model[0].weight.detach(), original + (model[0].lora_B @ model[0].lora_A).detach() * 2)
    model.train()
    torch.testing.assert_close(model[0].weight.detach(), original)
    world.lora.mark_only_lora_as_trainable(model)
    assert sorted(world.lora.lora_state_dict(model)) == ["0.lora_A", "0.lora_B"]
