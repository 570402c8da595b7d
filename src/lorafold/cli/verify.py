"""``lorafold verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from ..api import verifying
from ..api.loading import AdapterLike
from .startup import progress
from .terminal import show, show_json


def verify(out: Path, base: Path | None, adapters: Sequence[AdapterLike], *, as_json: bool) -> None:
    """Prove, and print what was found."""
    if (base is None) != (not adapters):
        option = "--base" if base is None else "--adapter"
        raise typer.BadParameter(f"Missing option {option}: the proof needs both; without either, hashes are compared")
    proof = verifying.verify(out, base, adapters, progress=progress())
    if as_json:
        show_json(proof.to_json())
        if proof.failures:
            raise typer.Exit(3)
        return
    proof.raise_for_failures()
    show(proof.summary())
