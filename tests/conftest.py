"""What several test files share and is made once for all test processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo worked in, `.demo`, with what it printed in `printed` beside it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"  # the parent of a worker's is this run's
    root.mkdir(exist_ok=True)
    with FileLock(root / "lock"):
        if not (root / "printed").exists():
            done = subprocess.run([sys.executable, EXAMPLES / "demo.py"], cwd=root, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (root / "printed").write_text(done.stdout)
    return root / ".demo"
