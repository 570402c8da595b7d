"""`lorafold.json`, beside merged weights: what was merged into what, and how. A value, its file, and nothing else.

The file holds the hash of its own text, so that no byte of it changes unnoticed, but by someone who means to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..declared import declared, picked
from ..errors import CheckpointError, PlanError, printable
from ..files import strictjson
from ..files.gguf.gguf_header import RECEIPT_KEY, is_gguf_file, read_gguf_header
from ..files.regular import read_regular
from ..options import SumOptions
from .checkpoint import Checkpoint

RECEIPT_NAME = "lorafold.json"
FORMAT = 1

SEAL = "sha256"
"""The last field: the sha256 of the file's bytes, with 64 zeros where it stands itself."""

_ZEROS = "0" * 64
LARGEST = 256 * 1024 * 1024
"""Bytes of the longest receipt that is read: some hundreds for each tensor that was merged."""


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter in a receipt: its name, hash and the weight that it was merged with; its tensors that went nowhere, and why."""

    name: str
    sha256: str
    adapter_weight: float
    format: str
    base_model: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """What a merged checkpoint is.

    - `version`: of lorafold; `format`: of this file
    - `base`: its name, `model` name where known, and `fingerprint` (of all its headers)
    - `adapters`: all that are in the weights, those of earlier merges first
    - `options`: what decided its bits; in JSON their names stand among the others
    - `tensors`: for each tensor that was not copied, what was done; with `kept` and the scalings
    - `kept`: the share of the whole update that survived the rounding
    - `clamped`: how many numbers were beyond the dtype's largest, and were put to it; by tensor in `tensors`
    - `unmatched`: what of the adapters was left out, where that was allowed
    - `files`: the hash of each file of weights, by its name: sha256, hexadecimal, or ``"blake3:…"`` where that was asked for;
      `beside`: sha256 of the files beside them, but for the model card
    - `tensor_hashes`: sha256 of the bytes of each tensor, by name, where that was asked for
    """

    version: str
    base: Mapping[str, Any]
    adapters: tuple[MergedAdapter, ...]
    options: SumOptions
    tensors: Mapping[str, Mapping[str, Any]]
    kept: float
    files: Mapping[str, str]
    format: int = FORMAT
    unmatched: tuple[str, ...] = ()
    clamped: int = 0
    beside: Mapping[str, str] = field(default_factory=dict)
    tensor_hashes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The receipt as a JSON object."""
        value = {each.name: getattr(self, each.name) for each in fields(self)}  # JSON already, and may be long
        value["adapters"] = [asdict(adapter) for adapter in self.adapters]
        options = value.pop("options").stated()
        del options["max_shard_size"]  # which the files show
        if options["tied_head"] is None:  # stated where it was said
            del options["tied_head"]
        stated, names = list(value), list(options)
        for place, some in ((3, names[:4]), (11, names[4:6]), (15, names[6:])):  # where files of this format have had them
            stated[place:place] = some
        value |= options
        return {name: value[name] for name in stated}


def receipt_bytes(place: Path) -> bytes | None:
    """The text of the receipt of the checkpoint at `place`, a folder, or a file in GGUF, which has it in its metadata; None where
    there is none.

    Raises `CheckpointError` where it cannot be read.
    """
    if place.is_file():
        text = read_gguf_header(place).metadata.get(RECEIPT_KEY) if is_gguf_file(place) else None
        return None if text is None else text.rstrip(" ").encode()
    path = place / RECEIPT_NAME
    return read_regular(path, LARGEST, error=CheckpointError) if path.exists() else None


def receipt_of(checkpoint: Checkpoint) -> Receipt | None:
    """The receipt of `checkpoint`; None where it has none, or stands among files that need not belong to it.

    Raises `CheckpointError` where it cannot be understood.
    """
    if checkpoint.gguf is not None:
        return read_receipt(checkpoint.shards[0].path)
    return None if checkpoint.single_file else read_receipt(checkpoint.root)


