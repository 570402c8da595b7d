"""A policy that trains with LoRA and hands its weights to an inference engine after every step, as RL loops do.

    python examples/rl_weight_sync.py               # half a minute

The trainer holds a bfloat16 model with LoRA layers; the engine, which plays, holds a plain copy of the model. After each step the
engine must play as the trainer's policy would. Three roads there, side by side:

- **subtract**: merge into the model, push, and subtract the update again. The base weights drift, and never stop;
- **nearest**: `iter_merged` yields merged weights one by one, and the model is not touched. No drift; but an update smaller than
  half a step of the bfloat16 grid is rounded away, and the engine plays the old policy;
- **stochastic**: the same with ``rounding="stochastic"``. Rounding errors are independent and average out in the next layer's sums,
  so the small update arrives. Once updates are larger than the grid, nearest is as good.
"""

import argparse
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import lorafold

STATES, ACTIONS, WIDTH = 16, 16, 1024


def make_policy() -> nn.Sequential:
    """From the number of a state to the logits of the actions."""
    return nn.Sequential(
        nn.Embedding(STATES, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, ACTIONS),
    ).to(torch.bfloat16)


class Engine:
    """Whatever serves the model: it takes weights by name, and plays. Here a plain copy of the model."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = copy.deepcopy(policy).eval()
        self.weights = dict(self.policy.named_parameters())

    @torch.no_grad()
    def load_weights(self, named: Iterator[tuple[str, Tensor]]) -> None:
        for name, weight in named:
            self.weights[name].copy_(weight)

    @torch.no_grad()
    def play(self, states: Tensor) -> Tensor:
        likely: Tensor = self.policy(states).float().softmax(dim=-1)
        return likely.multinomial(1)[:, 0]


def subtracting(trainer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The usual way: add the update in place, hand the weight over, subtract the update. Here on a copy, since it does damage."""
    for name, layer in trainer.named_modules():
        if isinstance(layer, lorafold.nn.Linear):
            delta = layer.scaling * (layer.lora_B @ layer.lora_A).detach()
            layer.weight.data += delta.to(layer.weight.dtype)
            yield f"{name}.weight", layer.weight.data
            layer.weight.data -= delta.to(layer.weight.dtype)


def train_step(trainer: nn.Module, optimizer: torch.optim.Optimizer, states: Tensor, actions: Tensor, best: Tensor) -> float:
    """One step of REINFORCE: actions that were right become likelier, others less so. Returns the share that was right."""
    reward = (actions == best[states]).float()
    log_probs = trainer(states).float().log_softmax(dim=-1).gather(1, actions[:, None])[:, 0]
    (-(reward - reward.mean()) * log_probs).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(reward.mean())


@torch.no_grad()
def divergence(trainer: nn.Module, played: nn.Module) -> float:
    """KL from the trainer's policy to the one of `played`, a mean over states; in float64, so that only weights count."""
    states = torch.arange(STATES)
    wanted, got = (copy.deepcopy(model).double()(states).log_softmax(dim=-1) for model in (trainer, played))
    return float(nn.functional.kl_div(got, wanted, log_target=True, reduction="batchmean"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=5e-5)
    given = parser.parse_args()
    torch.manual_seed(0)
    base = make_policy()
    best = torch.randint(ACTIONS, (STATES,))  # the right action in each state
    engines = {road: Engine(base) for road in ("subtract", "nearest", "stochastic")}

    trainer = copy.deepcopy(base)
    lorafold.nn.attach(trainer, "all-linear", r=8)
    lorafold.nn.mark_only_lora_as_trainable(trainer)
    optimizer = torch.optim.AdamW([p for p in trainer.parameters() if p.requires_grad], lr=given.lr, weight_decay=0.0)
    drifting = copy.deepcopy(trainer)  # the same adapter, on a base that the first road writes to

    print("KL(trainer ‖ engine) as a share of KL(trainer ‖ base): 0 is perfect, 1 is as if no weights had been sent\n")
    print(f"{'step':>6}{'right':>8}{'subtract':>12}{'nearest':>12}{'stochastic':>12}   base weights changed by subtract")
    for step in range(1, given.steps + 1):
        states = torch.randint(STATES, (256,))
        right = train_step(trainer, optimizer, states, engines["stochastic"].play(states), best)

        drifting.load_state_dict(lorafold.nn.lora_state_dict(trainer), strict=False)
        engines["subtract"].load_weights(subtracting(drifting))
        engines["nearest"].load_weights(lorafold.nn.iter_merged(trainer))
        engines["stochastic"].load_weights(lorafold.nn.iter_merged(trainer, rounding="stochastic", seed=step))

        if step in (1, 5, 20, 50, 100) or step == given.steps:
            learnt = divergence(trainer, base)
            shares = "".join(f"{divergence(trainer, engine.policy) / learnt:12.5f}" for engine in engines.values())
            print(f"{step:6}{right:8.2f}{shares}   {changed(drifting, base):.1%}")
    print(f"\nbase weights changed under the trainer by iter_merged: {changed(trainer, base):.1%}")


def changed(model: nn.Module, base: nn.Module) -> float:
    """The share of weights under LoRA layers that no longer have the bits of the base."""
    different, total = 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, lorafold.nn.Linear):
            weight = base.get_parameter(f"{name}.weight")
            different += int((layer.weight != weight).sum())
            total += weight.numel()
    return different / total


if __name__ == "__main__":
    main()
