"""Entry, and the one place where errors become words and exit codes: 0 done, 1 failed, 2 usage, 3 verification failed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from types import FrameType
from typing import Any, NoReturn

import typer

from ..errors import LorafoldError, LorafoldWarning, OutputError, VerificationError, memory_shortage
from ..files.progress import LOG
from .app import app
from .flags import in_flags, meant_instead

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""The root of typer's own errors, which it took from click without giving it a public name."""


class _Notes(logging.Handler):
    """Prints what is to be known before a command has done its work."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it, in the words of the command line."""
        print(f"note: {in_flags(record.getMessage())}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not ignored, as under nohup
            signal.signal(number, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LorafoldWarning)  # the commands print what they warn of
            LOG.addHandler(_Notes(logging.WARNING))
            code = typer.main.get_command(app).main(arguments, prog_name="lorafold", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LorafoldError as error:
        _show(error, as_json="--json" in arguments)
        sys.exit(error.exit_code)
    except _UsageError as error:
        meant = meant_instead(getattr(error, "option_name", ""))
        if "--json" in arguments:
            said = {"type": "UsageError", "message": error.format_message(), "hint": meant, "notes": []}
            print(json.dumps({"error": said}, indent=2, ensure_ascii=False))
        else:
            error.show(sys.stderr)
            if meant is not None:
                print(f"\nhint: {meant}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt) as error:
        _show_interrupted(error.__cause__ or error, arguments)
        sys.exit(130)
    except _Terminated as error:
        _show_interrupted(error, arguments)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error, "outside of any one tensor")
        if shortage is None:
            raise
        _show(shortage, as_json="--json" in arguments)
        sys.exit(1)
    except OSError as error:  # where nobody could say which file it was about
        _show(OutputError(f"the system refused a call: {error}"), as_json="--json" in arguments)
        sys.exit(1)


def command() -> NoReturn:
    """`main` as a program of its own, which ends at once when all is said.

    To take an interpreter down that has torch in it costs a third of a second, and there is nothing left for it to do.
    """
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
        except ValueError:  # closed, as where nobody reads any more
            pass
    os._exit(code if isinstance(code, int) else 0)


class _Terminated(SystemExit):
    """A signal asked this process to end."""


def _show_interrupted(error: BaseException, arguments: list[str]) -> None:
    notes = getattr(error, "__notes__", ())
    print("interrupted; what was not finished has been removed", *notes, sep="\n", file=sys.stderr)
    if notes:
        print(f"\nhint: to go on, run again:\n  {shlex.join(['lorafold', *arguments])}", file=sys.stderr)


def _show(error: LorafoldError, *, as_json: bool) -> None:
    """Print the error; where nothing can be printed, as on a full disk that the output goes to, the exit code must do."""
    with contextlib.suppress(OSError):
        _print(error, as_json=as_json)


def _print(error: LorafoldError, *, as_json: bool) -> None:
    name, notes = type(error).__name__, [in_flags(note) for note in getattr(error, "__notes__", [])]
    if as_json:
        value: dict[str, Any] = {
            "error": {
                "type": name,
                "message": in_flags(error.message),
                "hint": error.hint and in_flags(error.hint),
                "notes": notes,
            }
        }
        if isinstance(error, VerificationError):
            value["error"]["failures"] = list(error.failures)
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        print(f"{name}: {in_flags(str(error))}", *notes, sep="\n", file=sys.stderr)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by an exception, so that what was begun is taken away."""
    raise _Terminated(128 + number)
