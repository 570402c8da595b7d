"""From a path to an `Adapter`: which format it is in is decided from what is there, and said."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterError, CheckpointError, UnsupportedAdapterError, printable
from .adapter import Adapter
from .peft import WEIGHTS_NAME, load_peft
from .peftconfig import CONFIG_NAME


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter at `path`: a PEFT directory with `adapter_config.json` and `adapter_model.safetensors`.

    Only headers and configuration are read, and the bytes for their hash.

    Raises `AdapterError` where there is no adapter or its files contradict each other, `AdapterConfigError` for a field of its
    configuration, `UnsupportedAdapterError` for a kind that cannot be merged.
    """
    path = Path(path)
    shown = printable(str(path))
    if not path.exists():
        raise AdapterError(f"{shown} does not exist", hint=_beside(path))
    if not path.is_dir():
        raise AdapterError(f"{shown} is not a folder", hint=f"give the folder that holds {CONFIG_NAME}")
    has_config, has_weights = (path / CONFIG_NAME).exists(), (path / WEIGHTS_NAME).exists()
    if has_config and has_weights:
        try:
            return load_peft(path)
        except CheckpointError as error:  # of the file that holds its tensors
            raise AdapterError(error.message, hint=error.hint) from error
    if has_config and (path / "adapter_model.bin").exists():
        raise UnsupportedAdapterError(
            f"{shown} holds adapter_model.bin, a pickle, which may run code when it is loaded",
            hint=f"convert it to {WEIGHTS_NAME} where you trust it (PEFT: model.save_pretrained)",
        )
    if has_config or has_weights:
        raise AdapterError(
            f"{shown} has {CONFIG_NAME if has_config else WEIGHTS_NAME} but no {WEIGHTS_NAME if has_config else CONFIG_NAME}"
        )
    inner = sorted(entry.name for entry in path.iterdir() if (entry / CONFIG_NAME).is_file())
    if inner:
        raise AdapterError(f"{shown} holds no {CONFIG_NAME}", hint=f"there is one in {printable(str(path / inner[0]))}")
    if (path / "config.json").exists():
        raise AdapterError(
            f"{shown} holds no {CONFIG_NAME}; it looks like a base model", hint="the base model comes first, adapters after"
        )
    raise AdapterError(f"{shown} holds no {CONFIG_NAME}", hint=f"an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")


def _beside(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = os.listdir(path.parent)
    except OSError:
        return "check the path; adapters are read from disk, not from a hub"
    near = get_close_matches(path.name, names, n=1)
    return (
        f"did you mean {printable(str(path.parent / near[0]))}?"
        if near
        else "check the path; adapters are read from disk, not from a hub"
    )
