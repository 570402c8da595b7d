"""`lorafold.json`, beside merged weights: what was merged into what, and how. A value, its file, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import strictjson
from .errors import CheckpointError, printable

RECEIPT_NAME = "lorafold.json"
FORMAT = 1


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter in a receipt: its name, hash and the weight that it was merged with."""

    name: str
    sha256: str
    adapter_weight: float
    format: str
    base_model: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What a merged checkpoint is.

    - `version`: of lorafold; `format`: of this file
    - `base`: its name, `model` name where known, and `fingerprint` (of all its headers)
    - `adapters`: all that are in the weights, those of earlier merges first
    - `precision`, `rounding`, `seed`, `dtype`: how the sum was rounded
    - `tensors`: for each tensor that was not copied, what was done; with `kept` and the scalings
    - `kept`: the share of the whole update that survived the rounding
    - `files`: sha256 by file name, of the files that were read back and proven; empty where they were not
    """

    version: str
    base: Mapping[str, Any]
    adapters: tuple[MergedAdapter, ...]
    precision: str
    rounding: str
    seed: int
    dtype: str | None
    tensors: Mapping[str, Mapping[str, Any]]
    kept: float
    files: Mapping[str, str]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The receipt as a JSON object."""
        return asdict(self)


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
        receipt = Receipt(**{**value, "adapters": adapters})
    except (KeyError, TypeError) as cause:
        raise CheckpointError(f"{shown} is not a receipt: {cause}", hint="restore it, or remove it if it is not ours") from None
    expected = {"base": dict, "tensors": dict, "files": dict, "precision": str, "rounding": str, "seed": int}
    for name, kind in expected.items():
        if type(getattr(receipt, name)) is not kind:
            raise CheckpointError(f"{shown}: {name} must be a {kind.__name__}, not {getattr(receipt, name)!r}")
    return receipt


RECEIPT_FIELDS = tuple(field.name for field in fields(Receipt))
