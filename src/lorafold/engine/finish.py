"""What goes on beside the writing: the proof, which follows it through each file, and the disk's own work.

The writing waits for it at one place alone: a file that has all its bytes is brought to the disk when the file before is on disk
and proven. The proof waits for bytes that are not written yet; so nothing that it waits for waits for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from ..errors import CheckpointError
from ..files.regular import sha256_of
from ..files.safetensors.coverage import Written
from ..files.safetensors.reader import Until
from .output import OnBytes, OpenFile


class StoppedError(Exception):
    """Nobody waits for the proof any more."""


class Closing:
    """The proofs and the ends of the files that are written; a context manager.

    One file is proven at a time, in the order in which they were begun. After an error, what is still under way is stopped.

    - `on_bytes`: told of each number of bytes that were proven
    - `trailing`: prove a file while it is being written, and not only after
    """

    def __init__(self, on_bytes: OnBytes, *, trailing: bool = True) -> None:
        self._tell = on_bytes
        self._trailing = trailing
        self._stopped = False
        self._disk = ThreadPoolExecutor(1, "disk")
        self._checks = ThreadPoolExecutor(1, "check")
        self._proofs: dict[OpenFile, Future[str]] = {}
        self._ended: OpenFile | None = None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped = True
        for file in self._proofs:
            file.writer.written.end()
        self._checks.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)

    def on_bytes(self, nbytes: int) -> None:
        """Told by a check of its bytes."""
        if self._stopped:
            raise StoppedError
        self._tell(nbytes)

    def begin(self, file: OpenFile) -> None:
        """Let the proof follow the writing of `file`."""
        if self._trailing:
            self._prove(file, partial(_until, file.writer.written))

    def end(self, file: OpenFile) -> None:
        """Bring `file`, which has all its bytes, to the disk, when the file before is done."""
        self.wait()
        if not self._trailing:
            self._prove(file)
        self._ended = file
        self._last = self._disk.submit(self._conclude, file, self._proofs.get(file))

    def look(self) -> None:
        """Raises what went wrong so far; waits for nothing."""
        for each in (self._last, *self._proofs.values()):
            if each is not None and each.done():
                each.result()

    def wait(self) -> None:
        """Wait for the last file that was ended. Raises what went wrong with it."""
        if self._ended is not None and self._last is not None:
            self._last.result()
            self._proofs.pop(self._ended, None)

    def _prove(self, file: OpenFile, until: Until | None = None) -> None:
        if file.output.check is not None:
            self._proofs[file] = self._checks.submit(file.output.check, file.shard.name, self.on_bytes, until)

    def _conclude(self, file: OpenFile, proof: Future[str] | None) -> None:
        output, name = file.output, file.shard.name
        file.writer.close()  # waits for the disk, while the bytes are read back
        if proof is not None:
            sha256 = proof.result()
        else:
            sha256 = sha256_of(output.folder / name, error=CheckpointError) if output.hashed else ""
        output.finish(name, sha256, file.kept, proven=proof is not None)


def _until(written: Written, offset: int) -> None:
    if not written.wait(offset):
        raise StoppedError
