"""What an error of the system says of the bytes needed and free."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lorafold.files.atomic.checks import free_bytes, output_fault


def test_free_bytes_of_a_path_that_is_not_yet_there(tmp_path: Path) -> None:
    found = free_bytes(tmp_path / "a" / "b")
    assert found is not None
    assert found > 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_row_44_names_the_file_the_cause_and_the_bytes(tmp_path: Path, number: int) -> None:
    error = output_fault(OSError(number, "it says"), tmp_path / "m\x1b.x", 12345)
    assert "m\\x1b.x cannot be written: it says; needed 12345 bytes, free " in str(error)
    assert error.hint
