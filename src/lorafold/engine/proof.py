"""What a proof found, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import VerificationError, printable
from ..kernel.stats import Kept


@dataclass(frozen=True)
class TensorProof:
    """One tensor of the output.

    - `action`: how the plan makes it: ``"copy"``, ``"cast"``, ``"merge"`` or ``"replace"``
    - `proven`: whether every bit is what it must be
    - `failure`: what is wrong, in words
    """

    action: str
    proven: bool
    failure: str | None = None


@dataclass(frozen=True)
class ShardProof:
    """One file of the output: `tensors` and `kept` by name, `sha256` of the whole file, `nbytes` of its tensors."""

    name: str
    tensors: Mapping[str, TensorProof]
    sha256: str
    nbytes: int
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def require(self, where: str) -> None:
        """Raises `VerificationError` unless every tensor is proven."""
        failures = [f"{printable(name)} {tensor.failure}" for name, tensor in self.tensors.items() if not tensor.proven]
        _require(where, failures)


@dataclass(frozen=True)
class Proof:
    """What was found in reading a checkpoint back.

    - `tensors`: by name, of output and plan together
    - `files`: sha256 of each weight file as it was read, hexadecimal
    - `failures`: what is wrong, tensors first, then configuration and receipt; empty where all is proven
    - `nbytes`: bytes read from the output
    - `kept`: what of the update survived the rounding, by merged tensor, as computed anew
    """

    tensors: Mapping[str, TensorProof]
    files: Mapping[str, str]
    failures: tuple[str, ...]
    nbytes: int
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of tensors that are proven."""
        return sum(tensor.proven for tensor in self.tensors.values()) / max(1, len(self.tensors))

    def count(self, action: str) -> int:
        """How many tensors made by `action` are proven."""
        return sum(tensor.proven and tensor.action == action for tensor in self.tensors.values())

    def require(self, where: str) -> None:
        """Raises `VerificationError` unless everything is proven."""
        _require(where, self.failures)

    def to_json(self) -> dict[str, Any]:
        """The proof as a JSON object."""
        return {
            "proven": not self.failures,
            "share": self.share,
            "tensors": {
                name: {"action": tensor.action, "proven": tensor.proven} | ({"failure": tensor.failure} if tensor.failure else {})
                for name, tensor in self.tensors.items()
            },
            "files": dict(self.files),
            "failures": list(self.failures),
            "bytes": self.nbytes,
        }


def _require(where: str, failures: Sequence[str]) -> None:
    if failures:
        raise VerificationError(
            f"{printable(where)} is not what base and adapters say it must be, in {_places(len(failures))}",
            failures=failures,
            hint="do not use it: merge again; or was it made of another base, adapter or weight?",
        )


def _places(count: int) -> str:
    return "one place" if count == 1 else f"{count} places"
