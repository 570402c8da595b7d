"""Hashes of files that say how they were made: SHA-256 as 64 hexadecimal digits, what `sha256sum` prints and hubs list, and BLAKE3
as ``blake3:`` before as many.

BLAKE3 is a tree, so a processor hashes many blocks at once: four times as fast as SHA-256 where that has instructions of its own.
It comes from the package of its name, which is asked for by ``lorafold[blake3]``.
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, cast

from ..errors import InputError, printable
from .regular import open_regular, sha256_of

Algorithm = Literal["sha256", "blake3"]

_BLAKE3 = "blake3"
_TOGETHER = 1 << 20  # bytes that are read at once: enough for the tree to be wide


class Digest(Protocol):
    """What is given bytes, and says their hash, hexadecimal."""

    def update(self, data: memoryview, /) -> object:
        """Take some more bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all of them."""
        ...


def new_digest(algorithm: Algorithm) -> Digest:
    """What hashes so.

    Raises `InputError` where it needs a package that is not installed.
    """
    if algorithm == "sha256":
        return hashlib.sha256()
    try:
        return cast(Digest, import_module(_BLAKE3).blake3())
    except ImportError:
        raise InputError("BLAKE3 needs the package blake3, which is not installed", hint="pip install 'lorafold[blake3]'") from None


def written(algorithm: Algorithm, digest: Digest) -> str:
    """The hash as it stands in a receipt.

    >>> written("sha256", hashlib.sha256(b""))[:16]
    'e3b0c44298fc1c14'
    """
    return digest.hexdigest() if algorithm == "sha256" else f"{algorithm}:{digest.hexdigest()}"


def algorithm_of(stated: str) -> Algorithm:
    """How the hash `stated` was made.

    >>> algorithm_of("blake3:af1349b9"), algorithm_of("e3b0c442")
    ('blake3', 'sha256')
    """
    return "blake3" if stated.startswith(f"{_BLAKE3}:") else "sha256"


def hash_of(path: Path, algorithm: Algorithm, *, error: type[InputError] = InputError, blank: tuple[int, int] = (0, 0)) -> str:
    """The hash of the regular file at `path`, as it stands in a receipt; the bytes `blank`, from and to, count as spaces.

    Raises `error` where it cannot be opened or read, `InputError` as `new_digest` does.
    """
    if algorithm == "sha256" and blank[0] == blank[1]:
        return sha256_of(path, error=error)
    digest = new_digest(algorithm)
    fd, _ = open_regular(path, error=error)
    with open(fd, "rb", buffering=0) as file:
        try:
            buffer, done = memoryview(bytearray(_TOGETHER)), 0
            while count := file.readinto(buffer):
                low, high = (min(max(end - done, 0), count) for end in blank)
                buffer[low:high] = b" " * (high - low)
                digest.update(buffer[:count])
                done += count
        except OSError as cause:
            raise error(f"{printable(str(path))} cannot be read: {cause.strerror}") from cause
    return written(algorithm, digest)


def shown_hash(stated: str) -> str:
    """The hash with the name of its algorithm, for people.

    >>> shown_hash("blake3:af13"), shown_hash("e3b0")
    ('blake3 af13', 'sha256 e3b0')
    """
    return f"{algorithm_of(stated)} {stated.removeprefix(f'{_BLAKE3}:')}"
