"""bitsandbytes: NF4 and FP4 in blocks over the whole tensor, row after row, and LLM.int8 with a scale for each row.

Names and JSON are those of `bitsandbytes.functional.QuantState.as_dict(packed=True)` and `Int8Params`. The tables in a
checkpoint are those that count. Scales that are codes themselves (double quantisation) are decoded as the vendor does, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError, printable
from ...files import strictjson
from ...files.expression import Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .codebook import Constant, Single, Valued
from .complaints import partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .packed import Unpacked
from .rewrite import encode_codes
from .scaled import BlockScaled

_STATE = ".quant_state.bitsandbytes__"
_LONGEST_STATE = 1 << 16  # bytes; what bitsandbytes writes has about 200
_WORDS = ("U8", "BF16", "F16", "F32", "I8", "F64")


def find_bitsandbytes(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights in NF4, FP4 and int8 of bitsandbytes.

    Raises `CheckpointError` where a tensor is missing or of another shape, and where the JSON of a weight is not what it must be.
    """
    for name, info in stored.items():
        weight, state, kind = name.partition(_STATE)
        if state:
            yield weight, _four_bits(stored, weight, kind, info, read)
        elif name.endswith(".absmax") and f"{name[:-7]}.quant_map" in stored:
            weight = name.removesuffix(".absmax")
            if not any(f"{weight}{_STATE}{kind}" in stored for kind in ("nf4", "fp4")):
                partner(stored, info, f"{weight}{_STATE}nf4")
        elif name.endswith("SCB"):
            module = name.removesuffix("SCB")
            yield f"{module}weight", _eight_bits(stored, module, info, read)


def _four_bits(stored: Stored, weight: str, kind: str, state: TensorInfo, read: Read) -> Encoded:
    fields = _State(state, read, kind)
    shape, blocksize = fields.shape("shape"), fields.positive("blocksize")
    numel = math.prod(shape)
    codes = partner(stored, state, weight)
    if codes.dtype not in _WORDS or codes.nbytes < (numel + 1) // 2 or codes.nbytes >= (numel + 1) // 2 + 8:
        raise unfit(codes, f"{(numel + 1) // 2} bytes for shape {list(shape)}", f"{codes.dtype} {list(codes.shape)}")
    table = require(partner(stored, codes, f"{weight}.quant_map"), ("F32",), (16,))
    absmax = partner(stored, codes, f"{weight}.absmax")
    names = [weight, absmax.name, table.name, state.name]
    blocks = -(-numel // blocksize)
    scales: Matrix = require(absmax, ("U8",) if fields.nested else ("F32",), (blocks,), (blocks, 1))
    if absmax.shape != (blocks,):
        scales = replace(absmax, shape=(blocks,))
    if fields.nested:
        each = fields.positive("nested_blocksize")
        largest = require(partner(stored, codes, f"{weight}.nested_absmax"), ("F32",), (-(-blocks // each),))
        map256 = require(partner(stored, codes, f"{weight}.nested_quant_map"), ("F32",), (256,))
        scales = Single(BlockScaled(Valued(scales, map256), largest, (each,)), fields.single("nested_offset"))
        names += [largest.name, map256.name]
    raw = replace(codes, dtype="U8", shape=(codes.nbytes,))
    unpacked = Unpacked(raw, 4, 0, numel, order=(1, 0))
    decoded = Reshaped(BlockScaled(Valued(unpacked, table), scales, (blocksize,)), shape)
    odd = math.prod(shape[1:]) % 2
    label = f"bitsandbytes {kind.upper()}" + (", double quantised" if fields.nested else "")
    return Encoded(label, tuple(names), decoded, 4, encode=encode_codes, together=1 + odd)


def _eight_bits(stored: Stored, module: str, scb: TensorInfo, read: Read) -> Encoded:
    codes = require(partner(stored, scb, f"{module}weight"), ("I8",))
    if len(codes.shape) != 2:
        raise unfit(codes, "a matrix", f"shape {list(codes.shape)}")
    require(scb, ("F32",), (codes.shape[0],))
    names, layout = [codes.name, scb.name], stored.get(f"{module}weight_format")
    if layout is not None:
        names.append(require(layout, ("U8", "I8", "I32", "I64"), (), (1,)).name)
        if int(read(layout).reshape(-1)[0]):
            raise unfit(layout, "0, rows after each other", f"{int(read(layout).reshape(-1)[0])}, a layout of one kind of GPU")
    products = BlockScaled(codes, replace(scb, shape=(codes.shape[0], 1)), (1, codes.shape[1]))
    decoded = BlockScaled(products, Constant((127.0,), (1, 1)), codes.shape, divides=True)
    return Encoded("bitsandbytes int8", tuple(names), decoded, 8, encode=encode_codes)


class _State:
    """The fields of the JSON that bitsandbytes keeps as bytes beside a weight, each checked when it is asked for."""

    def __init__(self, info: TensorInfo, read: Read, kind: str) -> None:
        self.info = info
        require(info, ("U8",))
        if len(info.shape) != 1 or info.nbytes > _LONGEST_STATE:
            raise unfit(info, f"JSON of at most {_LONGEST_STATE} bytes", f"shape {list(info.shape)}")
        where = f"{printable(str(info.path))}: tensor '{printable(info.name)}'"
        value = strictjson.parse(bytes(read(info).tolist()), where, error=CheckpointError)
        if not isinstance(value, dict):
            raise unfit(info, "a JSON object", type(value).__name__)
        self.fields: dict[str, Any] = value
        if kind not in ("nf4", "fp4") or value.get("quant_type") != kind:
            raise unfit(info, "quant_type nf4 or fp4, as in the tensor's name", repr(value.get("quant_type"))[:40])

    @property
    def nested(self) -> bool:
        return any(name.startswith("nested_") for name in self.fields)

    def positive(self, name: str) -> int:
        """A count from 1 to 2³⁰."""
        value = self.fields.get(name)
        if type(value) is not int or not 0 < value <= 1 << 30:
            raise unfit(self.info, f"{name} to be a positive integer", repr(value)[:40])
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        value = self.fields.get(name)
        good = isinstance(value, list) and 0 < len(value) <= 8 and all(type(size) is int and 0 < size < 1 << 40 for size in value)
        if not good or not isinstance(value, list):
            raise unfit(self.info, f"{name} to be a list of positive integers", repr(value)[:40])
        return tuple(value)

    def single(self, name: str) -> float:
        """A number that float32 holds."""
        value = self.fields.get(name)
        if type(value) not in (int, float) or not abs(value) < 3.4e38:  # type: ignore[arg-type]
            raise unfit(self.info, f"{name} to be a number of float32", repr(value)[:40])
        return float(value)  # type: ignore[arg-type]
