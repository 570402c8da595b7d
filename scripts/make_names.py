"""Make `src/lorafold/planning/names/transformers.json` from the conversion mapping of the transformers that is installed.

    python scripts/make_names.py

`test_transformers_names` holds the file to it. What is kept of the mapping: plain renamings, prefixes that are added or taken off,
groups of renamings that count together, fused weights that are cut into equal parts, weights that are put one after the other. What
permutes or interleaves numbers is left out: names that need it are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[1] / "src" / "lorafold" / "planning" / "names" / "transformers.json"
CLASSES = PLACE.parents[1] / "ties.json"
"""The classes of each type of models: `scripts/make_ties.py` makes it."""


def table() -> dict[str, Any]:
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    renames = {}
    for name, transforms in _build_checkpoint_conversion_mapping().items():
        if name != "legacy" and (rules := [rule for each in transforms if (rule := _rule(each)) is not None]):
            renames[name] = rules
    bodies = {kind: name for kind, name in MODEL_MAPPING_NAMES.items() if isinstance(name, str) and name in renames}
    for kind, classes in json.loads(CLASSES.read_text())["types"].items():  # parts that no AutoModel makes
        own = [name for name in classes if name in renames]
        if kind not in MODEL_MAPPING_NAMES and kind not in renames and len(own) == 1:
            bodies[kind] = own[0]
    return {
        "bodies": dict(sorted(bodies.items())),
        "transformers": transformers.__version__,
        "model_types": sorted(CONFIG_MAPPING_NAMES),
        "renames": dict(sorted(renames.items())),
    }


def _rule(transform: Any) -> dict[str, Any] | None:
    from transformers.core_model_loading import Chunk, Concatenate, GroupWeightRename, PrefixChange, WeightConverter, WeightRenaming

    sources, targets = transform.source_patterns, transform.target_patterns
    if type(transform) in (WeightRenaming, PrefixChange) and len(sources) == len(targets) == 1:
        return {"old": [_pattern(sources[0])], "new": list(targets)}
    if type(transform) is GroupWeightRename:
        return {"old": [_pattern(each) for each in sources], "new": list(targets), "together": True}
    if type(transform) is WeightConverter and len(sources) == 1 and len(transform.operations) == 1:
        (operation,) = transform.operations
        if type(operation) is Chunk and operation.dim == 0 and getattr(operation, "num_shards_attribute", None) is None:
            return {"old": [_pattern(sources[0])], "new": list(targets), "parts": True}
    if type(transform) is WeightConverter and len(targets) == 1 and len(transform.operations) == 1:
        (operation,) = transform.operations
        if type(operation) is Concatenate and operation.dim == 0 and getattr(operation, "num_shards_attribute", None) is None:
            return {"old": [_pattern(each) for each in sources], "new": list(targets), "joined": True}
    return None


def _pattern(source: str) -> str:
    """As transformers compiles it (`core_model_loading.py`, `WeightTransform`)."""
    pattern = source.replace("*.", r".*\.")
    return pattern + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else "")


def text() -> str:
    made = table()
    lines = [f"    {json.dumps(name)}: {json.dumps(rules)}" for name, rules in made["renames"].items()]
    bodies = f'  "bodies": {json.dumps(made["bodies"])},\n'
    head = f'{{\n  "transformers": {json.dumps(made["transformers"])},\n  "model_types": {json.dumps(made["model_types"])},\n'
    return head + bodies + '  "renames": {\n' + ",\n".join(lines) + "\n  }\n}\n"


if __name__ == "__main__":
    PLACE.write_text(text())
