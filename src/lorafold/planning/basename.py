"""Whether the base that was given is the one that an adapter names: by name, for that is all that an adapter says of it."""

from __future__ import annotations

from ..adapters.adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, printable


def base_note(adapter: Adapter, checkpoint: Checkpoint, *, strict: bool = False) -> str | None:
    """A note where `adapter` names another base than `checkpoint`; None where the names agree, or one of the two has none.

    Names agree where their last parts do: an adapter says ``org/name`` or a path on the machine where it was trained. A folder's
    name can agree, but says nothing where it does not.

    Raises `CheckpointError` with `strict`, unless the names are there and agree.
    """
    stated = (checkpoint.config or {}).get("_name_or_path")
    folder = checkpoint.root.resolve().name
    known = [name for name in (checkpoint.name, stated) if isinstance(name, str) and name and name != folder]
    if adapter.base_model is not None and _last(adapter.base_model) in {_last(name) for name in (*known, folder)}:
        return None
    wanted = "names no base model" if adapter.base_model is None else f"was trained on '{printable(adapter.base_model)}'"
    note = f"the adapter {printable(adapter.name)} {wanted}; the base is {printable((known or [folder])[0])}"
    if strict:
        raise CheckpointError(note, hint="nothing was written; give the adapter's own base, or leave out --strict-base")
    return note if known and adapter.base_model is not None else None


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
