"""``lorafold convert``."""

from __future__ import annotations

import json
from pathlib import Path

from ..adapters.options import ReadOptions
from ..api.converting import convert as run_convert
from ..engine.words import plural, size
from ..errors import printable
from ..options import ConvertOptions
from .flags import Chosen
from .hints import in_flags


def convert(adapter: Path, out: Path, to: str, options: ReadOptions, *, base: Path | None, chosen: Chosen, as_json: bool) -> None:
    """Convert, and say what was done."""
    given = chosen.of(ConvertOptions)
    done = run_convert(adapter, out, to, base=base, read_options=options, **given)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    exactly = "rounded where its notes say so" if given.get("allow_rounding") else "the same update, bit for bit"
    print(f"{printable(str(out))} is {printable(str(adapter))} ({done.source}) in the format {done.target}: {exactly}")
    print(f"  holds     {plural(done.modules, 'module')}, {size(done.nbytes)}")
    for note in done.notes:
        print(f"  note      {in_flags(note)}")
