"""``lorafold convert``."""

from __future__ import annotations

import json
from pathlib import Path

from ..api.converting import convert as run_convert
from ..engine.words import plural, size
from ..errors import printable
from .reading import Reading


def convert(
    adapter: Path, out: Path, to: str, *,
    base: Path | None, reading: Reading, allow_rounding: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert, and say what was done."""
    done = run_convert(
        adapter, out, to, base=base, allow_rounding=allow_rounding,
        overwrite=overwrite, read_options=reading.options(),
    )  # fmt: skip
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    exactly = "rounded where its notes say so" if allow_rounding else "the same update, bit for bit"
    print(f"{printable(str(out))} is {printable(str(adapter))} ({done.source}) in the format {done.target}: {exactly}")
    print(f"  holds     {plural(done.modules, 'module')}, {size(done.nbytes)}")
    for note in done.notes:
        print(f"  note      {note}")
