"""The fields of config.json that a merge changes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any


def edited(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the fields at the dotted paths of `changes` set.

    >>> edited({"text_config": {"vocab_size": 8}}, {"text_config.vocab_size": 9, "dtype": "float32"})
    {'text_config': {'vocab_size': 9}, 'dtype': 'float32'}
    """
    result: dict[str, Any] = deepcopy(dict(config))
    for path, value in changes.items():
        *above, field = path.split(".")
        place = result
        for name in above:
            place = place.setdefault(name, {})
        place[field] = value
    return result
