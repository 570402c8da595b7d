"""What the examples in docstrings find around them: a folder with ``base``, a checkpoint in two files, and ``adapter``, for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile(
    "untimed", deadline=None, derandomize=True
)  # how long an example takes says nothing on a machine that is shared
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _example_files(request: pytest.FixtureRequest) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem) or "lorafold." not in (request.node.dtest.docstring or ""):
        yield
        return
    from models import plain_adapter, plain_base

    here: Path = request.getfixturevalue("tmp_path")
    request.getfixturevalue("monkeypatch").chdir(here)
    plain_base(here / "base")
    plain_adapter(here / "adapter")
    with warnings.catch_warnings():
        yield
    logging.getLogger("lorafold").setLevel(logging.NOTSET)
