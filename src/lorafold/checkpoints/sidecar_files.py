"""The files that make weights a model: which of them go with a merged checkpoint, and which stay behind.

What goes: configuration, tokenizer, chat template, processors, licence and notice, and the modules of a sentence-transformers
model, each a folder, with the weights that they have. What stays, each with its reason: other weight formats, indexes of files that
are not copied, code, the state of a training run; and the model card, which is written anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError, printable
from ..files import strictjson
from .checkpoint import Checkpoint
from .locate import resolve_entry
from .quantised import FILES

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "chat_template*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
    "video_processor_config.json",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*config.json",
    "router_config.json",
    *FILES,
)
"""Names that are copied, in lower case: LICENSE and License.txt are both written."""

_FOLDERS = ("additional_chat_templates",)

_REASONS = {
    "code, which is never copied": ("*.py", "*.pyc", "*.sh", "*.ipynb"),
    "the state of a training run": (
        "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "training_args.bin", "scaler.pt", "*.distcp",
    ),
    "weights that are not of this checkpoint, and would be the old ones": (
        "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.index.json",
    ),
    "what another program was at work on": ("*.lock", "*.tmp", "*.incomplete"),
    "hidden": (".*",),
}  # fmt: skip
"""Why a file stays behind, by its name."""

_MADE_ANEW = ("README.md", "lorafold.json")
MODULES = "modules.json"
"""The list of the modules of a sentence-transformers model, each with its folder."""


def sidecar_paths(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files to copy beside merged weights, as paths below the checkpoint's folder, in the order of their names.

    A single file without a config.json beside it has none. Links that leave the folder are not followed.

    Raises `CheckpointError` where a list of modules is damaged, or names a folder that is not in the checkpoint's.
    """
    root = checkpoint.root
    if checkpoint.single_file and checkpoint.config is None:
        return ()
    found = [entry for entry in sorted(os.listdir(root)) if _goes_along(entry)]
    for folder in _FOLDERS:
        if (root / folder).is_dir():
            found += [f"{folder}/{entry}" for entry in sorted(os.listdir(root / folder)) if _why_left(entry) is None]
    for folder in _modules(root):
        found += [entry for entry in _below(root, folder) if _why_left(entry.rpartition("/")[2], weights=True) is None]
    return tuple(root / entry for entry in dict.fromkeys(found) if _is_own_file(root, entry))


def left_behind(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The files and folders of the checkpoint's folder that are not copied, as paths in it, by the reason."""
    root = checkpoint.root
    if checkpoint.live or checkpoint.single_file or not root.is_dir():
        return {}
    copied = {path.relative_to(root).as_posix() for path in sidecar_paths(checkpoint)}
    ours = copied | {shard.name for shard in checkpoint.shards} | {checkpoint.index_name, *_MADE_ANEW, "config.json"}
    folders = {*_FOLDERS, *_modules(root)}
    entries = sorted(os.listdir(root)) + [entry for folder in sorted(folders) for entry in _below(root, folder)]
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry in ours or entry in folders or any(folder.startswith(f"{entry}/") for folder in folders):
            continue
        inside = "/" in entry
        why = _why_left(entry.rpartition("/")[2], weights=inside and not entry.startswith(_FOLDERS))
        if (root / entry).is_symlink() and not _is_own_file(root, entry):
            why = "a link that leaves the folder, or leads nowhere"
        elif (root / entry).is_dir():
            why, entry = why or "a folder that is no known part of a model", f"{entry}/"
        reasons.setdefault(why or "not known to be a part of a model", []).append(entry)
    return reasons


def _modules(root: Path) -> tuple[str, ...]:
    """The folders of the modules of a sentence-transformers model; empty for any other.

    Raises `CheckpointError` where the list is damaged, or a path in it leads out of `root`.
    """
    if not _is_own_file(root, MODULES):
        return ()
    shown = printable(str(root / MODULES))
    listed = strictjson.load(root / MODULES, error=CheckpointError)
    if not isinstance(listed, list) or not all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in listed):
        if isinstance(listed, list) and any(isinstance(each, dict) and "type" in each for each in listed):
            raise CheckpointError(f"{shown} must list modules, each an object with a path", hint="nothing was written")
        return ()  # another program's file of that name
    folders = []
    for path in (each["path"].rstrip("/") for each in listed):
        if path in ("", "."):
            continue  # the model itself
        if not is_plain_path(path):
            raise CheckpointError(
                f"{shown} names the folder '{printable(path)}', which is no path in the checkpoint's folder",
                hint="nothing was written",
            )
        folders.append(path)
    return tuple(dict.fromkeys(folders))


def is_plain_path(path: str) -> bool:
    """Whether `path` leads into a folder, on every system: not absolute, not up, no drive, no control character.

    >>> [is_plain_path(path) for path in ("1_Pooling", "a/2_Dense", "../x", "/x", "C:x", "a//b")]
    [True, True, False, False, False, False]
    """
    return not re.search(r"[\\:\x00-\x1f\x7f]", path) and not any(part in ("", ".", "..") for part in path.split("/"))


def _below(root: Path, folder: str) -> Iterator[str]:
    """The files below `folder` of `root`, by their path in `root`; links to folders are not followed."""
    for place, inner, files in os.walk(root / folder):
        inner.sort()
        for name in sorted((*files, *(each for each in inner if Path(place, each).is_symlink()))):
            yield Path(place, name).relative_to(root).as_posix()


def _goes_along(name: str) -> bool:
    return _why_left(name) is None and any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)


def _why_left(name: str, *, weights: bool = False) -> str | None:
    """Why the file `name` stays whatever it is for; None where nothing speaks against it. `weights`: those are wanted."""
    for why, patterns in _REASONS.items():
        if not (weights and why.startswith("weights")) and any(fnmatchcase(name.lower(), pattern) for pattern in patterns):
            return why
    return None


def _is_own_file(root: Path, entry: str) -> bool:
    try:
        return resolve_entry(root, entry).is_file()
    except CheckpointError:
        return False


def files_beside_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """By name what makes up `checkpoint` beside its weights: index, what goes along with them, its model card and its receipt.

    Raises `CheckpointError` where one is a link that leaves the folder.
    """
    for path in sidecar_paths(checkpoint):
        yield str(path.relative_to(checkpoint.root)), path
    if checkpoint.single_file:
        return
    index = [checkpoint.index_name] if checkpoint.indexed else []
    for name in (*index, *_MADE_ANEW):
        if (checkpoint.root / name).exists():
            resolve_entry(checkpoint.root, name)
            yield name, checkpoint.root / name
