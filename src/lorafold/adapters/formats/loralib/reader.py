"""loralib's state dicts: `<module>.lora_A`, `<module>.lora_B`, and biases that were trained; no alpha, no rank, no kind of layer.

The shapes tell most (loralib, `layers.py`): a Linear has A (r, in) and B (out, r), so has an Embedding, with (num_embeddings,
embedding_dim) for (in, out); a MergedLinear of n enabled blocks A (r · n, in) and B (n · block, r), a group for each block. A
convolution of kernel k has A (r · k, in · k) and B (out · k, r · k), and its update is their product in the weight's shape: that
looks like a Linear until the base is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ....errors import AdapterError, ShapeMismatchError, printable
from ....files.expression import Cut, Diagonal, Matrix, Reshaped, Zeros
from ....files.safetensors.info import Header, TensorInfo
from ....kernel.update import scaling_factor
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...source import Source
from ..single_file import check_floats, check_shape, gather

PATTERNS = ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.safetensors")

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Last names of linear layers that transformers stores (in, out); whatever else lies so is an embedding."""

_PARTS = {"lora_A": "lora_A", "lora_B": "lora_B", "bias": "bias"}


def is_loralib(source: Source) -> bool:
    """Whether one file holds pairs that end in `.lora_A` and `.lora_B`, and none that end as litgpt's do."""
    if source.file is None or source.find(*PATTERNS) is None:
        return False  # other files than adapters end so too
    names = source.header(source.file).tensors
    return any(each.endswith(".lora_A") for each in names) and not any(".attn.qkv.lora_" in each for each in names)


def load_loralib(source: Source) -> Adapter:
    """The adapter in the one file of `source`; `ReadOptions.lora_alpha` must be given.

    Raises `AdapterError` where a tensor is no part of a pair, or the shapes of a pair do not fit each other.
    """
    name = source.find(*PATTERNS)
    if name is None:
        raise AdapterError(f"{source.shown} holds no file of tensors, or several", hint="give the path of the file")
    header = source.header(name)
    if source.options.lora_alpha is None:
        raise AdapterError(
            f"{source.shown} is loralib's, whose files do not hold lora_alpha",
            hint="give the one that it was trained with: `ReadOptions(lora_alpha=16)` (loralib's default is 1);"
            " a file of a diffusion model is read by `ReadOptions(format='diffusers')`",
        )
    parts = gather(header, _PARTS, {})
    modules = {
        module: _module(module, held, float(source.options.lora_alpha), source.options.enable_lora, header)
        for module, held in parts.items()
        if held.keys() != {"bias"}
    }
    if not modules:
        raise AdapterError(f"{source.shown} holds biases, but no lora_A and lora_B")
    replacements, notes = _biases({module: held["bias"] for module, held in parts.items() if "bias" in held}, header)
    adapter = Adapter(
        name=source.name,
        path=source.path,
        format="loralib",
        modules=modules,
        replacements=replacements,
        header=header,
        sha256=source.sha256(name),
        config={"lora_alpha": source.options.lora_alpha, "enable_lora": source.options.enable_lora},
        notes=(*notes, *_blocks(modules, source), "loralib's files do not say which layers are convolutions: the base's shapes do"),
    )
    return replace(adapter, on_base=lambda base: _on_base(adapter, base))


