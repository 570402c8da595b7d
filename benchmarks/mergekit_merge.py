"""mergekit's way from a base and an adapter to merged files: `mergekit-yaml` with BASE+ADAPTER, its cache beside the output.

    python benchmarks/mergekit_merge.py BASE ADAPTER OUT

mergekit merges the adapter with PEFT into a model in its cache first, then copies that, tensor by tensor. The clock starts when
all is imported.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from measuring import wait_for_the_start
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main(base: str, adapter: str, out: str) -> None:
    cache = Path(f"{out}-cache")
    config = {"models": [{"model": f"{base}+{adapter}"}], "merge_method": "passthrough", "dtype": "bfloat16"}
    options = MergeOptions(lora_merge_cache=str(cache), copy_tokenizer=False, out_shard_size=500_000_000)
    run_merge(MergeConfiguration.model_validate(config), out, options)
    shutil.rmtree(cache)


if __name__ == "__main__":
    wait_for_the_start()
    main(*sys.argv[1:])
