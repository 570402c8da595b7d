"""A JSON file that holds the hash of its own text, so that no byte of it changes unnoticed, but by someone who means to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.regular import read_regular

SEAL = "sha256"
"""The last field: the sha256 of the file's bytes, with 64 zeros where it stands itself."""

_ZEROS = "0" * 64
LARGEST = 256 * 1024 * 1024
"""Bytes of the longest receipt that is read: some hundreds for each tensor that was merged."""


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
    data = read_regular(path, LARGEST, error=CheckpointError)
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
