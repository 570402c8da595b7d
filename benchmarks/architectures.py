"""Every architecture of transformers that builds from a tiny configuration, merged, against what PEFT computes unmerged.

    python benchmarks/architectures.py                  # all, in two processes; ten minutes for a hundred types
    python benchmarks/architectures.py llama t5 mamba   # these types

For each type of models: random weights in float64, with embedding and head tied wherever the class can tie them; an adapter of PEFT
on the embedding, on the head, on both, one saved whole, both saved whole, trained rows, rows beside LoRA on the head, and all
linear layers. The merged files are loaded twice, since a weight that a file lacks is drawn anew at each load; then the same
adapter is merged into the model itself, and taken out again.

The measure is the model of PEFT that was trained, not what PEFT loads from the adapter: it loses factors of embeddings that
transformers stores under other names (Unlimited-OCR), and of heads that it trained for their tie (Mamba, seen with 0.21.2).

PEFT leaves out the bias of a head whose embedding has trained rows (`TrainableTokensLayer`, seen with 0.21.2), which is an
oversight: here it computes with it.

What does not count: a type whose tiny model does not build or run here, an adapter that PEFT itself cannot make, and one
that changes nothing. In float64 a merged weight is off by one rounding, 2⁻⁵³ of its size; what is allowed beside that (1e-6 of the
largest output) is for norms, rotations, routers and softmax that transformers computes in float32 whatever the weights are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ALLOWED = 1e-6
SECONDS = 60
"""For one type of models."""
CASES = ("embedding", "head", "both", "saved", "both saved", "rows", "rows + head", "linear")
MEMORY = ", memory"
"""Said of a case whose adapter was merged into the model itself, with `merge_into`."""
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32,
    "embedding_size": 32, "intermediate_size": 40, "ffn_dim": 40, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "d_ff": 40,
    "hidden_dim": 40, "n_inner": 40, "dff": 40, "d_inner": 40, "d_kv": 8, "d_head": 8, "head_dim": 8, "global_head_dim": 8,
    "swa_head_dim": 8, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2, "depth": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "context_length": 64,
    "max_source_positions": 64, "max_target_positions": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4,
    "attention_window": 4, "sliding_window": 8, "image_size": 16, "patch_size": 8, "num_mel_bins": 8, "attention_hidden_size": 32,
    "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4,
    "projection_dim": 16, "out_hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_vocab_size": 64,
    "decoder_start_token_id": 1, "intra_bottleneck_size": 32, "true_hidden_size": 32, "bottleneck_size": 32,
}  # fmt: skip
OTHERS: tuple[dict[str, Any], ...] = ({}, {"num_key_value_heads": 4}, {"head_dim": None}, {"num_hidden_layers": 4})
"""What is tried in turn where a model does not build or run."""
MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "PRETRAINING",
)  # fmt: skip


def types() -> list[str]:
    """The types of models that have a class with a head over a vocabulary."""
    from transformers.models.auto import modeling_auto

    return sorted({name for each in MAPPINGS for name in getattr(modeling_auto, f"MODEL_FOR_{each}_MAPPING_NAMES")})


def class_of(name: str) -> Any:
    """The class of models of that type."""
    import transformers
    from transformers.models.auto import modeling_auto

    for each in MAPPINGS:
        found = getattr(modeling_auto, f"MODEL_FOR_{each}_MAPPING_NAMES").get(name)
        found = found if isinstance(found, str) or found is None else found[0]
        if found is not None and hasattr(transformers, found):
            return getattr(transformers, found)
    raise LookupError(name)


def shrunk(fields: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every size that has a known name made tiny, in its parts too."""
    sizes = SIZES | other
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            small[key] = shrunk(value, other)
        elif key in sizes and isinstance(value, int) and not isinstance(value, bool):
            small[key] = sizes[key] if key.endswith("_token_id") or sizes[key] is None else min(value, sizes[key])
        elif key in sizes and value is None and key in ("pad_token_id",):
            small[key] = value
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 48:
            small[key] = 48 + sum(map(ord, key)) % 16
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            small[key] = value[: sizes["num_hidden_layers"]]
        elif key == "mrope_section":
            small[key] = [1, 1, 2]
        else:
            small[key] = value
    return small