def _module(
    name: str, parts: Mapping[str, TensorInfo], lora_alpha: float, enabled: tuple[bool, ...] | None, header: Header
) -> AdapterModule:
    shown = f"{printable(str(header.path))}: {printable(name)}"
    for have, lack in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if lack not in parts:
            raise AdapterError(f"{shown} has {have} but no {lack}", hint="the file is not complete; nothing was written")
    A, B = parts["lora_A"], parts["lora_B"]
    check_floats(parts, shown)
    fits = len(A.shape) == len(B.shape) == 2 and B.shape[1] > 0 and A.shape[0] > 0 and A.shape[0] % B.shape[1] == 0
    check_shape(B, f"(out, r), with r or a part of it the rows of lora_A {list(A.shape)}", fits, shown)
    r, groups = B.shape[1], A.shape[0] // B.shape[1]
    flags = enabled if enabled is not None and sum(enabled) == groups else (True,) * groups
    whole = groups if flags == (True,) * groups else len(flags)
    if groups > 1 and enabled is not None and sum(enabled) != groups:
        raise AdapterError(
            f"{shown} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, so {groups} blocks are enabled, not {sum(enabled)}"
        )
    check_shape(B, f"({groups} blocks of the same size, r)", B.shape[0] % groups == 0, shown)
    if groups == 1:
        lora_B: Matrix = B
        blocks = ""
    else:
        lora_B = _block_diagonal(B, flags, B.shape[0] // groups)
        blocks = f", {groups} of {whole} blocks"
    value = scaling_factor(r, lora_alpha)
    why = f"lora_alpha {lora_alpha:g} as given / r {r}{blocks}"
    return AdapterModule(name, A, lora_B, Scaling(value, r, lora_alpha, why))


def _check_ranks(modules: Mapping[str, AdapterModule], own: Adapter) -> None:
    """A pair that has lost columns of lora_B looks like that of a MergedLinear of a smaller rank: its blocks must be said then.

    - `modules`: as the base has them, so that those of convolutions have their own rank; `own`: as the file has them

    Raises `AdapterError` where modules of several blocks have another rank than the rest, and it was not said which are enabled.
    """
    ranks = Counter(module.scaling.r for module in modules.values())
    for name, module in modules.items():
        r, groups = module.scaling.r, own.modules[name].lora_A.shape[0] // own.modules[name].scaling.r
        if groups > 1 and own.config["enable_lora"] is None and len(ranks) > 1:
            raise AdapterError(
                f"{printable(str(own.path))}: {printable(name)} has r {r} and {groups} blocks, or another r than its own: the"
                f" file holds modules of {len(ranks)} ranks ({', '.join(str(rank) for rank in sorted(ranks))})",
                hint="say which blocks of a MergedLinear are enabled: `ReadOptions(enable_lora=(True, True, True))`",
            )


def _blocks(modules: Mapping[str, AdapterModule], source: Source) -> list[str]:
    """Which modules were taken to be of several blocks, all enabled, by nothing but their shapes; in words."""
    names = [name for name, module in modules.items() if module.lora_A.shape[0] > module.scaling.r]
    if not names or source.options.enable_lora is not None:
        return []
    each = ", ".join(f"{printable(name)} ({modules[name].lora_A.shape[0] // modules[name].scaling.r})" for name in names)
    return [f"taken to be MergedLinears, all of their blocks enabled, by their shapes: {each}"]


def _block_diagonal(B: TensorInfo, enabled: tuple[bool, ...], rows: int) -> Diagonal:
    """(all blocks, r · n): the rows of each enabled block beside the rows of lora_A that they go with, zeros elsewhere."""
    parts: list[Matrix] = []
    taken = 0
    for each in enabled:
        parts.append(Cut(B, 0, taken * rows, (taken + 1) * rows) if each else Zeros((rows, 0)))
        taken += each
    return Diagonal(tuple(parts))


def _biases(biases: Mapping[str, TensorInfo], header: Header) -> tuple[dict[str, TensorInfo], list[str]]:
    """The biases that were trained. Later versions of loralib name those of a convolution twice, over the same bytes."""
    found: dict[str, TensorInfo] = {}
    notes = []
    for module, info in biases.items():
        inner = biases.get(f"{module}.conv")
        if inner is not None and (inner.start, inner.stop) == (info.start, info.stop):
            notes.append(f"'{printable(info.name)}' is '{printable(inner.name)}' by another name")
            continue
        check_floats({"bias": info}, printable(str(header.path)))
        found[info.name] = info
    return found, notes


def _on_base(adapter: Adapter, base: Base) -> Adapter:
    modules = {name: _fitted(module, base, adapter) for name, module in adapter.modules.items()}
    _check_ranks(modules, adapter)
    replacements = {}
    for name, info in adapter.replacements.items():
        plain = name.replace(".conv.bias", ".bias")
        replacements[name if base.shape_of(name) is not None or base.shape_of(plain) is None else plain] = info
    turned = any(_last(name) in CONV1D and base.shape_of(m.tensor) == m.shape[::-1] for name, m in modules.items())
    return replace(
        adapter,
        modules=modules,
        replacements=replacements,
        notes=adapter.notes[:-1],
        fan_in_fan_out=adapter.fan_in_fan_out or turned,
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _fitted(module: AdapterModule, base: Base, adapter: Adapter) -> AdapterModule:
    """`module` as the base's weight has it: an embedding's transposed, a convolution's in the weight's shape."""
    own, conv = module.tensor, f"{module.name}.conv.weight"
    exact = [name for name in (own, conv) if name in base.shapes]
    tensor = next((name for name in (*exact, conv, own) if base.shape_of(name) is not None), own)
    shape = base.shape_of(tensor)
    module = replace(module, tensor=tensor)
    if shape is None or len(shape) < 2 or shape == module.shape:
        return module  # what does not fit is the resolver's to refuse
    if len(shape) == 2:
        out, inner = module.shape
        if shape == (inner, out):
            return module if _last(module.name) in CONV1D else replace(module, embedding=True)
        enabled = adapter.config["enable_lora"]
        if (
            enabled is not None
            and sum(enabled) == 1
            and shape == (out * len(enabled), inner)
            and isinstance(module.lora_B, TensorInfo)
        ):
            return replace(module, lora_B=_block_diagonal(module.lora_B, enabled, out))
        block = out * module.scaling.r // module.lora_A.shape[0]
        if shape[1] == inner and shape[0] > out and block and shape[0] % block == 0 and enabled is None:
            raise ShapeMismatchError(
                f"{printable(adapter.name)}: {printable(module.name)} has {out} rows, but {printable(tensor)} is {list(shape)}:"
                " some blocks of a MergedLinear may not be enabled",
                hint="say which are: `ReadOptions(enable_lora=(True, False, True))`",
            )
        return module
    return _convolution(module, shape, adapter)


def _convolution(module: AdapterModule, shape: tuple[int, ...], adapter: Adapter) -> AdapterModule:
    """The same update as (r · k², in, *kernel) and (out, r · k², 1, …), in which no row of the weight reads another's numbers.

    Row o · k + a of B @ A is the a-th piece of the weight's row o, of in · rest numbers: so A stands k times down a diagonal, and
    B's k rows of an output lie side by side.
    """
    A, B = module.lora_A, module.lora_B
    out, inner, kernel = shape[0], shape[1], shape[2:]
    k = kernel[0] if len(kernel) > 1 else 1
    rest = inner
    for size in kernel:
        rest *= size
    where = f"{printable(adapter.name)}: {printable(module.name)}"
    if A.shape[0] != B.shape[1] or B.shape[0] != out * k or A.shape[1] * k != rest or A.shape[0] % k:
        raise ShapeMismatchError(
            f"{where} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, but its convolution is {list(shape)}:"
            f" expected (r · {k}, {rest // k}) and ({out * k}, r · {k})",
            hint="nothing was written; a convolution in groups cannot be read from loralib's files",
        )
    r, width = A.shape[0] // k, A.shape[0]
    lora_A = A if k == 1 else Diagonal((A,) * k)
    lora_B = Reshaped(B, (out, k * width))
    alpha = module.scaling.lora_alpha
    why = f"lora_alpha {alpha:g} as given / r {r}, a convolution of kernel {k}"
    return replace(
        module,
        lora_A=Reshaped(lora_A, (k * width, inner, *kernel)),
        lora_B=Reshaped(lora_B, (out, k * width, *(1 for _ in kernel))),
        scaling=Scaling(scaling_factor(r, alpha), r, alpha, why),
    )
