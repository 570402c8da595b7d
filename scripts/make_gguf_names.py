"""Make `src/lorafold/planning/names/gguf.json` from the tables of names of the gguf package that is installed.

    python scripts/make_gguf_names.py

`test_gguf_names` holds the file to it. It has, of the architectures whose order of rows is known (`gguf_names.ORDERS`), what
llama.cpp calls their tensors, and what other programs call the modules of each.
"""

from __future__ import annotations

import json
from typing import Any

from lorafold.planning.names.gguf_names import ORDERS, TABLE


def table() -> dict[str, Any]:
    import importlib.metadata

    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    used = {tensor for name in ORDERS for tensor in MODEL_TENSORS[numbers[name]]}
    cfg = {**TensorNameMap.mappings_cfg, **TensorNameMap.block_mappings_cfg}
    known = {TENSOR_NAMES[tensor]: list(dict.fromkeys(names)) for tensor, names in cfg.items() if tensor in used}
    return {
        "gguf": importlib.metadata.version("gguf"),
        "tensors": known,
        "architectures": {
            name: [TENSOR_NAMES[tensor] for tensor in cfg if tensor in MODEL_TENSORS[numbers[name]]] for name in sorted(ORDERS)
        },
    }


def text() -> str:
    """The text of the file."""
    found = table()
    lines = [f'    "{name}": {json.dumps(names)}' for name, names in found["tensors"].items()]
    rows = [f'    "{name}": {json.dumps(names)}' for name, names in found["architectures"].items()]
    parts = ",\n".join(lines), ",\n".join(rows)
    return f'{{\n  "gguf": "{found["gguf"]}",\n  "tensors": {{\n{parts[0]}\n  }},\n  "architectures": {{\n{parts[1]}\n  }}\n}}\n'


if __name__ == "__main__":
    TABLE.write_text(text())