def built(name: str) -> tuple[Any, Any]:
    """A tiny random model of the type, tied where it can be, and what goes into it; raises where none builds and runs."""
    import torch

    kind, last = class_of(name), ""
    for other in OTHERS:
        try:
            config = kind.config_class.from_dict(shrunk(kind.config_class().to_dict(), other))
            for part in (config, *(p for p in vars(config).values() if hasattr(p, "to_diff_dict"))):
                if kind._tied_weights_keys and hasattr(part, "tie_word_embeddings"):
                    part.tie_word_embeddings = True
            torch.manual_seed(0)
            model = kind(config)
            if sum(parameter.numel() for parameter in model.parameters()) > 2e7:
                raise ValueError("not tiny")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
            model = plainly(model)
            for inputs in inputs_of(model):
                try:
                    found = outputs(model, inputs)
                except Exception as error:  # of any kind: other inputs are tried
                    last = f"{type(error).__name__}: {error}"
                    continue
                if found.isfinite().all() and found.numel():
                    return model, inputs
                last = "its outputs are not finite"
        except Exception as error:  # of any kind: other sizes are tried
            last = f"{type(error).__name__}: {error}"
    raise LookupError(last)


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that models take, one after the other."""
    import torch

    ids, decoder = torch.tensor([[3, 5, 9, 33, 12, 7, 21, 4]]), torch.tensor([[3, 4, 8, 40]])
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": decoder}
    yield {"input_features": torch.rand(1, 8, 128, dtype=torch.float64), "decoder_input_ids": decoder}
    yield {"input_values": torch.rand(1, 2000, dtype=torch.float64), "decoder_input_ids": decoder}
    yield {"input_ids": ids, "bbox": torch.zeros(1, 8, 4, dtype=torch.int64)}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plainly(model: Any) -> Any:
    """`model` in float64 and evaluating, with experts in a loop where it has any: the faster ways know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double().eval()


