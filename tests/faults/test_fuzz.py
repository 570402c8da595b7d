"""Damaged and hostile files: nothing comes out of a reader but what it promises or a typed error, and never after long.

The damage knows the structure: headers, indexes, configurations and receipts that are right but for a few places. With
LORAFOLD_FUZZ=100000 each test takes so many examples; without it, a few seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafold.adapters.load import load_adapter
from lorafold.api.merging import plan
from lorafold.checkpoints.open import open_checkpoint
from lorafold.checkpoints.receipt import read_receipt
from lorafold.errors import LorafoldError
from lorafold.files.atomic.journal import JOURNAL_NAME, read_journal
from lorafold.files.safetensors.header import read_header
from models import plain_adapter, plain_base

SECONDS = 5.0
MEMORY = 500_000_000
EXAMPLES = int(os.environ.get("LORAFOLD_FUZZ", "120"))

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=6), st.just([]), st.just({}),
    st.sampled_from(["NaN", "../x", "BF16", "F32", "\x1b[2J", "a" * 300, "(a+)+$", 1e308, 2**63, [0, 2**63], {"a": {"b": []}}]),
)  # fmt: skip


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where the time or the memory of what is inside passes the bounds."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def edited(value: Any, draw: Callable[[Any], Any]) -> Any:
    """`value` with one to three of its places changed, taken out, or put in twice."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place, depth = value, draw(st.integers(0, 3))
        for _ in range(depth):
            inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, dict | list) and v]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["odd", "gone", "other", "more"]))
        if what == "odd":
            place[key] = deepcopy(draw(ODD))
        elif what == "gone":
            del place[key]
        elif what == "other":
            place[key] = place[draw(st.sampled_from(keys))]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=8))] = deepcopy(draw(ODD))
        else:
            place.append(deepcopy(draw(ODD)))
    return value


def damaged(text: bytes, draw: Callable[[Any], Any]) -> bytes:
    """`text`, mostly as it is, else cut, or with some bytes put in place of others."""
    if draw(st.integers(0, 3)):
        return text
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 4)) :]


@st.composite
def safetensors_files(draw: Any) -> bytes:
    """A file that begins as a right one."""
    header: dict[str, Any] = {}
    position = 0
    for i in range(draw(st.integers(0, 3))):
        dtype, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8), ("BOOL", 1)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = width
        for dim in shape:
            size *= dim
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    if header and draw(st.integers(0, 4)):
        header = edited(header, draw)
    text = damaged(json.dumps(header).encode(), draw)
    text += b" " * draw(st.sampled_from([0, 0, -len(text) % 8]))
    length = (
        len(text)
        if draw(st.integers(0, 5))
        else draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]))
    )
    return struct.pack("<Q", max(0, length)) + text + bytes(max(0, position + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))))


def accepted_by_safetensors(file: Path) -> bool:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            opened.keys()
            opened.metadata()
    except Exception:
        return False
    return True


STRICTER = (
    "stands twice",  # two keys of one name: the reference takes the last
    "must have dtype, shape and data_offsets",  # fields that the format does not know
    "which is not a finite number",
    "half of a surrogate pair",
    "is not text",
    "more elements than can be addressed",  # sizes that overflow, where another is 0
    "begins with",  # white space before the brace
    "numbers from 0 to 2^63",
)
"""What we refuse and the reference accepts."""

WIDER = ("dtype",)
"""What we accept and the reference refuses: types that it does not know, whose bytes can be copied all the same."""


