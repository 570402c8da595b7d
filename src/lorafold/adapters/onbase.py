"""What an adapter's files leave to the base that it is put on: the order of rows, the kernel of a convolution.

Some formats store no more than their own loader needs, which has the model at hand. Their readers say what they know, and leave
behind what is to be done once a base is there. Nothing of the base but its configuration and its shapes is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import AdapterError, printable
from .adapter import Adapter


@dataclass(frozen=True)
class Base:
    """Of a base model: the fields of its `config.json`, and the shapes of its tensors by name."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def model_type(self) -> str:
        """The family, transformers' word for it; empty where the configuration has none."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    def heads(self, adapter: Adapter) -> tuple[int, int]:
        """How many heads the queries have, and how many the keys.

        Raises `AdapterError` where the configuration does not say.
        """
        text = self.config.get("text_config")
        config = text if isinstance(text, Mapping) else self.config
        queries = config.get("num_attention_heads")
        keys = config.get("num_key_value_heads", queries)
        for heads in (queries, keys):
            if type(heads) is not int or heads <= 0:
                raise AdapterError(
                    f"{printable(str(adapter.path))} has the rows of queries and keys in another order than the base, and the"
                    " base's config.json does not say how many heads they are: num_attention_heads, num_key_value_heads",
                    hint="nothing was written; put the config.json of the base model beside its weights",
                )
        return int(str(queries)), int(str(keys))

    def shape_of(self, tensor: str) -> tuple[int, ...] | None:
        """The shape of `tensor`, or of what ends in that name; None where nothing does, or it has several shapes."""
        if tensor in self.shapes:
            return self.shapes[tensor]
        found = {shape for name, shape in self.shapes.items() if name.endswith(f".{tensor}")}
        return found.pop() if len(found) == 1 else None


def on_base(adapter: Adapter, base: Base) -> Adapter:
    """`adapter` as it is on `base`: itself, where its files leave nothing open.

    Raises `AdapterError` where the base does not tell what is needed.
    """
    if adapter.on_base is None:
        return adapter
    return replace(adapter.on_base(base), name=adapter.name, format=adapter.format, on_base=None)
