"""Whether the base that was given is the one that an adapter names: by name, for that is all that an adapter says of it."""

from __future__ import annotations

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, printable


def base_note(adapter: Adapter, checkpoint: Checkpoint, *, strict: bool = False) -> str | None:
    """A note where `adapter` names another base than `checkpoint`; None where the names agree, or the adapter names none.

    Names agree where their last parts do: an adapter says ``org/name`` or a path on the machine where it was trained.

    Raises `CheckpointError` instead of a note with `strict`, and where the adapter names none.
    """
    stated = (checkpoint.config or {}).get("_name_or_path")
    known = [name for name in (checkpoint.name, checkpoint.root.resolve().name, stated) if isinstance(name, str) and name]
    if adapter.base_model is not None and _last(adapter.base_model) in {_last(name) for name in known}:
        return None
    wanted = "names no base model" if adapter.base_model is None else f"was trained on '{printable(adapter.base_model)}'"
    note = f"the adapter {printable(adapter.name)} {wanted}; the base is {printable(checkpoint.name)}"
    if strict:
        raise CheckpointError(note, hint="nothing was written; give the adapter's own base, or leave out --strict-base")
    return None if adapter.base_model is None else note


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