@fuzzed
@given(safetensors_files())
def test_headers_and_the_reference(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        file.write_bytes(data)
        error = None
        header = None
        with bounded():
            try:
                header = read_header(file)
            except LorafoldError as caught:
                error = str(caught)
        theirs = accepted_by_safetensors(file)
    if error is not None and theirs:
        assert any(each in error for each in STRICTER), error
    if header is not None and not theirs:
        from lorafold.files.safetensors.info import BITS

        assert any(info.dtype not in BITS for info in header.tensors.values()), header
    assert error is None or "\x1b" not in error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter and an output that are right."""
    from lorafold.api.merging import merge

    folder = tmp_path_factory.mktemp("fuzz")
    plain_base(folder / "base")
    plain_adapter(folder / "adapter")
    merge(folder / "base", [folder / "adapter"], folder / "out", undo=folder / "undo")
    return folder


def feed(file: Path, text: bytes, read: Callable[[], Any]) -> None:
    """Let `read` read `file` with `text` in it; the file is as it was after."""
    old = file.read_bytes()
    try:
        file.write_bytes(text)
        with bounded(), contextlib.suppress(LorafoldError):
            read()
    finally:
        file.write_bytes(old)


@fuzzed
@given(st.data())
def test_indexes(whole: Path, data: Any) -> None:
    file = whole / "base" / "model.safetensors.index.json"
    feed(
        file,
        damaged(json.dumps(edited(json.loads(file.read_text()), data.draw)).encode(), data.draw),
        lambda: open_checkpoint(whole / "base"),
    )


@fuzzed
@given(st.data())
def test_adapter_configurations(whole: Path, data: Any) -> None:
    file = whole / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text()) | {
        "rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"v_proj": 3}, "modules_to_save": None, "use_rslora": False
    }  # fmt: skip
    text = damaged(json.dumps(edited(fields, data.draw)).encode(), data.draw)
    feed(file, text, lambda: plan(whole / "base", [whole / "adapter"]))


@fuzzed
@given(st.data())
def test_names_of_an_adapter(whole: Path, data: Any) -> None:
    file = whole / "adapter" / "adapter_model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    words = "base_model model layers 0 1 q_proj lora_A lora_B weight default bias lora_embedding_A"
    parts = st.sampled_from([*words.split(), "", "\x1b"])
    names = list(header)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        pieces = name.split(".")
        pieces[data.draw(st.integers(0, len(pieces) - 1))] = data.draw(parts)
        header[".".join(pieces)] = header.pop(name)
    text = json.dumps(header).encode()
    new = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    feed(file, new, lambda: plan(whole / "base", [load_and_return(whole / "adapter")]))


def load_and_return(path: Path) -> Path:
    load_adapter(path)
    return path


@fuzzed
@given(st.data())
def test_configurations_of_a_base(whole: Path, data: Any) -> None:
    file = whole / "base" / "config.json"
    fields = {
        "model_type": "gpt2", "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"], "text_config": {"model_type": "x"},
        "_name_or_path": "a/b",
    }  # fmt: skip
    feed(file, json.dumps(edited(fields, data.draw)).encode(), lambda: plan(whole / "base", [whole / "adapter"]))


@fuzzed
@given(st.data())
def test_receipts(whole: Path, data: Any) -> None:
    from lorafold.api.verifying import verify

    file = whole / "out" / "lorafold.json"
    text = damaged(json.dumps(edited(json.loads(file.read_text()), data.draw)).encode(), data.draw)

    def read() -> None:
        read_receipt(whole / "out")
        verify(whole / "out")
        verify(whole / "out", whole / "base", [whole / "adapter"])

    feed(file, text, read)


@fuzzed
@given(st.data())
def test_undo_files(whole: Path, data: Any) -> None:
    """What comes out is the base or an error; nothing is left."""
    from lorafold.api.unmerging import unmerge

    file, again = whole / "undo", whole / "again"
    raw, forged = file.read_bytes(), False
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if data.draw(st.booleans()):
        text = json.dumps(edited(json.loads(header["__metadata__"]["lorafold_undo"]), data.draw))
        header["__metadata__"]["lorafold_undo"] = text
        forged = data.draw(st.booleans())
        if forged:
            header["__metadata__"]["lorafold_undo_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    elif data.draw(st.booleans()):
        header = edited(header, data.draw)
    else:
        at = data.draw(st.integers(0, len(body) - 1))
        body = body[:at] + data.draw(st.binary(min_size=1, max_size=8)) + body[at + 1 :]
    text = json.dumps(header).encode()

    def read() -> None:
        unmerge(whole / "out", again, undo=file)
        found, wanted = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (again, whole / "base"))
        weights = [name for name in wanted if name.endswith(".safetensors")]
        assert forged or found.keys() == wanted.keys()  # whoever hashes the list anew may leave out what stands beside the weights
        assert all(found[name] == wanted[name] for name in (weights if forged else wanted))

    try:
        feed(file, struct.pack("<Q", len(text)) + text + body, read)
    finally:
        shutil.rmtree(again, ignore_errors=True)


@fuzzed
@given(st.data())
def test_journals(whole: Path, data: Any) -> None:
    file = whole / JOURNAL_NAME
    lines = [{"dtype": None, "seed": 0}, {"name": "m", "sha256": "0" * 64, "proven": True, "kept": {"t": [0.5, 1.0]}}]
    file.write_bytes(b"".join(damaged(json.dumps(edited(line, data.draw)).encode(), data.draw) + b"\n" for line in lines))
    with bounded():
        read_journal(whole)
