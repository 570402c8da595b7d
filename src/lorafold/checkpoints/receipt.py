"""`lorafold.json`, beside merged weights: what was merged into what, and how. A value, its file, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, printable
from ..files import strictjson
from ..kernel.merge import Precision

RECEIPT_NAME = "lorafold.json"
FORMAT = 1


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
    - `precision`, `rounding`, `seed`, `dtype`: how the sum was rounded
    - `tensors`: for each tensor that was not copied, what was done; with `kept` and the scalings
    - `kept`: the share of the whole update that survived the rounding
    - `on_overflow`, `allow_nonfinite_base`: what was done about numbers that are not finite
    - `clamped`: how many numbers were beyond the dtype's largest, and were put to it; by tensor in `tensors`
    - `unmatched`: what of the adapters was left out, where that was allowed
    - `files`: sha256 of each file of weights, by its name; `beside`: of the files beside them, but for the model card
    - `only_changed`: whether tensors that are the base's own were left out
    - `tensor_hashes`: sha256 of the bytes of each tensor, by name, where that was asked for
    """

    version: str
    base: Mapping[str, Any]
    adapters: tuple[MergedAdapter, ...]
    precision: Precision
    rounding: Literal["nearest", "stochastic"]
    seed: int
    dtype: str | None
    tensors: Mapping[str, Mapping[str, Any]]
    kept: float
    files: Mapping[str, str]
    format: int = FORMAT
    on_overflow: Literal["error", "clamp"] = "error"
    allow_nonfinite_base: bool = False
    unmatched: tuple[str, ...] = ()
    clamped: int = 0
    only_changed: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)
    tensor_hashes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The receipt as a JSON object."""
        adapters = [asdict(adapter) for adapter in self.adapters]  # the rest is JSON already, and may be long
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"adapters": adapters}


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in `folder`; None where there is none.

    Raises `CheckpointError` where it cannot be understood.
    """
    path = folder / RECEIPT_NAME
    if not path.exists():
        return None
    value = strictjson.load(path, error=CheckpointError)
    shown = printable(str(path))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{shown}: a receipt of format {FORMAT} is expected, found {found!r}")
    try:
        adapters = tuple(MergedAdapter(**adapter) for adapter in value["adapters"])
        receipt = Receipt(**{**value, "adapters": adapters, "unmatched": _names(value.get("unmatched", ()))})
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
    "precision": ("'exact' or 'fast'", lambda value: value in ("exact", "fast")),
    "rounding": ("'nearest' or 'stochastic'", lambda value: value in ("nearest", "stochastic")),
    "clamped": ("an integer", lambda value: type(value) is int),
    "seed": ("an integer", lambda value: type(value) is int),
    "dtype": ("null or a type of floats", lambda value: value in (None, "BF16", "F16", "F32", "F64")),
    "kept": ("a number", _is_number),
    "on_overflow": ("'error' or 'clamp'", lambda value: value in ("error", "clamp")),
    "only_changed": ("true or false", lambda value: isinstance(value, bool)),
    "allow_nonfinite_base": ("true or false", lambda value: isinstance(value, bool)),
}
