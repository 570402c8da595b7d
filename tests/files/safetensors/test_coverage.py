"""Coverage against a set of offsets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorafold.files.safetensors.coverage import Coverage


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=12))
def test_is_a_set_of_offsets(pieces: list[tuple[int, int]]) -> None:
    coverage, model = Coverage(), set[int]()
    for start, length in pieces:
        offsets = set(range(start, start + length))
        assert coverage.add(start, start + length) == (not offsets & model)
        if not offsets & model:
            model |= offsets
    assert {offset for low, high in coverage.intervals for offset in range(low, high)} == model
    assert coverage.intervals == sorted(coverage.intervals)
    assert all(one[1] < other[0] for one, other in zip(coverage.intervals, coverage.intervals[1:], strict=False))
    assert coverage.first_gap(3, 20) == min(set(range(3, 20)) - model, default=None)
