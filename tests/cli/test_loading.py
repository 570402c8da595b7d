"""What importing within `loading` changes is put back."""

from __future__ import annotations

import gc
import sys

import pytest

from lorafold.cli.app import loading


def test_what_it_changes_is_put_back() -> None:
    before = gc.isenabled(), sys.getswitchinterval()
    with loading():
        assert not gc.isenabled()
    assert (gc.isenabled(), sys.getswitchinterval()) == before
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert (gc.isenabled(), sys.getswitchinterval()) == before
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
