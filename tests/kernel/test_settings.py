"""No global setting of torch changes a bit, and none is left changed: in memory, in layers, and from file to file."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import LorafoldError
from lorafold.kernel.errorfree import product
from lorafold.kernel.merge import merge_measured, merge_weight
from lorafold.kernel.rounding import Stochastic
from lorafold.kernel.undo.keep import merge_keeping
from lorafold.kernel.update import LowRankUpdate
from lorafold.nn import Linear
from models import plain_adapter, plain_base

SOURCE = Path(lorafold.__file__).parent


@contextmanager
def put(setter, value, before):
    """`setter` called with `value`, and at the end with `before`."""
    setter(value)
    try:
        yield
    finally:
        setter(before)


SETTINGS = {
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: put(torch.set_default_device, "meta", None),
    "flush denormal": lambda: put(torch.set_flush_denormal, True, False),
    "default dtype float64": lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: put(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "matmul precision": lambda: put(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()),
    "deterministic": lambda: put(torch.use_deterministic_algorithms, True, False),
    "one thread": lambda: put(torch.set_num_threads, 1, torch.get_num_threads()),
    "three threads": lambda: put(torch.set_num_threads, 3, torch.get_num_threads()),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def subnormal(shape, g, dtype):
    """Ordinary numbers, and among them such as are subnormal, or near."""
    info = torch.finfo(dtype)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    small = info.tiny * torch.rand(shape, generator=g, dtype=torch.float64) * x.sign() * 2
    return torch.where(torch.rand(shape, generator=g) < 0.5, small, x * 0.02).to(dtype)


def in_memory():
    """All that the kernel does, as a function of tensors that were made beforehand; returns tensors of integers."""
    g = torch.Generator().manual_seed(0)
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weight = subnormal((17, 34), g, dtype)
        a, b = torch.randn(3, 34, generator=g) * 0.1, torch.randn(17, 3, generator=g) * 0.1
        b[::2] *= 2.0**-120
        updates = [LowRankUpdate(a, b, 0.7), LowRankUpdate(a.bfloat16(), b.half(), -1.0)]
        cases.append((weight, updates))
    wide = torch.randn(6, 9, generator=g, dtype=torch.float64) * 2.0**-520

    def bits(x):
        return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).clone()

    def run(precisions):
        found = [*map(bits, product(wide, wide.T))]
        for weight, updates in cases:
            for precision in precisions:
                for rounding in ("nearest", Stochastic(3, "w")):
                    merged, kept = merge_measured(weight, updates, precision=precision, rounding=rounding)
                    found += [bits(merged), torch.tensor(kept.share, dtype=torch.float32, device="cpu")]
            for target in (torch.bfloat16, torch.float32):
                found.append(bits(merge_weight(weight, [], out=torch.empty_like(weight, dtype=target))))
            found.append(bits(merge_weight(weight.T, [update.T for update in updates], precision="exact")))
            found += [update.cat(updates[1]).dense(torch.float32) for update in updates[:1]]
            for undo in ("copy", "compact"):
                block = weight.clone()
                kept = merge_keeping(block, updates, undo=undo)
                assert torch.equal(bits(kept.restore(block)), bits(weight))
                found.append(bits(block))
        return found

    return run


@pytest.fixture(scope="module")
def expected(path):
    run = in_memory()
    return run, {precisions: run(precisions) for precisions in (("exact", "fast"), ("exact",))}, path


@every_setting
def test_in_memory(expected, setting):
    """Only the sums of `fast` without compiled code, which are of torch's BLAS, may depend on its threads."""
    run, of, path = expected
    precise = setting not in ("one thread", "three threads")
    precisions = ("exact", "fast") if precise or path == "compiled" else ("exact",)
    before = of[precisions]
    with SETTINGS[setting]():
        found = run(precisions)
    for one, other in zip(found, before, strict=True):
        # what is measured is a sum in an order that may depend on the threads: no bit of a weight does
        assert torch.equal(one, other) if precise or not one.is_floating_point() else torch.allclose(one, other, rtol=1e-4)


@every_setting
def test_what_was_set_stays(setting):
    weight, update = torch.randn(40, 70), LowRankUpdate(torch.randn(3, 70), torch.randn(40, 3), 0.5)
    tiny = [2.0**-1073]

    def state():
        return (
            torch.get_default_device(), torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(), tiny[0] * 0.5 == 0.0,
        )  # fmt: skip

    with SETTINGS[setting]():
        before = state()
        for precision in ("exact", "fast"):
            merge_weight(weight, [update], precision=precision)
            merge_weight(weight.double(), [update], precision=precision)
        assert state() == before


