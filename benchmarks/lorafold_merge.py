"""lorafold's command line, with all that it imports imported before the clock starts.

python benchmarks/lorafold_merge.py merge BASE ADAPTER -o OUT
"""

import importlib
from contextlib import suppress

from measuring import wait_for_the_start

import lorafold
from lorafold.cli.app import loading
from lorafold.cli.main import command

LATE = ("pydantic", "rich.console", "rich.table", "rich.progress", "typer._adapters")
"""What typer imports when it reads the first argument, and rich when it prints."""

if __name__ == "__main__":
    with loading():
        for name in lorafold.__all__:
            getattr(lorafold, name)
        for name in LATE:
            with suppress(ImportError):
                importlib.import_module(name)
    wait_for_the_start()
    command()
