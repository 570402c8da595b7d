"""What stands beside the components that were merged: the rest of the pipeline, copied or linked, and the model card."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ...adapters.adapter import WeightedAdapter
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.pipeline import Pipeline
from ...checkpoints.receipt import RECEIPT_NAME
from ...engine.modelcard import base_license
from ...engine.unchanged_files import not_linked
from ...errors import CheckpointError, printable
from ...files.atomic.durable import copy_proven, link_file
from ...files.progress import Progress
from ...files.regular import sha256_of
from ...version import __version__


def link_weights(files: Mapping[str, Path], folder: Path) -> tuple[list[str], list[str]]:
    """Link those of `files` that hold weights into `folder`, by their path in it; which, and in words why not others."""
    linked: list[str] = []
    faults: dict[str, OSError] = {}
    for name in (name for name in files if name.endswith(".safetensors")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fault = link_file(files[name], folder / name)
        if fault is None:
            linked.append(name)
        else:
            faults[name] = fault
    return linked, not_linked(faults)


def copy_rest(files: Mapping[str, Path], folder: Path, linked: Collection[str], progress: Progress) -> dict[str, str]:
    """Copy `files` into `folder`, by their path in it, but for those that are `linked`; the sha256 of all."""
    hashes: dict[str, str] = {}
    with progress.phase("copy", sum(path.stat().st_size for path in files.values())) as advance:
        for name, source in files.items():
            target = folder / name
            hashes[name] = sha256_of(target, error=CheckpointError) if name in linked else copy_proven(source, target)
            advance(source.stat().st_size)
    return hashes


def pipeline_card(pipeline: Pipeline, adapters: Sequence[WeightedAdapter], changed: Sequence[str], command: str | None) -> str:
    """README.md of the merged pipeline, with the front matter that model hubs read."""
    name = Checkpoint(pipeline.root, (), {}, None, {}, False).name
    names = [printable(weighted.adapter.name).replace("`", "'") for weighted in adapters]
    head = [f"base_model: {json.dumps(name)}", "base_model_relation: merge", "library_name: diffusers"]
    head += [*base_license(pipeline.root), "tags:", "- lora", "- merged", "- lorafold"]
    parts = [
        f"`{adapter}`" + (f" at weight {w.adapter_weight:g}" if w.adapter_weight != 1 else "")
        for adapter, w in zip(names, adapters, strict=True)
    ]
    lines = [
        "---", *head, "---", "", f"# {' + '.join(names)}, merged", "",
        f"`{printable(name)}` with {' and '.join(parts)} folded into {', '.join(changed)} by lorafold {__version__}.",
        f"Every tensor, its scaling and how it was rounded are in `{RECEIPT_NAME}` in the folder of each.",
    ]  # fmt: skip
    if command is not None:
        lines += ["", "```sh", printable(command).replace("`", "'"), "```"]
    return "\n".join(lines) + "\n"
