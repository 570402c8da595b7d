"""Quantised weights in compiled code, from file to file: the bits of what is done with torch, for every encoding that it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoded_files import Found, found_in
from lorafold.checkpoints.encodings.by_compiled_code import code_rule, coded_rows
from lorafold.files.evaluation import rows_of
from lorafold.kernel.cpu import codes as decoding
from lorafold.kernel.cpu import loader, recoding, stream
from lorafold.kernel.cpu.codes import CodedRows, decode
from lorafold.kernel.cpu.recoding import cast_between, recode_between
from lorafold.kernel.cpu.stream import FileRows, merge_between
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_rows
from lorafold.kernel.rounding import HALVES, Stochastic, to_nearest
from lorafold.kernel.update import LowRankUpdate
from packing import four_bits
from packing import stream as packed_stream

BUILDS = [build for build in loader.builds() if build.stream() is not None]
pytestmark = pytest.mark.skipif(
    not BUILDS, reason="no compiled code for files: no C compiler at installation, LORAFOLD_NATIVE=0, or no pread"
)
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
Held = Mapping[str, Tensor]
ROWS, COLUMNS = 43, 96  # rows that are no whole blocks of compiled code


def e4m3(rows: int, columns: int, *, bits: int = 8) -> Tensor:
    """Codes of all sizes, among them both zeros, none of them NaN."""
    codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8) | torch.randint(0, 2, (rows, columns), dtype=torch.uint8) << 7
    codes[0, :2] = torch.tensor([0, 128], dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn)


def fp8_blocks() -> Held:
    return {"a.weight": e4m3(ROWS, COLUMNS), "a.weight_scale_inv": torch.rand(3, 3) + 0.5}


def fp8_rows() -> Held:
    return {"a.weight": e4m3(ROWS, COLUMNS), "a.weight_scale": (torch.rand(ROWS, 1) + 0.5).bfloat16()}


def fp8_columns() -> Held:
    return {"a.weight": e4m3(ROWS, COLUMNS), "a.weight_scale": torch.rand(1, COLUMNS) + 0.5}


def fp8_tensor() -> Held:
    return {"a.weight": e4m3(ROWS, COLUMNS), "a.weight_scale": torch.rand(())}


def e5m2() -> Held:
    codes = e4m3(ROWS, COLUMNS).view(torch.uint8)
    codes[(codes & 0x7F) > 0x7B] = 0
    return {"a.weight": codes.view(torch.float8_e5m2), "a.scale_weight": torch.rand(1) + 0.5}


def nf4(**options: object) -> Callable[[], Held]:
    return lambda: four_bits((ROWS, COLUMNS), **options)  # type: ignore[arg-type]


def bnb_int8() -> Held:
    return {"a.weight": torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8), "a.SCB": torch.rand(ROWS) + 0.5}


def mxfp4() -> Held:
    codes, scales = torch.randint(0, 256, (ROWS, COLUMNS // 2)), torch.randint(125, 128, (ROWS, COLUMNS // 32))
    return {"a.weight_packed": codes.to(torch.uint8), "a.weight_scale": scales.to(torch.uint8)}


def mxfp8() -> Held:
    return {
        "a.weight": e4m3(ROWS, COLUMNS),
        "a.weight_scale": torch.randint(125, 128, (ROWS, COLUMNS // 32)).to(torch.uint8),
    }


def nvfp4(*, divides: bool) -> Callable[[], Held]:
    def make() -> Held:
        codes = torch.randint(0, 256, (ROWS, COLUMNS // 2)).to(torch.uint8)
        scales = (torch.rand(ROWS, COLUMNS // 16) * 200 + 200).to(torch.float8_e4m3fn)
        if divides:
            return {"a.weight_packed": codes, "a.weight_scale": scales, "a.weight_global_scale": torch.rand(1) * 1000 + 100}
        return {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": torch.rand(()) / 1000}

    return make


def integers(bits: int, *, zeros: bool = False, act_order: bool = False) -> Callable[[], Held]:
    def make() -> Held:
        q, z = torch.randint(0, 1 << bits, (ROWS, COLUMNS)), torch.randint(0, 1 << bits, (ROWS, 3))
        held = {
            "a.weight_packed": packed_stream(q.numpy(), bits),
            "a.weight_scale": (torch.rand(ROWS, 3) + 0.5).half(),
            "a.weight_shape": torch.tensor([ROWS, COLUMNS]),
        }
        if zeros:
            held["a.weight_zero_point"] = packed_stream(z.T.numpy(), bits).T.contiguous()
        if act_order:
            held["a.weight_g_idx"] = torch.randint(0, 3, (COLUMNS,)).int()
        return held

    return make


def int8() -> Held:
    return {"a.weight": torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8), "a.weight_scale": torch.rand(ROWS, 1) + 0.5}


KINDS: dict[str, Callable[[], Held]] = {
    "FP8 in blocks": fp8_blocks,
    "FP8 in rows": fp8_rows,
    "FP8 in columns": fp8_columns,
    "FP8 with one scale": fp8_tensor,
    "E5M2": e5m2,
    "NF4": nf4(),
    "NF4, nested": nf4(nested=True),
    "NF4 in blocks across rows": nf4(blocksize=128),
    "int8 of bitsandbytes": bnb_int8,
    "MXFP4": mxfp4,
    "MXFP8": mxfp8,
    "NVFP4 of ModelOpt": nvfp4(divides=False),
    "NVFP4 of compressed-tensors": nvfp4(divides=True),
    "int2": integers(2),
    "int4": integers(4),
    "int4 with zeros": integers(4, zeros=True),
    "int4 in act-order": integers(4, zeros=True, act_order=True),
    "int8 packed": integers(8, zeros=True),
    "int8": int8,
}
CONFIG = {
    "FP8 in blocks": {"weight_block_size": [16, 40]},
    "MXFP8": {"quant_method": "mxfp8"},
    "NVFP4 of ModelOpt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Opened:
    """A quantised weight in a file, all rows but the first eight: `numbers` by torch, (rows, columns), and `source`."""

    found: Found
    numbers: Tensor
    source: CodedRows
    first: int = 8


@contextmanager
def opened(kind: str, folder: Path, *, each: int | None = 1) -> Iterator[Opened]:
    """The weight of that kind; `each`: bytes that go through at once, so few that several times are needed."""
    torch.manual_seed(0)
    found = found_in(folder, None, KINDS[kind](), CONFIG.get(kind))
    encoded = found.encoded["a.weight"]
    rows = rows_of(encoded.natural, 8, ROWS - 8, COLUMNS)
    place = coded_rows(rows, ROWS - 8, COLUMNS, found.read)
    assert place is not None
    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((stream, ("_THROUGH", "_MOST")), (recoding, ("_THROUGH",))):
            for name in names:
                patch.setattr(module, name, each)
        yield Opened(found, found.numbers(rows), CodedRows(found.file.fileno(), place[0].start, place[1]))


@contextmanager
def using(build: loader.Build) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (decoding, stream, recoding):
            patch.setattr(module, "build", lambda: build)
        yield


@contextmanager
def target(folder: Path, row_bytes: int, dtype: torch.dtype) -> Iterator[FileRows]:
    """Room for as many rows in a file."""
    path = folder / "target"
    path.write_bytes(bytes(3 + row_bytes * ROWS))
    fd = os.open(path, os.O_RDWR)
    try:
        yield FileRows(fd, 3, dtype, row_bytes // dtype.itemsize)
    finally:
        os.close(fd)


def written(folder: Path, rows: FileRows, count: int) -> Tensor:
    content = bytearray((folder / "target").read_bytes()[3 : 3 + count * rows.row_bytes])
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def update(size: float, *, r: int = 5, zero_rows: bool = False) -> LowRankUpdate:
    B, A = torch.randn(ROWS, r), torch.randn(r, COLUMNS)
    if zero_rows:
        B[::2] = 0
    return LowRankUpdate(A, B, size)


@every_kind
@every_build
def test_numbers_are_those_of_the_expression(kind: str, build: loader.Build, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as weight, using(build):
        raw = torch.frombuffer(bytearray(os.pread(weight.source.fd, 1 << 20, weight.source.start)), dtype=torch.uint8)
        out = torch.empty(weight.numbers.shape, dtype=torch.float64)
        assert decode(weight.source.codes, raw, out)
        assert torch.equal(out.view(torch.int64), weight.numbers.view(torch.int64))
        assert decode(weight.source.codes.after(9), raw[9 * weight.source.row_bytes :], out[9:].zero_())
        assert torch.equal(out, weight.numbers)


@every_kind
@every_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_those_made_in_memory(kind: str, build: loader.Build, dtype: torch.dtype, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as weight, using(build), target(tmp_path, COLUMNS * dtype.itemsize, dtype) as to:
        factors, count = stack([update(0.01 * float(weight.numbers.std()))]), ROWS - 8
        for rounding in ("nearest", Stochastic(3, "a.weight", 8 * COLUMNS)):
            expected = torch.empty(weight.numbers.shape, dtype=dtype)
            kept = merge_rows(weight.numbers, factors, 8, out=expected, precision="exact", rounding=rounding)
            done, (share,) = merge_between(weight.source, count, [to], [(factors, 8)], precision="exact", roundings=[rounding])
            assert done == count
            assert torch.equal(written(tmp_path, to, count), expected.view(-1).view(torch.uint8))
            assert share.share == pytest.approx(kept.share, rel=1e-6)


@every_kind
@every_build
def test_what_nothing_is_added_to_is_rounded_once(kind: str, build: loader.Build, tmp_path: Path) -> None:
    count = ROWS - 8
    for dtype in (*HALVES, torch.float32, torch.float64):
        with opened(kind, tmp_path) as weight, using(build), target(tmp_path, COLUMNS * dtype.itemsize, dtype) as to:
            done, _ = cast_between(weight.source, count, to)
            fits = to_nearest(weight.numbers, dtype).isfinite().all(1)
            assert done == count if bool(fits.all()) else done <= int(fits.int().argmin())
            expected = to_nearest(weight.numbers, dtype)[:done].view(-1).view(torch.uint8)
            assert torch.equal(written(tmp_path, to, done), expected)


@every_kind
@every_build
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-4, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("drawn", [True, False], ids=["stochastic", "nearest"])
def test_codes_are_those_of_the_exact_sum(kind: str, build: loader.Build, size: float, drawn: bool, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as weight, using(build), target(tmp_path, weight.source.row_bytes, torch.uint8) as to:
        encoded, count = weight.found.encoded["a.weight"], ROWS - 8
        rows = rows_of(encoded.natural, 8, count, COLUMNS)
        rule = code_rule(encoded, rows, weight.found.read)
        assert rule is not None
        assert encoded.encode is not None
        factors = stack([update(size * float(weight.numbers.std()), zero_rows=True)])
        sums = torch.empty(weight.numbers.shape, dtype=torch.float64)
        merge_rows(weight.numbers, factors, 8, out=sums, precision="exact")
        noise = Stochastic(5, "a.weight", 8 * COLUMNS) if drawn else None
        uniform = None if noise is None else noise.uniform(sums.numel()).view(sums.shape)
        part = encoded.rows(8, count)
        expected = encoded.encode(sums.reshape(part.shape), part, weight.found.read, uniform)
        done, kept = recode_between(weight.source, count, to, (factors, 8), rule, noise)
        expected = expected.contiguous().view(-1).view(torch.uint8)
        made = written(tmp_path, to, done)
        assert torch.equal(made, expected[: made.numel()])
        assert done == count or size > 0.01, "what is far out of range is left to others"
        if size == 0:
            assert kept.dot == kept.square == 0
