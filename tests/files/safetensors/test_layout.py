"""Layouts against the reference reader, and the order of tensors."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lorafold.errors import OutputError
from lorafold.files.safetensors.header import encode_header
from lorafold.files.safetensors.info import BITS, TensorSpec

_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.lists(
    st.tuples(_NAMES, st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 4), max_size=3).map(tuple)).filter(
        lambda spec: bits(spec) % 8 == 0
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


def bits(spec: tuple[str, str, tuple[int, ...]]) -> int:
    total = BITS[spec[1]]
    for dim in spec[2]:
        total *= dim
    return total


@given(SPECS, st.dictionaries(_NAMES, _NAMES, max_size=2))
@settings(max_examples=100, deadline=None)
def test_the_reference_reads_the_same_layout(specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    raw, infos = encode_header(specs, metadata)
    assert len(raw) % 8 == 0
    size = infos[-1].stop if infos else len(raw)
    data = raw + bytes(i % 251 for i in range(size - len(raw)))
    read = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)}
    assert read == {info.name: (info.dtype, info.shape, data[info.start : info.stop]) for info in infos}
    assert {(info.name, info.dtype, info.shape) for info in infos} == set(specs)
    assert all(one.stop == other.start for one, other in pairwise(infos))
    for info in infos:
        assert info.nbytes == 0 or info.start % max(BITS[info.dtype] // 8, 1) == 0  # every element where its width divides


@given(SPECS)
@settings(max_examples=50, deadline=None)
def test_laying_out_a_layout_changes_nothing(specs: list[tuple[str, str, tuple[int, ...]]]) -> None:
    raw, infos = encode_header(specs)
    assert encode_header([info.spec for info in infos]) == (raw, infos)


def test_the_order_given_is_kept_where_it_can_be() -> None:
    specs = [("z", "BF16", (3,)), ("a", "BF16", (5,)), ("m", "U8", (1,))]
    assert [info.name for info in encode_header(specs)[1]] == ["z", "a", "m"]
    assert [info.name for info in encode_header([*specs, ("f", "F32", (1,))])[1]] == ["f", "z", "a", "m"]


def test_transformers_remark_is_the_default(tmp_path: Path) -> None:
    raw, infos = encode_header([("a", "F32", (2,))])
    (tmp_path / "m.safetensors").write_bytes(raw + bytes(8))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("a").tolist() == [0.0, 0.0]
    assert "__metadata__" not in json.loads(encode_header([], {})[0][8:])
    assert infos[0].path == Path()


def test_row_35_an_unknown_type_needs_its_size() -> None:
    _, infos = encode_header([TensorSpec("a", "X17", (3,), 7)])
    assert infos[0].nbytes == 7
    with pytest.raises(OutputError, match="cannot hold the tensor 'a'"):
        encode_header([("a", "X17", (3,))])


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "'a': the name is taken"),
        ([("__metadata__", "F32", (1,))], "the name is taken"),
        ([("a", "F4", (1,))], "cannot hold the tensor 'a'"),
        ([TensorSpec("a", "F32", (2,), 4)], r"\[2\] of F32 in 4 bytes, expected 8"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(specs: list[TensorSpec], says: str) -> None:
    with pytest.raises(OutputError, match=says):
        encode_header(specs)
