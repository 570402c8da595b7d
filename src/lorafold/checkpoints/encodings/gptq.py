"""GPTQ and AWQ: integers with scales and zero points for groups of inputs, stored transposed, (in, out).

GPTQ packs down the columns, its zero points along the rows, each as one little-endian stream of bits, and may keep the group of
each input (desc_act). Files of its first version store a zero point less 1; where that is all ones, its readers disagree: they
take 2^bits, or carry into the next field. AWQ packs eight columns into a word, in an order of its own, and has no index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError, printable
from ...files.expression import Matrix, Permuted
from ...files.safetensors.info import TensorInfo
from .codebook import Gathered
from .complaints import FLOATS, partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .groups import grouped_index
from .packed import Unpacked
from .rewrite import encode_codes
from .scaled import BlockScaled
from .zeropoint import BlockShifted, shifted

_AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field that each of a word's eight columns is in (AutoAWQ, ``awq/utils/packing_utils.py``)."""


def find_gptq(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights of GPTQ and of AWQ's GEMM layout.

    Raises `CheckpointError` where tensors do not fit each other or `config`, and where zero points are ambiguous.
    """
    for name, words in stored.items():
        module, _, last = name.rpartition(".")
        if last != "qweight" or words.dtype != "I32":
            continue
        prefix = f"{module}." if module else ""
        scales = require(partner(stored, words, f"{prefix}scales"), FLOATS)
        if len(words.shape) != 2 or len(scales.shape) != 2 or not scales.numel:
            raise unfit(words, "a matrix with a matrix of scales", f"{list(words.shape)} and {list(scales.shape)}")
        awq = words.shape[1] * 8 == scales.shape[1]
        yield f"{prefix}weight", (_awq if awq else _gptq)(stored, prefix, (words, scales), config, read)


def _gptq(stored: Stored, prefix: str, given: tuple[TensorInfo, TensorInfo], config: Config, read: Read) -> Encoded:
    words, scales = given
    groups, columns = scales.shape
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{printable(str(words.path))}: '{printable(words.name)}' is stored as {printable(str(layout))[:40]},"
            " expected gptq or gptq_v2",
            hint="convert the checkpoint to the layout gptq with the program that wrote it",
        )
    zeros = require(partner(stored, words, f"{prefix}qzeros"), ("I32",))
    bits = _bits(words, zeros, columns, config)
    rows = words.shape[0] * 32 // bits
    require(words, ("I32",), (words.shape[0], columns))
    require(zeros, ("I32",), (groups, -(-columns * bits // 32)))
    points = Unpacked(zeros, bits, 1, columns)
    if layout == "gptq" and bool((points.value(read(zeros)) == (1 << bits) - 1).any()):
        raise CheckpointError(
            f"{printable(str(zeros.path))}: tensor '{printable(zeros.name)}' holds fields of {bits} ones, expected at most"
            f" {(1 << bits) - 2}: its readers disagree on what zero point they stand for",
            hint="save the checkpoint in the layout gptq_v2, which states zero points as they are",
        )
    index = stored.get(f"{prefix}g_idx")
    if index is not None:
        rows = index.numel
        if -(-rows * bits // 32) != words.shape[0]:
            raise unfit(index, f"the groups of {words.shape[0] * 32 // bits} inputs", f"shape {list(index.shape)}")
    group = _group(config, rows, groups, scales)
    order = None if index is None else grouped_index(index, rows, group, groups, read)
    seen: tuple[Matrix, Matrix] = (scales, points) if order is None else (Gathered(scales, order, 0), Gathered(points, order, 0))
    block = (group if order is None else 1, 1)
    codes: Matrix = BlockShifted(Unpacked(words, bits, 0, rows), seen[1], block)
    if layout == "gptq":
        codes = shifted(codes, 1)
    natural = BlockScaled(codes, seen[0], block)
    together = 32 if 32 % bits else 32 // bits
    names = tuple(each.name for each in (words, scales, zeros, index) if each is not None)
    return Encoded(f"GPTQ int{bits}", names, Permuted(natural), bits, encode=encode_codes, together=together)


def _awq(stored: Stored, prefix: str, given: tuple[TensorInfo, TensorInfo], config: Config, read: Read) -> Encoded:
    words, scales = given
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(
            f"{printable(str(words.path))}: '{printable(words.name)}' is of AWQ's layout {printable(version)[:40]}, expected gemm",
            hint="convert the checkpoint to the layout gemm with AutoAWQ",
        )
    rows, columns = words.shape[0], scales.shape[1]
    each = _group(config, rows, scales.shape[0], scales)
    zeros = require(partner(stored, words, f"{prefix}qzeros"), ("I32",), (scales.shape[0], words.shape[1]))
    codes, points = (Unpacked(packed, 4, 1, columns, order=_AWQ_FIELDS) for packed in (words, zeros))
    natural = BlockScaled(BlockShifted(codes, points, (each, 1)), scales, (each, 1))
    return Encoded("AWQ int4", (words.name, scales.name, zeros.name), Permuted(natural), 4, encode=encode_codes)


def _bits(words: TensorInfo, zeros: TensorInfo, columns: int, config: Config) -> int:
    """Bits of a code, by the width of the zero points; by the configuration where that leaves several."""
    across = zeros.shape[-1] if zeros.shape else 0
    possible = [bits for bits in (2, 3, 4, 8) if -(-columns * bits // 32) == across]
    if len(possible) > 1:
        possible = [bits for bits in possible if bits == config.get("bits")]
    if len(possible) != 1:
        raise unfit(zeros, f"zero points of 2, 3, 4 or 8 bits for {columns} columns", f"shape {list(zeros.shape)}")
    stated = config.get("bits")
    if stated is not None and stated != possible[0]:
        raise unfit(words, f"codes of {printable(repr(stated))[:20]} bits, as the configuration says", f"{possible[0]} bits")
    return possible[0]


def _group(config: Config, rows: int, groups: int, scales: TensorInfo) -> int:
    """Inputs of one group: as stated, where that gives so many groups; -1 stands for one group."""
    stated: Any = config.get("group_size", config.get("q_group_size"))
    if stated is None or stated == -1:
        stated = -(-rows // groups)
    if type(stated) is not int or stated < 1 or -(-rows // stated) != groups:
        raise unfit(scales, f"groups of {printable(repr(stated))[:20]} of {rows} inputs", f"shape {list(scales.shape)}")
    return stated
