"""Getting the base back from a merged checkpoint: bit for bit, or not at all."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..files.atomic.file_of_folder import staging
from ..files.progress import Progress, Watching, watched
from ..text import Readable, Summary, per_second, size
from .pipelines.unmerge import restore_pipeline
from .pipelines.verify import merged_parts
from .restoring import from_base, from_undo, nothing_to_restore, restorable
from .verbs import tells


@dataclass(frozen=True)
class UnmergeReport(Readable):
    """What was restored: the base of the checkpoint `merged` is in the folder `out` again, bit for bit.

    - `base`, `undo`: which of the two its numbers came from, the other being None
    - `nbytes`: of its tensors; `seconds`: from the call to the rename

    >>> import lorafold
    >>> _ = lorafold.merge("base", ["adapter"], "out")
    >>> report = lorafold.unmerge("out", "restored", base="base")
    >>> print(report)
    restored is the base of out, bit for bit
      from      base
      written   ...B, ... s, ...B/s
    >>> report.to_json()["bytes"] == report.nbytes
    True
    """

    out: str
    merged: str
    base: str | None
    undo: str | None
    nbytes: int
    seconds: float

    def summary(self) -> Summary:
        """What was restored, for people."""
        source = self.undo if self.base is None else self.base
        facts = [
            ("from", printable(str(source))),
            ("written", f"{size(self.nbytes)}, {self.seconds:.1f} s, {per_second(self.nbytes, self.seconds)}"),
        ]
        return Summary(f"{printable(self.out)} is the base of {printable(self.merged)}, bit for bit", facts)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "out": self.out,
            "merged": self.merged,
            "base": self.base,
            "undo": self.undo,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


@tells
def unmerge(
    out: str | os.PathLike[str],
    restored: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    undo: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Watching = None,
) -> UnmergeReport:
    """Write to the folder `restored` what the merged checkpoint `out` was made of, and report.

    - `base`: the numbers that merging changed are copied from there; it is held to the receipt of `out` by its headers, and to
      `out` by every tensor that merging did not change
    - `undo`: without the base, the file that ``merge(…, undo=FILE)`` wrote: it has the factors that were merged, what separates the
      base from the result of subtracting them, and a hash of every tensor, to which what comes out is held
    - `overwrite`: replace a checkpoint at `restored`
    - `progress`: as for `merge`

    Of a pipeline `base` is the base's folder, and `undo` the folder that the merge was given. With the latter, what merging did not
    change is copied from `out`, and there is no model card.

    The numbers are never computed by subtracting the update alone: that misses the base in about one element of ten, in every
    dtype, since the merged weight was rounded.

    Raises `InputError` without base and undo file, `CheckpointError` where `base` is another one, `VerificationError` where `out`
    or the undo file is damaged or they do not belong together, `OutputError`.

    >>> import lorafold, pathlib
    >>> _ = lorafold.merge("base", ["adapter"], "out", undo="undo.safetensors")
    >>> _ = lorafold.unmerge("out", "restored", undo="undo.safetensors")  # the base itself is not needed
    >>> file = "model-00001-of-00002.safetensors"
    >>> pathlib.Path("restored", file).read_bytes() == pathlib.Path("base", file).read_bytes()
    True
    """
    started = time.monotonic()
    nbytes = _restored(Path(out), Path(restored), base, undo, overwrite, watched(progress))
    given = [None if path is None else str(path) for path in (base, undo)]
    return UnmergeReport(str(restored), str(out), given[0], given[1], nbytes, time.monotonic() - started)


def _restored(
    out: Path,
    restored: Path,
    base: str | os.PathLike[str] | None,
    undo: str | os.PathLike[str] | None,
    overwrite: bool,
    progress: Progress,
) -> int:
    """`unmerge`; the bytes of the tensors that were written."""
    merged = merged_parts(out)
    if merged.receipt is None:
        restorable(out)
    elif merged.only_changed:
        raise nothing_to_restore(out)
    if base is not None and undo is not None:
        raise InputError("a base and an undo file were given; one of them is enough", hint="leave out `undo=FILE` or `base=BASE`")
    source = undo if base is None else base
    if source is None:
        raise InputError(
            f"the base cannot be restored from {printable(str(out))} alone: the merged weights were rounded, and subtracting the"
            " update again misses the base in about one element of ten",
            hint="give the base that it was merged into, `base=BASE`, or the undo file that was written then, `undo=FILE`",
        )
    given = Path(source)
    with staging(restored)(restored, overwrite=overwrite, inputs=[out, given]) as staged:
        if merged.receipt is not None:
            nbytes = restore_pipeline(merged, given, staged.path, progress, by_undo=base is None)
        elif base is None:
            nbytes = from_undo(out, given, staged.path, progress)
        else:
            nbytes = from_base(out, given, staged.path, progress, one_file=restored.suffix == ".gguf")
        staged.commit()
    return nbytes
