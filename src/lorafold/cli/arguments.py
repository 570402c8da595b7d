"""Words of the command line turned into values, with errors that name the argument."""

from __future__ import annotations

import math
import os
import re

import typer

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_adapter(text: str) -> tuple[str, float]:
    """(path, weight) of ``PATH`` or ``PATH@WEIGHT``; a path that exists is taken whole.

    >>> parse_adapter("style@0.7"), parse_adapter("style")
    (('style', 0.7), ('style', 1.0))
    """
    path, at, weight = text.rpartition("@")
    if not at or os.path.lexists(text):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not path:
        raise typer.BadParameter(f"'{text}': after @ comes the adapter's weight, a finite number such as 0.7", param_hint="ADAPTER")
    return path, value


def parse_size(text: str | None, option: str = "--max-shard-size") -> int | None:
    """Bytes of a size such as ``500MB``, ``4GiB`` or ``1000000``.

    >>> parse_size("1.5kB"), parse_size("2 MiB")
    (1500, 2097152)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise typer.BadParameter(f"'{text}' is not a size; write it as 500MB, 4GiB or a number of bytes", param_hint=option)
    return max(1, int(float(found[1]) * _UNITS[found[2].lower()]))


def parse_renames(texts: list[str] | None) -> tuple[tuple[str, str], ...]:
    """Runs of names and what they are to be, of ``OLD=NEW`` each.

    >>> parse_renames(["transformer.h=model.layers"])
    (('transformer.h', 'model.layers'),)
    """
    pairs = []
    for text in texts or ():
        old, equals, new = text.partition("=")
        if not equals or not old or "=" in new:
            raise typer.BadParameter(f"'{text}': write OLD=NEW, runs of whole names such as transformer.h", param_hint="--map")
        pairs.append((old, new))
    return tuple(pairs)


def parse_flags(text: str | None) -> tuple[bool, ...] | None:
    """The flags in ``true,false,true``.

    >>> parse_flags("true,false")
    (True, False)
    """
    if text is None:
        return None
    words = text.split(",")
    if not all(word in ("true", "false") for word in words) or "true" not in words:
        raise typer.BadParameter(f"'{text}': write true or false for each block, as in true,false,true", param_hint="--enable-lora")
    return tuple(word == "true" for word in words)


def parse_hashes(texts: list[str]) -> dict[str, str]:
    """sha256 by file name, of ``NAME=SHA256`` each.

    >>> list(parse_hashes(["model.safetensors=" + "0" * 64]))
    ['model.safetensors']
    """
    hashes = {}
    for text in texts:
        name, equals, sha256 = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise typer.BadParameter(f"'{text}': write the file's name, =, and 64 hexadecimal digits", param_hint="--expect-sha256")
        hashes[name] = sha256.lower()
    return hashes