def read_receipt(place: Path) -> Receipt | None:
    """The receipt of what is at `place` (`receipt_bytes`); None where there is none.

    Raises `CheckpointError` where it cannot be understood.
    """
    data = receipt_bytes(place)
    if data is None:
        return None
    path = place / RECEIPT_NAME if place.is_dir() else place
    value = strictjson.parse(data, str(path), error=CheckpointError)
    shown = printable(str(path))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{shown}: a receipt of format {FORMAT} is expected, found {found!r}")
    value.pop(SEAL, None)  # of the file, see `receipt_damage`
    try:
        adapters = tuple(MergedAdapter(**adapter) for adapter in value["adapters"])
        stated = {name: entry for name, entry in value.items() if name not in declared(SumOptions)}
        options = picked(SumOptions, value)
        receipt = Receipt(**{**stated, "options": options, "adapters": adapters, "unmatched": _names(value.get("unmatched", ()))})
    except PlanError as cause:
        raise CheckpointError(f"{shown}: {cause.message}") from None
    except (KeyError, TypeError) as cause:
        raise CheckpointError(f"{shown} is not a receipt: {cause}", hint="restore it, or remove it if it is not ours") from None
    for name, (expected, fits) in _CHECKS.items():
        if not fits(getattr(receipt, name)):
            raise CheckpointError(f"{shown}: {name} must be {expected}, not {_short(getattr(receipt, name))}")
    for adapter in adapters:
        named = isinstance(adapter.name, str) and isinstance(adapter.sha256, str) and isinstance(adapter.left_out, dict)
        if not (named and _is_number(adapter.adapter_weight)):
            raise CheckpointError(f"{shown}: an adapter must have a name, a sha256 and a weight, not {_short(adapter)}")
    return receipt


def receipt_text(receipt: Receipt) -> str:
    """The text of the file `lorafold.json`: the fields of `receipt`, and last the hash of the text itself."""
    return sealed(receipt.to_json())


def receipt_damage(place: Path, *, unsealed: bool = False) -> list[str]:
    """In words, where the receipt of what is at `place` is not as it was written, by the hash in it; empty where it is.

    `unsealed`: one that has none, as earlier versions wrote them, is taken for whole.
    """
    data, shown = receipt_bytes(place) or b"", str(place / RECEIPT_NAME if place.is_dir() else place)
    if unsealed and SEAL not in strictjson.parse(data, shown, error=CheckpointError):
        return []
    failure = _seal_failure(data)
    return [] if failure is None else [f"{RECEIPT_NAME}: {failure}"]


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError("unmatched must be a list of names")
    return tuple(value)


def _is_hashes(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(sha256, str) for sha256 in value.values()):
        return False
    return not any(".." in name.split("/") or name.startswith("/") or "\0" in name for name in value)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…"


_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "version": ("text", lambda value: isinstance(value, str)),
    "base": ("an object", lambda value: isinstance(value, dict)),
    "tensors": ("an object of objects", lambda value: isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())),
    "files": ("an object of hashes", _is_hashes),
    "beside": ("an object of hashes", _is_hashes),
    "tensor_hashes": (
        "an object of hashes",
        lambda value: isinstance(value, dict) and all(isinstance(sha256, str) for sha256 in value.values()),
    ),
    "clamped": ("an integer", lambda value: type(value) is int),
    "kept": ("a number", _is_number),
}


def sealed(value: Mapping[str, Any]) -> str:
    """`value` as the text of such a file, indented, the order of keys kept.

    >>> print(sealed({"a": 1}), end="")
    {
      "a": 1,
      "sha256": "f3d09652b50d345e403e517cac1b3c1ace359d18c35ed93eb1729608bb3398bf"
    }
    """
    text = json.dumps({**value, SEAL: _ZEROS}, indent=2, ensure_ascii=False) + "\n"
    before, _, after = text.rpartition(_ZEROS)
    return before + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() + after


def seal_failure(path: Path) -> str | None:
    """What is wrong with the hash in the file at `path`, in words; None where it is that of its text.

    Raises `CheckpointError` where it cannot be read.
    """
    return _seal_failure(read_regular(path, LARGEST, error=CheckpointError))


def _seal_failure(data: bytes) -> str | None:
    """The same, of a text."""
    found = _LAST.search(data)
    if found is None:
        return "it has no hash of itself at its end: it was changed, or written by an earlier version"
    whole = data[: found.start(1)] + _ZEROS.encode() + data[found.end(1) :]
    return (
        None
        if hashlib.sha256(whole).hexdigest().encode() == found[1]
        else "it is not as it was written: its hash is of another text"
    )


_LAST = re.compile(rb'"%b": "([0-9a-f]{64})"\n}\n\Z' % SEAL.encode())
