"""What stands beside the weights: configuration, tokenizer and the rest of the base's files, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters.adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint
from ..files.atomic.durable import copy_file, write_json, write_text
from ..planning.plan import MergePlan
from .beside import files_beside
from .config import edited
from .modelcard import model_card


def write_beside(
    folder: Path, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter], *, command: str | None = None
) -> tuple[str, ...]:
    """Write everything but weights and receipt into `folder`; of an overlay the model card alone. Notes on what was decided.

    `command` is what made the checkpoint, for its model card.
    """
    write_text(folder / "README.md", model_card(plan, checkpoint, command))
    if plan.options.only_changed:
        return ()
    files, notes = files_beside(checkpoint, adapters)
    for name, source in files.items():
        copy_file(source, folder / name)
    if checkpoint.config is not None:
        write_json(folder / "config.json", edited(checkpoint.config, plan.config))
    return tuple(notes)
