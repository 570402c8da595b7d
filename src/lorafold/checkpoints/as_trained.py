"""A checkpoint of floats as training saw it that loaded it in four or eight bits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .checkpoint import Checkpoint
from .conv1d import stored_transposed
from .encodings.on_the_fly import on_the_fly


def as_trained(checkpoint: Checkpoint, names: Collection[str], kind: str, loaded: str) -> Checkpoint:
    """`checkpoint` with the weights `names`, which it stores as floats, as they were once they were quantised as `kind`.

    - `kind`: a key of `on_the_fly.WORDS`; `loaded`: safetensors' name of the type that the model was loaded in
    """
    stored = checkpoint.stored
    encoded = {
        name: on_the_fly(stored[name], kind, loaded, transposed=stored_transposed(name, checkpoint.model_types) is not None)
        for name in checkpoint.tensors
        if name in names
    }
    tensors = {name: encoded[name].decoded if name in encoded else matrix for name, matrix in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, encoded=encoded)
