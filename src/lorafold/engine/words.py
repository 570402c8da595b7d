"""Numbers as people read them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes with three digits and a decimal unit.

    >>> size(0), size(999), size(2_204_000_000)
    ('0 B', '999 B', '2.20 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return (
        f"{nbytes:.0f} {unit}"
        if unit == "B" or nbytes >= 100
        else f"{nbytes:.3g} {unit}"
        if nbytes >= 10
        else f"{nbytes:.2f} {unit}"
    )


def per_second(nbytes: float, seconds: float) -> str:
    """A rate.

    >>> per_second(3_000_000, 2)
    '1.50 MB/s'
    """
    return f"{size(nbytes / max(seconds, 1e-9))}/s"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "file"), plural(2, "file")
    ('1 file', '2 files')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
