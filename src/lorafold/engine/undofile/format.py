"""What an undo file says of itself, in its metadata: of which merge it is, and how each tensor comes back. A value and its text.

Names of the tensors in the file are made here too, so that writing and reading agree on them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...checkpoints.index import is_plain_name
from ...errors import VerificationError, printable
from ...files import strictjson

FORMAT = 1
FIELD = "lorafold_undo"
"""The metadata field that holds the description."""

FIELD_SHA256 = "lorafold_undo_sha256"
"""The metadata field that holds the hash of its text: a word that is lost from it must not be missed."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**63


@dataclass(frozen=True)
class ChangedPiece:
    """Rows `start` to `stop` of a tensor; `scalings` of what was added to them, whose factors are in the file."""

    start: int
    stop: int
    scalings: tuple[float, ...]


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that merging changed.

    - `sha256`: of the base's bytes
    - `columns`: it is seen as a matrix of so many; `tile`: rows that were worked on at once
    - `pieces`: in order, and together all its rows
    - `rows`: whether the file has rows of the base that were replaced, with their indices
    """

    sha256: str
    columns: int
    tile: int
    pieces: tuple[ChangedPiece, ...]
    rows: bool = False


@dataclass(frozen=True)
class StoredFile:
    """A file beside the base's weights; `stored`: whether the undo file has it, else the merged checkpoint has the very same."""

    sha256: str
    stored: bool


@dataclass(frozen=True)
class Description:
    """What an undo file is of.

    - `version`: of lorafold; `format`: of the file
    - `receipt`: sha256 of the merged checkpoint's lorafold.json; `plan`: a hash of all that decided the merge
    - `output`: hashes of the merged checkpoint's files of weights, by name, as its receipt states them
    - `fingerprint`: of the base's headers
    - `shards`: the base's files of weights, whose headers are in the file; `files`: those beside them
    - `config`: what the base's config.json has in the fields that merging changed, by dotted path; for people
    - `tensors`: by name, those that merging changed
    """

    version: str
    receipt: str
    plan: str
    output: Mapping[str, str]
    fingerprint: str
    shards: tuple[str, ...]
    files: Mapping[str, StoredFile]
    config: Mapping[str, Any]
    tensors: Mapping[str, ChangedTensor]
    format: int = FORMAT

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=True)


def description_from(text: str, source: str) -> Description:
    """The description that `text` is; `source` names it in errors.

    Raises `VerificationError` where it is none.
    """
    value = strictjson.parse(text, source)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise VerificationError(f"{source}: an undo file of format {FORMAT} is expected, found {found!r}")
    try:
        description = Description(
            **{
                **value,
                "shards": tuple(value["shards"]),
                "files": {name: StoredFile(**each) for name, each in value["files"].items()},
                "tensors": {name: _tensor(each) for name, each in value["tensors"].items()},
            }
        )
        wrong = next(_wrong(description), None)
    except (KeyError, TypeError, AttributeError, ValueError) as cause:
        raise VerificationError(f"{source} is damaged: its description cannot be read: {cause}") from None
    if wrong is not None:
        raise VerificationError(f"{source} is damaged: {wrong}")
    return description


def _tensor(value: Any) -> ChangedTensor:
    pieces = tuple(ChangedPiece(**{**piece, "scalings": tuple(piece["scalings"])}) for piece in value["pieces"])
    return ChangedTensor(**{**value, "pieces": pieces})


def _wrong(found: Description) -> Iterator[str]:
    hashes: list[Any] = [found.receipt, found.plan, found.fingerprint]
    hashes += [each.removeprefix("blake3:") for each in found.output.values()]
    hashes += [each.sha256 for each in found.files.values()] + [each.sha256 for each in found.tensors.values()]
    if not all(isinstance(each, str) and _SHA256.fullmatch(each) for each in hashes):
        yield "a hash is none"
    if not found.shards or not all(isinstance(name, str) and _is_of_weights(name) for name in found.shards):
        yield "a file of weights is not named by a plain name"
    if not all(_is_inside(name) and isinstance(each.stored, bool) for name, each in found.files.items()):
        yield "a file beside the weights is named by a path that leads elsewhere"
    for name, each in found.tensors.items():
        if not _is_whole(each):
            yield f"what it says of '{printable(name)}' cannot be"


def _is_of_weights(name: str) -> bool:
    return is_plain_name(f"{name.removesuffix('.gguf')}.safetensors" if name.endswith(".gguf") else name)


def _is_whole(tensor: ChangedTensor) -> bool:
    """Whether sizes are sizes, scalings finite numbers, and the pieces follow one another."""
    end = 0
    for piece in tensor.pieces:
        if not (_is_count(piece.start) and _is_count(piece.stop) and piece.start == end <= piece.stop):
            return False
        if not all(type(scaling) in (int, float) and abs(scaling) <= sys.float_info.max for scaling in piece.scalings):
            return False
        end = piece.stop
    return _is_count(tensor.columns) and _is_count(tensor.tile) and tensor.tile > 0 and type(tensor.rows) is bool


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\x00-\x1f\x7f]", name)
    return plain and ("/" in name or not name.endswith(".safetensors"))  # those of its own folder are the weights


def payload(name: str) -> str:
    """The tensor of bytes that holds what `name` differs by, tile after tile."""
    return f"difference/{name}"


def table(name: str) -> str:
    """(tiles, 3) int64: how many small and large differences each tile has (−1 for none, −2 for the base's bytes), its bytes."""
    return f"tiles/{name}"


def factor(kind: str, piece: int, update: int, name: str) -> str:
    """A factor (`kind` lora_A or lora_B) of an update of a piece."""
    return f"{kind}/{piece}.{update}/{name}"


def row_values(name: str) -> str:
    """(n, columns) the base's rows that were replaced."""
    return f"rows/{name}"


def row_indices(name: str) -> str:
    """(n,) int64: where they were."""
    return f"indices/{name}"


def head(shard: str) -> str:
    """The first bytes of one of the base's files of weights."""
    return f"head/{shard}"


def file(name: str) -> str:
    """The bytes of a file beside the base's weights."""
    return f"file/{name}"
