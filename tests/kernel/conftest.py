"""The tests of the kernel run twice, with torch alone and with the compiled kernel: the same bits are promised of both."""

import pytest

from lorafold.kernel import rounding
from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu import loader as compiled
from lorafold.kernel.cpu import multiplying, rescaling
from lorafold.kernel.undo import differences


@pytest.fixture(scope="module", params=["torch", "compiled"], autouse=True)
def path(request):
    """What does the work."""
    if request.param == "compiled" and compiled.build() is None:
        pytest.skip("no compiled kernel: there was no C compiler when lorafold was installed, or LORAFOLD_NATIVE is 0")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            use(patch, None)
        yield request.param


def use(patch, build):
    """Let `build` do the work; None: torch."""
    for module in (native, rounding, rescaling, multiplying, differences):
        patch.setattr(module, "build", lambda: build)
