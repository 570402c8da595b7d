"""Who is told how far work is."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lorafold
from lorafold.errors import InputError
from lorafold.files.progress import Bar, NotebookBar, Quiet, watched
from models import plain_adapter, plain_base


def test_a_function_is_told_of_every_byte_of_every_phase(tmp_path: Path) -> None:
    plain_base(tmp_path / "base", size=64)
    plain_adapter(tmp_path / "adapter", size=64)
    told: list[tuple[str, int, int]] = []
    options = {"progress": lambda *each: told.append(each)}
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", hash_tensors=True, **options)
    lorafold.verify(tmp_path / "out", tmp_path / "base", [tmp_path / "adapter"], **options)
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", base=tmp_path / "base", **options)
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["merge", "hash", "sync", "verify", "compare", "restore"]
    for phase in phases:
        found = [(done, total) for name, done, total in told if name == phase]
        assert found[0][0] == 0
        assert [done for done, _ in found] == sorted(done for done, _ in found)
        assert len({total for _, total in found}) == 1
        if phase in ("merge", "hash"):
            assert found[-1][0] == found[-1][1] > 0


def test_what_a_function_raises_ends_the_merge_and_nothing_is_left(tmp_path: Path) -> None:
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter")

    def stop(phase: str, done: int, total: int) -> None:
        if done:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()


def test_threads_are_counted_one_at_a_time() -> None:
    told: list[int] = []
    with watched(lambda phase, done, total: told.append(done)).phase("merge", 4000) as advance:
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert told == list(range(4001))


def test_a_bar_in_a_terminal_and_nothing_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with watched(True).phase("merge", 8) as advance:
        advance(8)
    assert terminal.getvalue() == ""
    assert isinstance(watched(True)._progress, Quiet)  # type: ignore[attr-defined]
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    assert isinstance(watched(True)._progress, Bar)  # type: ignore[attr-defined]
    with watched(True).phase("merge", 8) as advance:
        advance(8)
    assert "merge" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # as where Python has no console
    assert isinstance(watched(True)._progress, Quiet)  # type: ignore[attr-defined]


def test_a_bar_below_the_cell_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=shown.append)

    def display(picture: str, display_id: bool) -> Any:
        shown.append(picture)
        return handle

    module = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display, HTML=str))
    monkeypatch.setattr(NotebookBar, "every", 0)
    with watched(True).phase("<merge>", 8) as advance:
        advance(2)
    assert shown == [
        '<label>&lt;merge&gt; <progress max="8" value="0"></progress> 0%</label>',
        '<label>&lt;merge&gt; <progress max="8" value="0"></progress> 0%</label>',
        '<label>&lt;merge&gt; <progress max="8" value="2"></progress> 25%</label>',
        "",
    ]
    module.get_ipython = lambda: None  # IPython is there, but this is no notebook
    assert not isinstance(watched(True)._progress, NotebookBar)  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [7, "bar", 0, [], object()], ids=["int", "str", "zero", "list", "object"])
def test_nonsense_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="progress can be told nothing") as caught:
        watched(given)
    assert "True, False, or a function" in str(caught.value)
