"""examples/rl_weight_sync.py runs, and shows what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_weight_sync.py"


@pytest.mark.slow
def test_iter_merged_leaves_the_base_and_subtracting_does_not() -> None:
    done = subprocess.run([sys.executable, EXAMPLE, "--steps", "5"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    last = next(line for line in lines if line.split()[:1] == ["5"]).split()
    nearest, stochastic, changed_by_subtracting = float(last[3]), float(last[4]), last[5]
    assert stochastic < nearest / 2  # a sixth of it when this was written
    assert changed_by_subtracting != "0.0%"
    assert lines[-1] == "base weights changed under the trainer by iter_merged: 0.0%"
