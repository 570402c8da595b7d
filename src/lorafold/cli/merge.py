"""``lorafold merge`` and ``lorafold plan``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..api.merging import merge as run_merge
from ..api.merging import merge_each
from ..api.merging import plan as make_plan
from ..errors import InputError
from ..planning.json import plan_to_json
from .reading import Reading
from .startup import progress
from .terminal import show_plan, show_report


def merge(
    base: Path, adapters: list[tuple[str, float]], out: Path, *,
    dtype: str | None, overwrite: bool, verify: bool, each: bool, dry_run: bool, as_json: bool, reading: Reading, **options: Any,
) -> None:  # fmt: skip
    """Merge, and print what came of it."""
    if each and (dry_run or options["undo"] is not None or options["expect_sha256"] or options["verify_input"]):
        raise InputError(
            "--each goes with none of --dry-run, --undo, --expect-sha256 and --verify-input", hint="merge them one by one"
        )
    if dry_run:
        options = {
            name: value
            for name, value in options.items()
            if name not in ("expect_sha256", "verify_input", "restart", "max_memory", "threads", "undo", "hash_tensors", "link")
        }
        plan(base, adapters, dtype=dtype, everything=False, as_json=as_json, reading=reading, **options)
        return
    done: dict[str, Any] = {
        "dtype": dtype, "overwrite": overwrite, "verify": verify, "progress": progress(),
        "command": shlex.join(["lorafold", *sys.argv[1:]]), "read_options": reading.options(), **options,
    }  # fmt: skip
    if each:
        for name in ("undo", "expect_sha256", "verify_input"):
            del done[name]
        reports = merge_each(base, adapters, out, **done)
        if as_json:
            print(json.dumps([report.to_json() for report in reports], indent=2))
        else:
            for report in reports:
                show_report(report)
        return
    report = run_merge(base, adapters, out, **done)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report)


def plan(
    base: Path, adapters: list[tuple[str, float]], *,
    dtype: str | None, everything: bool, as_json: bool, reading: Reading, **options: Any,
) -> None:  # fmt: skip
    """Print what a merge would do."""
    merge_plan = make_plan(base, adapters, dtype=dtype, read_options=reading.options(), **options)
    if as_json:
        print(json.dumps(plan_to_json(merge_plan), indent=2))
    else:
        show_plan(merge_plan, everything=everything)
