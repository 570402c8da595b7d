"""Sidecars, the files beside the weights: which there are and where each comes from, written into an output, and proven.

The model card and the receipt are other files' affair (`modelcard`, `make_receipt`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.locate import resolve_entry
from ..checkpoints.sidecar_files import left_behind, sidecar_paths
from ..errors import CheckpointError, printable
from ..files import strictjson
from ..files.atomic.durable import copy_file, write_json
from ..files.regular import open_regular
from ..planning.output_files import metadata_of, needs_index
from ..planning.plan import MergePlan
from .claims import added_files, not_part
from .file_heads import file_head
from .sources import Sources


def edited(config: Mapping[str, Any], changes: Mapping[str, Any], dropped: Sequence[str] = ()) -> dict[str, Any]:
    """`config` with the fields at the dotted paths of `changes` set, and without those at the paths `dropped`.

    >>> edited({"text_config": {"vocab_size": 8}, "x": 1}, {"text_config.vocab_size": 9, "dtype": "float32"}, ["x"])
    {'text_config': {'vocab_size': 9}, 'dtype': 'float32'}
    """
    result: dict[str, Any] = deepcopy(dict(config))
    for path, value in changes.items():
        *above, field = path.split(".")
        place = result
        for name in above:
            place = place.setdefault(name, {})
        place[field] = value
    for path in dropped:
        *above, field = path.split(".")
        place = result
        for name in above:
            place = place[name]
        place.pop(field, None)
    return result


_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "additional_chat_templates/*",
)  # fmt: skip


def files_beside(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], dropped: Sequence[str] = ()
) -> tuple[dict[str, Path], list[str]]:
    """The source of each file that is copied, by its name in the output, and notes on what was decided.

    `dropped`: those that a plan leaves out.

    config.json, the model card, the index and the receipt are not copied but made.

    Raises `CheckpointError` where a tokenizer's file is a link that leaves the adapter's folder.
    """
    tokenizer, notes = _tokenizer_files(adapters)
    names = {str(path.relative_to(checkpoint.root)): path for path in sidecar_paths(checkpoint)}
    made = {"config.json", *dropped}
    names = {name: path for name, path in names.items() if name not in made and not (tokenizer and _is_tokenizer(name))}
    notes += [f"left behind in the base, {why}: {_few(entries)}" for why, entries in left_behind(checkpoint).items()]
    return names | tokenizer, notes


def _few(names: Sequence[str]) -> str:
    """All of a few `names`, else the first of them."""
    shown = ", ".join(printable(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _tokenizer_files(adapters: Sequence[Adapter]) -> tuple[dict[str, Path], list[str]]:
    """The tokenizer files of the first adapter that brings its own: they win, all together, over the base's."""
    for adapter in adapters:
        if not adapter.path.is_dir():
            continue  # one file, beside which anything may lie
        names = sorted(name for name in os.listdir(adapter.path) if _is_tokenizer(name) and (adapter.path / name).is_file())
        if "tokenizer_config.json" in names or "tokenizer.json" in names:
            files = {name: resolve_entry(adapter.path, name) for name in names}
            return files, [f"the tokenizer is that of the adapter {printable(adapter.name)}, not the base's"]
    return {}, []


def _is_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)