def outputs(model: Any, inputs: dict[str, Any]) -> Any:
    """The logits, or else the first tensor of numbers that comes out."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        found = model(**inputs)
    if getattr(found, "logits", None) is not None:
        return found.logits.double()
    return next(v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1).double()


def names_of(model: Any) -> tuple[str | None, str | None]:
    """The names of the modules that embed tokens and that give logits."""

    def name_of(get: Any) -> str | None:
        try:
            wanted = get()
        except Exception:  # a model without one may raise anything
            return None
        return next((name for name, module in model.named_modules() if module is wanted and hasattr(module, "weight")), None)

    return name_of(model.get_input_embeddings), name_of(model.get_output_embeddings)


def lora_of(case: str, embedding: str | None, head: str | None, body: str) -> dict[str, Any] | None:
    """What the adapter of a case trains; None where the model has no such module."""
    used: dict[str, list[str | None]] = {
        "embedding": [embedding],
        "saved": [embedding],
        "rows": [embedding],
        "head": [head],
        "linear": [],
    }
    ends = used.get(case, [embedding, head])
    if None in ends:
        return None
    rows = {"trainable_token_indices": {embedding: [3, 9, 21]}}
    trained: dict[str, dict[str, Any]] = {
        "saved": {"target_modules": [body], "modules_to_save": [embedding]},
        "both saved": {"target_modules": [body], "modules_to_save": [embedding, head]},
        "rows": {"target_modules": [body], **rows},
        "rows + head": {"target_modules": [head], **rows},
        "linear": {"target_modules": "all-linear"},
    }
    return trained.get(case, {"target_modules": ends})


def tried(case: str, base: Path, folder: Path, model: Any, inputs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(right | refused | wrong | not made, and why) of one case: of files, then of memory, if there is an adapter."""
    import peft
    import torch

    embedding, head = names_of(model)
    body = next(
        (n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n not in (embedding, head)), None
    )
    lora = None if body is None else lora_of(case, embedding, head, body)
    if lora is None:
        yield "not made", "no such module"
        return
    kind = type(model)
    try:
        before = outputs(model, inputs)
        wrapped = peft.get_peft_model(
            plainly(kind.from_pretrained(base, dtype=torch.float64)), peft.LoraConfig(r=2, lora_alpha=3, **lora)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for n, parameter in wrapped.named_parameters():
                if any(part in n for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        wrapped.save_pretrained(folder / "adapter")
        wanted = outputs(plainly(wrapped), inputs)
    except Exception as error:  # PEFT's or transformers' own, of any kind
        yield "not made", f"{type(error).__name__}: {str(error)[:150]}"
        return
    size = float(wanted.abs().max())
    if not torch.isfinite(wanted).all() or float((wanted - before).abs().max()) < 1e-4 * size:
        yield "not made", "the adapter changes nothing"
        return
    for merged in (from_files, in_memory):
        yield compared(merged(kind, base, folder, inputs), wanted, size)


def compared(found: Any, wanted: Any, size: float) -> tuple[str, str]:
    """(right | wrong, and by how much) of the outputs `found`; (refused, and why) where they are an error of lorafold's."""
    if isinstance(found, str):
        return "refused", found
    worst = max(float((each - wanted).abs().max()) / size for each in found)
    return ("right" if worst < ALLOWED else "wrong"), f"{worst:.2g}"


def from_files(kind: Any, base: Path, folder: Path, inputs: dict[str, Any]) -> list[Any] | str:
    """The outputs of the merged files, loaded twice; why they were refused."""
    import torch

    import lorafold

    try:
        lorafold.merge(base, [folder / "adapter"], folder / "out")
    except lorafold.LorafoldError as error:
        return " ".join(str(error).split()).replace(str(folder), "…")[:300]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(outputs(plainly(kind.from_pretrained(folder / "out", dtype=torch.float64)), inputs))
    return found


def in_memory(kind: Any, base: Path, folder: Path, inputs: dict[str, Any]) -> list[Any] | str:
    """The outputs of the base loaded and merged into; why that was refused. Raises where unmerging leaves other outputs."""
    import torch

    import lorafold

    model = plainly(kind.from_pretrained(base, dtype=torch.float64))
    before = outputs(model, inputs)
    try:
        merge = lorafold.merge_into(model, [folder / "adapter"])
    except lorafold.LorafoldError as error:
        return " ".join(str(error).split()).replace(str(folder), "…")[:300]
    found = [outputs(model, inputs)]
    merge.unmerge()
    if not torch.equal(outputs(model, inputs), before):
        raise ValueError("unmerging leaves other outputs")
    return found


def examined(name: str, cases: tuple[str, ...] = CASES) -> dict[str, tuple[str, str]]:
    """What came of each case of one type of models; of "build" alone where there is no model."""
    import torch

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, inputs = built(name)
            base = Path(scratch) / "base"
            model.save_pretrained(base)
            model = plainly(type(model).from_pretrained(base, dtype=torch.float64))
            outputs(model, inputs)
        except TimeoutError:
            raise
        except Exception as error:  # of any kind
            return {"build": ("not made", " ".join(str(error).split())[:150])}
        found: dict[str, tuple[str, str]] = {}
        idle = ("not made", "the adapter changes nothing")
        for case in cases:
            if found.get("head") == idle and case in ("both", "rows + head"):
                found[case] = ("not made", "the model does not call its head, so LoRA on it does nothing")
                continue
            folder = Path(scratch) / case.replace(" ", "")
            folder.mkdir()
            for where, outcome in zip(("", MEMORY), tried(case, base, folder, model, inputs), strict=False):
                found[case + where] = outcome
        return found


def mended() -> None:
    """Let PEFT compute a head that takes the trained rows of its embedding with its bias."""
    import torch
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    theirs = TrainableTokensLayer.forward_adapters

    def forward_adapters(self: Any, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        found = theirs(self, x, active_adapters, *args, **kwargs)
        bias = getattr(self.base_layer, "bias", None)
        apart = active_adapters and not self.disable_adapters and not self.merged and isinstance(self.base_layer, torch.nn.Linear)
        return found + bias if apart and bias is not None else found

    TrainableTokensLayer.forward_adapters = forward_adapters


def _timeout(*_: object) -> None:
    raise TimeoutError


def work(names: list[str], minutes: float) -> None:
    """Examine `names`, as many as begin within so many `minutes`, and print a line of JSON for each."""
    import torch
    import transformers

    mended()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _timeout)
    end = time.monotonic() + 60 * minutes
    for name in names:
        if time.monotonic() > end:
            return
        signal.alarm(SECONDS)
        try:
            found = examined(name)
        except TimeoutError:
            found = {"build": ("not made", f"more than {SECONDS} s")}
        except Exception as error:  # a merged model that does not load is one that is wrong
            found = {"load": ("wrong", f"{type(error).__name__}: {str(error)[:150]}")}
        signal.alarm(0)
        print(json.dumps([name, found]), flush=True)


def main() -> None:
    """Print each type that was not right throughout, and a table of how many were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types of models; by default all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="begin with no type after so long")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.types, given.minutes)
        return
    names = given.types or types()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    parts = [names[i :: given.processes] for i in range(given.processes)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", "--minutes", str(given.minutes), *part],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for part in parts if part
    ]  # fmt: skip
    table: Counter[tuple[str, str]] = Counter()
    seen: Counter[bool] = Counter()  # by whether the type builds and runs

    def read(process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            name, found = json.loads(line)
            seen["build" not in found] += 1
            for case, (outcome, why) in found.items():
                table[case, outcome] += 1
                if outcome in ("refused", "wrong") or case == "build":
                    print(f"{name:28} {case:20} {outcome:9} {why}", flush=True)

    readers = [threading.Thread(target=read, args=(process,)) for process in running]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    outcomes = ("right", "refused", "wrong", "not made")
    print(
        f"\n{seen[True]} of {seen.total()} types build and run; {len(names)} asked for\n\n{'':14}"
        + "".join(f"{each:>10}" for each in outcomes)
    )
    rows = [(where or "files", case + where) for where in ("", MEMORY) for case in CASES]
    for where in ("files", MEMORY):
        print(f"\n{where.removeprefix(', ')}")
        cases = [case for place, case in rows if place == where]
        for case in cases:
            print(f"{case.removesuffix(MEMORY):14}" + "".join(f"{table[case, each]:>10}" for each in outcomes))
        print(f"{'all':14}" + "".join(f"{sum(table[case, each] for case in cases):>10}" for each in outcomes))
    print(f"\n{table['load', 'wrong']} types whose merged model does not load or run")


if __name__ == "__main__":
    main()
