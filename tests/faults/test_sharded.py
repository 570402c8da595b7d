"""Row 58: layers of a model that FSDP shards are refused, whole or gathered; what is merged into a passing copy would be lost."""

from __future__ import annotations

import subprocess
import sys

SHARDED = """
import warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
import lorafold

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    lorafold.nn.attach(model, ["0", "1"], r=2, lora_alpha=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.train()

def bits(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [w.detach().clone() for w in whole]

def refused(what, model, call, said):
    before = bits(model)
    try:
        call()
    except lorafold.LorafoldError as error:
        assert type(error).__name__ == "LayerError", error
        assert said in str(error) and "hint: " in str(error), error
    else:
        raise SystemExit(f"{what} is let through")
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model))), what
    assert not any(getattr(m, "merged", False) for m in model.modules()), what

one = made()
mesh = init_device_mesh("cpu", (1,))
one[1].weight = nn.Parameter(distribute_tensor(one[1].weight.data, mesh, [Shard(0)]))
refused("a DTensor in eval()", one, one.eval, "is a DTensor")
refused("a DTensor in merge()", one, lambda: lorafold.nn.merged(one).__enter__(), "1: the weight is a DTensor")
refused("a DTensor exported", one, lambda: list(lorafold.nn.iter_merged(one)), "is a DTensor")

two = fully_shard(made())
refused("FSDP2, sharded", two, two.eval, "DTensor")
two.unshard()
assert not isinstance(two[0].weight, DTensor)
refused("FSDP2, gathered", two, two.eval, "sharded by FSDP")
refused("FSDP2, merged()", two, lambda: lorafold.nn.merged(two).__enter__(), "0: the weight is sharded by FSDP")
two.reshard()

three = made()
three[0].merge_weights = three[1].merge_weights = False
fully_shard(three)
three.eval()  # without merging it is let be
dist.destroy_process_group()
print("done")
"""


def test_row_58_sharded_layers_are_refused_and_nothing_is_lost() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr
