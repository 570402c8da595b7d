"""What goes on beside the writing: the proof, which follows it through each file, and the disk's own work.

The writing waits for it at one place alone: a file that has all its bytes is brought to the disk when the file before is on disk
and proven. The proof waits for bytes that are not written yet; so nothing that it waits for waits for it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from ..files.safetensors.coverage import WrittenBytes
from ..files.safetensors.reader import Until
from ..files.safetensors.writer import ShardWriter
from .outputs import OnBytes, Output


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
        self._proofs: dict[ShardWriter, Future[str]] = {}
        self._ended: ShardWriter | None = None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped = True
        for writer in self._proofs:
            writer.written.end()
        self._checks.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)

    def on_bytes(self, nbytes: int) -> None:
        """Told by a check of its bytes."""
        if self._stopped:
            raise StoppedError
        self._tell(nbytes)

    def begin(self, output: Output, writer: ShardWriter) -> None:
        """Let the proof of a file of `output` follow its `writer`."""
        if self._trailing:
            self._prove(output, writer, partial(_until, writer.written))

    def end(self, output: Output, writer: ShardWriter) -> None:
        """Bring the file of `writer`, which has all its bytes, to the disk, when the file before is done."""
        self.wait()
        if not self._trailing:
            self._prove(output, writer)
        self._ended = writer
        self._last = self._disk.submit(_conclude, output, writer, self._proofs.get(writer))

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

    def _prove(self, output: Output, writer: ShardWriter, until: Until | None = None) -> None:
        if output.verify:
            self._proofs[writer] = self._checks.submit(output.prove, writer.path.name, self.on_bytes, until)


def _conclude(output: Output, writer: ShardWriter, proof: Future[str] | None) -> None:
    name = writer.path.name
    writer.close()  # waits for the disk, while the bytes are read back
    output.finish(name, output.hash(name) if proof is None else proof.result(), proven=proof is not None)


def _until(written: WrittenBytes, offset: int) -> None:
    if not written.wait(offset):
        raise StoppedError
