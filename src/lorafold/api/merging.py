"""`merge`, `merge_each` and `plan`: one base, adapters that are summed, or each for itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from ..adapters.read_options import ReadOptions
from ..declared import picked
from ..engine.report import MergeReport
from ..errors import PlanError, printable
from ..files.progress import Watching, watched
from ..options import MatchOptions, MergeArguments, PlanArguments, RunOptions, SumOptions
from ..planning.plan import MergePlan
from .components import check_inputs, open_base, planned
from .given import AdapterLike, loaded
from .pipelines.write_pipeline import write_outputs
from .verbs import takes, tells


@tells
@takes(SumOptions, MatchOptions)
def plan(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    *,
    read_options: ReadOptions | None = None,
    **options: Unpack[PlanArguments],
) -> MergePlan:
    """What `merge` with the same arguments would do: pure data, nothing written. Raises as `merge` does, but for the numbers.

    - `base`, `adapters`, `read_options`: as for `merge`
    - `**options`: as listed below

    >>> import lorafold
    >>> plan = lorafold.plan("base", [("adapter", 0.5)], dtype="float16")
    >>> plan.count("merge"), plan.count("cast"), plan.options.dtype
    (4, 2, 'F16')
    """
    found = open_base(Path(base), picked(MatchOptions, options))
    return planned(found, loaded(adapters, read_options), picked(SumOptions, options)).with_notes().joined()


@tells
@takes(SumOptions, MatchOptions, RunOptions)
def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    out: str | os.PathLike[str],
    *,
    read_options: ReadOptions | None = None,
    progress: Watching = None,
    **options: Unpack[MergeArguments],
) -> MergeReport:
    """Write `base` with `adapters` folded into its weights to the folder `out`, or of a base in GGUF to the file, and report.

    - `base`: a folder of .safetensors files with or without an index, a hub-cache snapshot, one file, a diffusers pipeline, or a
      .gguf file, whole or a part
    - `adapters`: paths, (path, weight), or (path, weight, `ReadOptions`); they are summed before the one rounding
    - `read_options`: what the files of the adapters cannot tell, for those that come without their own
    - `progress`: True draws a bar in a terminal or a notebook; a function is called with (phase, done, total), in bytes
    - `**options`: as listed below

    `out` appears by one rename when everything is written, on disk and, unless `verify` is False, proven; on any error nothing is
    there. Finished files of a merge that was stopped stay in a hidden folder beside `out`, and the same call goes on from there.
    Of a pipeline each component is merged that an adapter has something for, and all else is copied; `undo` is then a folder.

    Raises `InputError` of the kind that fits, `OutputError`, `VerificationError`; `TypeError` for an option that there is not.
    Warns with `LorafoldWarning` where less than 0.9 of the update survived the rounding, and where numbers were put to the dtype's
    largest.

    >>> import lorafold
    >>> report = lorafold.merge("base", [("adapter", 0.5)], "out")
    >>> report.proof.ok, report.kept_in_all > 0.9
    (True, True)
    """
    found, run = open_base(Path(base), picked(MatchOptions, options)), picked(RunOptions, options)
    one = planned(found, loaded(adapters, read_options), picked(SumOptions, options))
    check_inputs([one], run)
    return write_outputs([(one, Path(out))], run, watched(progress))[0]


@tells
@takes(SumOptions, MatchOptions, RunOptions)
def merge_each(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    folder: str | os.PathLike[str],
    *,
    read_options: ReadOptions | None = None,
    progress: Watching = None,
    **options: Unpack[MergeArguments],
) -> list[MergeReport]:
    """Write `base` with each of `adapters` alone folded into its weights, to a folder in `folder` that has the adapter's name.

    What `merge` would write one by one, in one reading of the base. No output appears before all are finished, and proven unless
    `verify` is False. Arguments are `merge`'s.

    - `**options`: as listed below

    Raises as `merge` does, and `PlanError` where two adapters have the same name, or an undo file is asked for.

    >>> import lorafold, pathlib
    >>> pathlib.Path("outs").mkdir()
    >>> [report.out for report in lorafold.merge_each("base", ["adapter"], "outs")]
    ['outs/adapter']
    """
    run, sums = picked(RunOptions, options), picked(SumOptions, options)
    if run.undo is not None:
        raise PlanError("an undo file is of one output, and each adapter has its own", hint="merge them one by one")
    found = open_base(Path(base), picked(MatchOptions, options))
    given = loaded(adapters, read_options)
    if not given:
        raise PlanError("there is no adapter to merge")
    ending = "" if found.pipeline is not None or found.checkpoint("").gguf is None else ".gguf"
    outs = _outs(Path(folder), [f"{each.weighted.adapter.name}{ending}" for each in given])
    several = [planned(found, [each], sums) for each in given]
    check_inputs(several, run)
    return write_outputs(list(zip(several, outs, strict=True)), run, watched(progress))


def _outs(folder: Path, names: Sequence[str]) -> list[Path]:
    """The output of each adapter."""
    if not folder.is_dir():
        raise PlanError(f"{printable(str(folder))} is not a folder", hint="it must be there: each adapter's output is put in it")
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        both = f"both would be written to {printable(str(folder / double))}"
        raise PlanError(f"two of the adapters are called {printable(double)}, and {both}", hint="rename the folder of one")
    return [folder / name for name in names]