def test_layers_and_models(path):
    """`eval()`, `train()` and `merge_into` under each setting."""

    def run(setting):
        torch.manual_seed(0)
        layer = Linear(16, 24, r=4, undo="compact")
        torch.nn.init.normal_(layer.lora_B)
        before = layer.weight.detach().clone()
        with SETTINGS[setting]() if setting else torch.enable_grad():
            layer.eval()
            merged = layer.weight.detach().clone()
            layer.train()
        assert torch.equal(layer.weight, before)
        return merged

    expected = run(None)
    for setting in SETTINGS:
        assert torch.equal(run(setting), expected), setting


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    g = torch.Generator().manual_seed(1)
    plain_base(folder / "base", size=16)

    def edit(part, change):
        for shard in (folder / part).glob("*.safetensors"):
            held = load_file(shard)
            save_file(held | change(held), shard, metadata={"format": "pt"})

    def with_lengths(held):
        ends = ("lora_A.weight", "lora_magnitude_vector")
        return {name.replace(*ends): factor.norm(dim=0) for name, factor in held.items() if name.endswith(ends[0])}

    edit("base", lambda held: {name: subnormal(t.shape, g, t.dtype) for name, t in held.items() if t.dim() == 2})
    plain_adapter(folder / "plain", size=16)
    plain_adapter(folder / "dora", size=16, use_dora=True)
    edit("dora", with_lengths)
    return folder


def bytes_below(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


WAYS = {
    "plain": ("plain", {}),
    "stochastic": ("plain", {"rounding": "stochastic"}),
    "float32": ("plain", {"dtype": "float32"}),
    "float16": ("plain", {"dtype": "float16"}),
    "fast": ("plain", {"precision": "fast"}),
    "dora": ("dora", {}),
}


def merged_files(files, out, way):
    adapter, options = WAYS[way]
    lorafold.merge(files / "base", [files / adapter], out, **options)
    return bytes_below(out)


@pytest.fixture(scope="module")
def merged_before(files, path):
    return {way: merged_files(files, files / f"{path} {way}", way) for way in WAYS}


FOR_FILES = ["default device meta", "flush denormal", "default dtype float64", "three threads", "autocast", "inference"]


@pytest.mark.parametrize("setting", FOR_FILES)
@pytest.mark.parametrize("way", WAYS)
def test_files(files, merged_before, tmp_path, way, setting):
    with SETTINGS[setting]():
        found = merged_files(files, tmp_path / "out", way)
        assert lorafold.verify(tmp_path / "out") is not None
    assert found == merged_before[way]


def test_undo_and_unmerge(files, tmp_path):
    base = bytes_below(files / "base")
    for number, setting in enumerate(("default device meta", "flush denormal", "default dtype float64", "autocast", "inference")):
        out = tmp_path / str(number)
        out.mkdir()
        with SETTINGS[setting]():
            lorafold.merge(files / "base", [files / "plain"], out / "merged", undo=out / "undo")
            lorafold.unmerge(out / "merged", out / "base", undo=out / "undo")
        assert bytes_below(out / "base") == base


def test_threads_of_torch_that_flush_do_not_matter():
    """They keep the mode of the thread that began them, whatever is set later."""
    code = """
import torch
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.update import LowRankUpdate
from lorafold.nn import Linear
torch.set_num_threads(2)
W = torch.full((400, 170), 3e-39)
u = LowRankUpdate(torch.full((1, 170), 1e-20), torch.full((400, 1), 1e-19), 1.0)
torch.set_flush_denormal(True)
W.clone().mul_(1.0)  # begins the threads
torch.set_flush_denormal(False)
for precision in ("exact", "fast"):
    for weight in (W, W.double()):
        print(merge_weight(weight, [u], precision=precision).unique().tolist())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "LORAFOLD_NATIVE": native}, check=True, capture_output=True, text=True
        ).stdout
        for native in ("0", "1")
    }
    assert len(outputs) == 1
    assert "0.0]" not in outputs.pop()


# --- every tensor that is made names its device

MADE = {
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
    "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
"""What torch.utils._device makes on the default device."""

INTEGERS = {"arange", "randint", "randperm", "range", "tril_indices", "triu_indices", "as_tensor", "asarray"}
"""Of these the default dtype is not that of floats, or is taken from what is given."""


def unnamed(text: str) -> list[int]:
    """Lines in which torch makes a tensor on the default device, or of the default dtype."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MADE:
            names = {keyword.arg for keyword in node.keywords}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not ("device" in names and ("dtype" in names or node.func.attr in INTEGERS)) and None not in names:
                wrong.append(node.lineno)
    return wrong


def test_every_tensor_names_its_device_and_dtype():
    wrong = [f"{path.relative_to(SOURCE)}:{line}" for path in sorted(SOURCE.rglob("*.py")) for line in unnamed(path.read_text())]
    assert wrong == []
    assert unnamed("x = 1\ny = torch.empty(3, dtype=torch.int8)\ntorch.full((1,), 0.5, device=d)") == [2, 3]


def test_a_tensor_without_numbers_is_refused_by_name():
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0)
    with pytest.raises(LorafoldError, match="holds no numbers"):
        merge_weight(torch.zeros(3, 4, device="meta"), [update])
    with torch._subclasses.FakeTensorMode(), pytest.raises(LorafoldError, match="holds no numbers"):
        merge_weight(torch.zeros(3, 4), [])
