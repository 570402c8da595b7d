"""A diffusers pipeline on disk: a folder with `model_index.json` and a folder for each component, some of which hold weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VerificationError, printable
from ..files import strictjson
from .locate import resolve_entry
from .receipt import LARGEST

PIPELINE_INDEX = "model_index.json"
PIPELINE_RECEIPT = "lorafold-pipeline.json"
"""Beside it in a merged pipeline: the hashes of the components' receipts, and of the files that were copied."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".safetensors.index.json")
_MADE_ANEW = ("README.md", PIPELINE_RECEIPT)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of which only the list of components has been read.

    - `root`: its folder
    - `components`: the names of its components that have a folder, and of them `models` those that hold .safetensors files
    """

    root: Path
    components: tuple[str, ...]
    models: tuple[str, ...]


def is_pipeline(path: Path) -> bool:
    """Whether the folder `path` is a diffusers pipeline."""
    return os.path.lexists(path / PIPELINE_INDEX)


def open_pipeline(root: Path) -> Pipeline:
    """The pipeline in the folder `root`.

    Raises `CheckpointError` where its list of components is damaged, or names one by anything but a plain name.
    """
    path = root / PIPELINE_INDEX
    resolve_entry(root, PIPELINE_INDEX)
    listed = strictjson.load(path, error=CheckpointError)
    if not isinstance(listed, dict):
        raise CheckpointError(f"{printable(str(path))} must hold an object, not {type(listed).__name__}")
    components = []
    for name, entry in listed.items():
        if name.startswith("_") or not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
            continue  # its own fields, options of the pipeline, and components that it does without
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{printable(str(path))} names the component '{printable(name)}', which is no plain name")
        if (root / name).is_dir():
            components.append(name)
    models = [name for name in components if any(entry.endswith(".safetensors") for entry in os.listdir(root / name))]
    return Pipeline(root, tuple(components), tuple(models))


def files_apart(pipeline: Pipeline, changed: tuple[str, ...]) -> dict[str, Path]:
    """The files of the pipeline that belong to none of the components `changed`, by their path in it.

    At the top that is all but weights: some publishers put the whole model there once more, in one file, which would be the old
    one. Model card and receipt are made anew.

    Raises `CheckpointError` for a link that leaves the pipeline.
    """
    top = [name for name in sorted(os.listdir(pipeline.root)) if (pipeline.root / name).is_file()]
    names = [name for name in top if not name.startswith(".") and not name.endswith(_WEIGHTS) and name not in _MADE_ANEW]
    for component in pipeline.components:
        if component not in changed:
            names += [f"{component}/{name}" for name in _below(pipeline.root / component)]
    for name in names:
        resolve_entry(pipeline.root, name)
    return {name: pipeline.root / name for name in names}


def _below(folder: Path) -> Iterator[str]:
    """The files below `folder`, but for hidden ones, by their path in it; links to folders are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield str(Path(place, name).relative_to(folder))


def read_pipeline_receipt(out: Path) -> dict[str, Any]:
    """The receipt of the merged pipeline `out`: the hashes of its components' receipts and of the files that were copied.

    Raises `VerificationError` where there is none, or it is damaged.
    """
    path = out / PIPELINE_RECEIPT
    if not path.exists():
        raise VerificationError(
            f"{printable(str(out))} has no {PIPELINE_RECEIPT}: what was merged is not known", hint="was it made by lorafold merge?"
        )
    try:
        value = strictjson.load(path, error=CheckpointError, limit=LARGEST)
    except CheckpointError as error:
        raise VerificationError(error.message, hint="do not use it: merge again") from error
    for field in ("components", "files"):
        names = value.get(field) if isinstance(value, dict) else None
        good = isinstance(names, dict) and all(isinstance(sha256, str) for sha256 in names.values())
        if not good or any(".." in name.split("/") or name.startswith("/") or "\0" in name for name in names or ()):
            raise VerificationError(f"{printable(str(path))}: {field} must be an object of hashes by path", hint="merge again")
    return dict(value)