def write_beside(folder: Path, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """Write everything but weights, receipt and model card into `folder`; of an overlay nothing. Notes on what was decided."""
    if plan.options.only_changed or checkpoint.gguf is not None:
        return ()
    files, notes = files_beside(checkpoint, adapters, plan.files_dropped)
    for name, source in files.items():
        copy_file(source, folder / name)
    if checkpoint.config is not None and _config_is_kept(plan):
        copy_file(resolve_entry(checkpoint.root, "config.json"), folder / "config.json")
    elif checkpoint.config is not None:
        write_json(folder / "config.json", edited(checkpoint.config, plan.config, plan.dropped))
    return tuple(notes)


def _config_is_kept(plan: MergePlan) -> bool:
    """Whether config.json stays to the last byte: of a quantised base whose encoding stays, engines read it in their own ways."""
    return plan.options.output_format == "same" and not plan.config and not plan.dropped


def own_files(sources: Sources) -> set[str]:
    """The names of all files that the output of the plan of `sources` has, but for model card and receipt."""
    plan, base = sources.plan, sources.checkpoint
    names = {shard.name for shard in plan.shards} | ({base.index_name} if needs_index(plan, base) else set())
    if plan.options.only_changed or base.gguf is not None:
        return names
    return (
        names
        | files_beside(base, sources.adapters, plan.files_dropped)[0].keys()
        | ({"config.json"} if base.config is not None else set())
    )


def beside_failures(output: Checkpoint, sources: Sources) -> list[str]:
    """What is wrong around the weights of `output`, in words.

    Raises `CheckpointError` where a file of the base or of an adapter cannot be read.
    """
    return [
        *_metadata_failures(output, sources), *_index_failures(output, sources), *_added(output, sources),
        *_config_failures(output, sources), *_copy_failures(output, sources),
    ]  # fmt: skip


def _metadata_failures(output: Checkpoint, sources: Sources) -> list[str]:
    """Where the header of a file is not, to the last byte, what the plan makes it: its metadata first, then all of it."""
    plan, base = sources.plan, sources.checkpoint
    planned = {shard.name: shard for shard in plan.shards}
    failures = []
    for shard in output.shards:
        if shard.name not in planned:
            continue  # its tensors are where they should not be
        found = dict(shard.header.metadata)
        expected = found if base.gguf is not None else metadata_of(planned[shard.name], base, plan.options.max_shard_size).kept
        if found != expected:
            differ = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
            failures.append(f"{printable(shard.name)} has other metadata than expected: {_remarks(differ, found, expected)}")
        elif hashlib.sha256(file_head(planned[shard.name], plan, base).raw).hexdigest() != shard.header.sha256:
            same = "" if base.gguf is not None else ", its metadata being the same"
            failures.append(f"{printable(shard.name)} has another header than expected{same}")
    return failures


def _remarks(names: Sequence[str], found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first of the metadata `names`, as they are and as they should be."""

    def short(text: str | None) -> str:
        return "nothing" if text is None else repr(text if len(text) <= 60 else f"{text[:50]}…")

    words = [f"{printable(name)[:60]} is {short(found.get(name))}, expected {short(expected.get(name))}" for name in names[:3]]
    return "; ".join(words) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _index_failures(output: Checkpoint, sources: Sources) -> list[str]:
    if not output.indexed:
        needed = sources.checkpoint.indexed and [shard.name for shard in output.shards] != [f"{output.stem}.safetensors"]
        return [f"{output.index_name} is missing"] if needed and not output.single_file else []
    expected = {"total_size": output.nbytes}
    if strictjson.canonical(output.index_metadata) == strictjson.canonical(expected):
        return []
    return [f"{output.index_name} has the metadata {str(dict(output.index_metadata))[:200]!r}, expected {expected!r}"]


def _added(output: Checkpoint, sources: Sources) -> list[str]:
    if output.single_file:
        return []
    made = {"config.json", *(shard.name for shard in output.shards)}  # of which others say more
    return not_part(added_files(output.root, own_files(sources) | made)[0])


def _config_failures(output: Checkpoint, sources: Sources) -> list[str]:
    base = sources.checkpoint.config
    absent = base is None or sources.plan.options.only_changed
    expected: dict[str, Any] | None = None if absent else edited(base or {}, sources.plan.config, sources.plan.dropped)
    if expected is None or output.config is None:
        return [] if expected is output.config else [f"config.json {'should not be there' if expected is None else 'is missing'}"]
    fields = sorted(
        name
        for name in expected | output.config
        if name not in expected
        or name not in output.config
        or strictjson.canonical(expected[name]) != strictjson.canonical(output.config[name])
    )
    return [f"config.json differs from what it must be in {', '.join(printable(name) for name in fields)}"] if fields else []


def _copy_failures(output: Checkpoint, sources: Sources) -> list[str]:
    plan = sources.plan
    absent = output.single_file or plan.options.only_changed
    files, _ = ({}, []) if absent else files_beside(sources.checkpoint, sources.adapters, plan.files_dropped)
    return [failure for name, source in files.items() if (failure := _difference(name, output.root / name, source)) is not None]


def _difference(name: str, found: Path, source: Path) -> str | None:
    name = printable(name)
    with open(open_regular(source, error=CheckpointError)[0], "rb") as right:
        try:
            fd, _ = open_regular(found, error=CheckpointError)
        except CheckpointError:
            return f"{name} is missing"
        with open(fd, "rb") as left:
            same = all(one == other for one, other in iter(lambda: (left.read(1 << 20), right.read(1 << 20)), (b"", b"")))
    return None if same else f"{name} differs from {printable(str(source))}"
