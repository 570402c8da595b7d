"""What a proof found, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SHOWN, VerificationError, printable
from ..kernel.stats import Kept
from ..text import Readable, Summary, plural, size


@dataclass(frozen=True)
class TensorProof:
    """One tensor of the output.

    - `action`: how the plan makes it: ``"copy"``, ``"cast"``, ``"merge"``, ``"encode"`` or ``"replace"``
    - `proven`: whether every bit is what it must be
    - `failure`: what is wrong, in words
    """

    action: str
    proven: bool
    failure: str | None = None


@dataclass(frozen=True)
class ShardProof:
    """One file of the output: `tensors` and `kept` by name, `digest` of the whole file, `nbytes` of its tensors."""

    name: str
    tensors: Mapping[str, TensorProof]
    digest: str
    nbytes: int
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def raise_for_failures(self, where: str) -> None:
        """Raises `VerificationError`, of the output `where`, unless every tensor is proven."""
        failures = [f"{printable(name)} {tensor.failure}" for name, tensor in self.tensors.items() if not tensor.proven]
        _raise_for(where, failures)


@dataclass(frozen=True)
class Proof(Readable):
    """What was found in reading a checkpoint back.

    - `tensors`: by name, of output and plan together
    - `files`: hash of each weight file as it was read, by the algorithm of the receipt: sha256, hexadecimal, or ``"blake3:…"``
    - `failures`: what is wrong, tensors first, then configuration and receipt; empty where all is proven
    - `nbytes`: bytes read from the output
    - `kept`: what of the update survived the rounding, by merged tensor, as computed anew
    - `notes`: what was found beside that does not make it fail: a model card that people changed, documents that they added
    - `not_covered`: what was not looked at (`lorafold.engine.proof` has the table)
    - `out`: what was read; `replayed`: whether it was computed anew from base and adapters, or held to the hashes in its receipt

    It is true where all is proven, ``if proof:``, and `raise_for_failures` is for those who want an error where it is not.

    >>> import lorafold
    >>> _ = lorafold.merge("base", ["adapter"], "out")
    >>> proof = lorafold.verify("out", "base", ["adapter"])
    >>> bool(proof), proof.ok, proof.failures
    (True, True, ())
    >>> proof.raise_for_failures()
    >>> print(proof)
    out is what base and adapters say it must be
      verified  6 of 6 tensors proven (100%): 4 recomputed and equal bit for bit, 2 equal byte for byte
      read      ... in 2 files
      not held  in a lorafold.json whose own hash was rewritten as well: ...
    """

    tensors: Mapping[str, TensorProof]
    files: Mapping[str, str]
    failures: tuple[str, ...]
    nbytes: int
    kept: Mapping[str, Kept] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    out: str = ""
    replayed: bool = True

    @property
    def ok(self) -> bool:
        """Whether everything is what it must be."""
        return not self.failures

    def __bool__(self) -> bool:
        return self.ok

    @property
    def share(self) -> float:
        """The share of tensors that are proven."""
        return sum(tensor.proven for tensor in self.tensors.values()) / max(1, len(self.tensors))

    def count(self, action: str) -> int:
        """How many tensors made by `action` are proven."""
        return sum(tensor.proven and tensor.action == action for tensor in self.tensors.values())

    def raise_for_failures(self) -> None:
        """Raises `VerificationError` unless everything is proven."""
        _raise_for(self.out or "the checkpoint", self.failures)

    @property
    def words(self) -> str:
        """How many tensors are proven, and how."""
        whole = sum(tensor.proven for tensor in self.tensors.values())
        merged = self.count("merge") + self.count("encode")
        return (
            f"{whole} of {len(self.tensors)} tensors proven ({self.share:.0%}): {merged} recomputed and equal bit for bit,"
            f" {whole - merged} equal byte for byte"
        )

    def summary(self) -> Summary:
        """What was found, for people."""
        by_what = "what base and adapters say it must be" if self.replayed else "as it was written, by the hashes in its receipt"
        name = printable(self.out or "the checkpoint")
        facts = [("verified", self.words)] if self.replayed else []
        facts.append(("read", f"{size(self.nbytes)} in {plural(len(self.files), 'file')}"))
        facts += [("note", note) for note in self.notes[:SHOWN]]
        if len(self.notes) > SHOWN:
            facts.append(("note", f"and {len(self.notes) - SHOWN} more"))
        if self.ok:
            return Summary(f"{name} is {by_what}", [*facts, *(("not held", what) for what in self.not_covered)])
        shown = [("wrong", failure) for failure in self.failures[:SHOWN]]
        if len(self.failures) > SHOWN:
            shown.append(("wrong", f"and {len(self.failures) - SHOWN} more"))
        return Summary(f"{name} is not {by_what}, in {_places(len(self.failures))}", [*facts, *shown])

    def to_json(self) -> dict[str, Any]:
        """The proof as a JSON object."""
        return {
            "proven": self.ok,
            "share": self.share,
            "tensors": {
                name: {"action": tensor.action, "proven": tensor.proven} | ({"failure": tensor.failure} if tensor.failure else {})
                for name, tensor in self.tensors.items()
            },
            "files": dict(self.files),
            "failures": list(self.failures),
            "notes": list(self.notes),
            "not_covered": list(self.not_covered),
            "bytes": self.nbytes,
        }


def _raise_for(where: str, failures: Sequence[str]) -> None:
    if failures:
        raise VerificationError(
            f"{printable(where)} is not what base and adapters say it must be, in {_places(len(failures))}",
            failures=failures,
            hint="do not use it: merge again; or was it made of another base, adapter or weight?",
        )


def _places(count: int) -> str:
    return "one place" if count == 1 else f"{count} places"
