"""The kernel for GPUs on the processor: merge.cu, compiled as C++ with a header that does what a GPU does.

Lane by lane, and so for small matrices. What a GPU promises of its numbers is done as promised and no better; what the kernel
promises of its own, such as that sums of slices are integers that float32 holds, is checked.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from lorafold.kernel import cuda as gpu
from lorafold.kernel import merge

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""Of the same width, to compare bits."""

COMPILER = shutil.which("c++") if sys.platform == "linux" else None
HERE, SOURCE = Path(__file__).parent, Path(gpu.__file__).parent


class Code:
    """merge.cu as `variant` wants it; launches as a `Module` does."""

    def __init__(self, variant: gpu.Variant, folder: Path) -> None:
        for file in (*SOURCE.glob("*.h"), *SOURCE.glob("*.cu"), *HERE.glob("*.h"), *HERE.glob("*.cpp")):
            shutil.copyfile(file, folder / file.name)  # ptx.h is in both: the later one stays
        made = folder / "launch.so"
        defined = [f"-D{name}={value}" for name, value in variant.settings.items()]
        options = ["-std=c++17", "-nostdinc++", "-Og", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
        subprocess.run([COMPILER, *options, *defined, folder / "launch.cpp", "-o", made], check=True)
        self.library = ctypes.CDLL(str(made))

    def launch(self, name: str, blocks: int, threads: int, argument: gpu.LaunchJob, *, overlapping: bool = False) -> None:
        launched = getattr(self.library, f"launch_{name}")
        launched.restype = ctypes.c_char_p
        broken = launched(ctypes.byref(argument), blocks, threads)
        assert broken is None, broken


class OnProcessor:
    """`merge_weight` of tensors on the CPU, by the kernel for GPUs."""

    def __init__(self, new_folder) -> None:
        self.code = cache(lambda variant: Code(variant, new_folder()))

    def put(self, tensor):
        return tensor.clone()

    @contextmanager
    def working(self, *, usual: bool = True):
        """Whatever is merged meanwhile.

        - `usual`: whether all numbers are of a size for which sums of slices are promised to be exact
        """

        def by_kernel(weight, out, factors, first=0, *, precision, noise=None, measured=True):
            variant = gpu.variant_for(weight, out, factors, precision, measured)
            assert variant is not None
            assert noise is None
            code = self.code(variant)
            ctypes.c_bool.in_dll(code.library, "usual").value = usual
            return gpu.launched(code, variant, weight, out, factors, first)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, "merge_native", by_kernel)
            yield


class OnGpu:
    """`merge_weight` of tensors on a GPU, by the kernel for GPUs."""

    def put(self, tensor):
        return tensor.cuda()

    @contextmanager
    def working(self, *, usual: bool = True):
        def by_kernel(*arguments, **options):
            kept = gpu.merge_gpu(*arguments, **options)
            assert kept is not None
            return kept

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, "merge_gpu", by_kernel)
            yield
