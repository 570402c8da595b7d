"""LoRA on bare parameters (PEFT's target_parameters): which parameter each wrapper is for, and the factors of each expert.

The names of the tensors do not say which parameter they belong to. PEFT puts a wrapper around the module for each of its
parameters, in the order in which the module registered them, the first one innermost. So the configuration tells the names, the
base their shapes; the order of those that have the same shape is known only for the modules in the table here.

A parameter of E experts has lora_A (E · r, in) and lora_B (out, r · E). A holds one expert after the other. B holds, for each
number of the rank, all experts: of expert e the columns e, e + E, e + 2E, … (PEFT, `tuners/lora/layer.py: ParamWrapper`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Cut, Matrix, Reshaped
from ....files.safetensors.info import TensorInfo
from ...adapter import AdapterModule, Base
from ...read_options import ExpertLayout
from ..single_file import Parts, check_floats
from .config import PeftConfig
from .names import Endings, is_or_ends, wrappers_of

REGISTERED: Sequence[tuple[str, ...]] = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w2", "w3"),
    ("w1", "v1", "w2"),
    ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("weight", "bias"),
)
"""Parameters in the order in which modules of transformers and torch register them."""


def split_parameters(
    modules: Mapping[str, Parts], config: PeftConfig, base: Base | None
) -> tuple[dict[str, Parts], dict[str, tuple[tuple[str, Parts], ...]]]:
    """The modules that are no wrappers of parameters; and the wrappers around each module, innermost first, with their paths.

    Raises `AdapterError` where a wrapper is missing between others.
    """
    depths: dict[str, dict[int, tuple[str, Parts]]] = {}
    for path, parts in modules.items():
        inner, depth = wrappers_of(path)
        depths.setdefault(inner, {})[depth] = (path, parts)
    plain: dict[str, Parts] = {}
    wrapped: dict[str, tuple[tuple[str, Parts], ...]] = {}
    for module, by_depth in depths.items():
        if set(by_depth) == {0} and not _candidates(module, config, base):
            plain[module] = by_depth[0][1]
            continue
        lost = [depth for depth in range(max(by_depth)) if depth not in by_depth]
        if lost:
            path = module + ".base_layer" * lost[0]
            raise AdapterError(
                f"{printable(module)} has {max(by_depth) + 1} adapters inside each other, but nothing of {printable(path)}",
                hint="tensors were lost; nothing was written",
            )
        wrapped[module] = tuple(by_depth[depth] for depth in sorted(by_depth, reverse=True))
    return plain, wrapped


def parameters_of(
    module: str,
    wrappers: Sequence[tuple[str, Parts]],
    config: PeftConfig,
    layout: ExpertLayout | None,
    base: Base | None,
    weights: Path,
) -> list[AdapterModule]:
    """The updates of the parameters of `module`, one for each matrix: of a parameter of E experts there are E.

    - `wrappers`: innermost first; `base`: where it is there already

    Raises `AdapterError` where the configuration names other parameters than there are, or they do not fit the base.
    """
    shown = f"{printable(str(weights))}: {printable(module)}"
    for path, parts in wrappers:
        odd = parts.keys() ^ {"lora_A", "lora_B"}
        if odd:
            raise AdapterError(f"{shown}: {printable(path)} has {', '.join(sorted(parts))}, expected lora_A and lora_B")
        check_floats(parts, shown)
        A, B = parts["lora_A"].shape, parts["lora_B"].shape
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise AdapterError(f"{shown}: lora_A must be (E · r, in) and lora_B (out, r · E), found {list(A)} and {list(B)}")
    found = []
    for name, (_, parts) in zip(_names(module, wrappers, config, base, shown), wrappers, strict=True):
        full = f"{module}.{name}"
        found += _matrices(full, parts["lora_A"], parts["lora_B"], config, layout, _shape(full, base), shown)
    return found


def is_stacked(parts: Parts) -> bool:
    """Whether the factors of a pair stand in stacks, one for each expert: lora_A (E, r, in) and lora_B (E, out, r).

    Those of a convolution of one dimension are (r, in, k) and (out, r, 1).
    """
    if parts.keys() != {"lora_A", "lora_B"}:
        return False
    A, B = parts["lora_A"].shape, parts["lora_B"].shape
    return len(A) == len(B) == 3 and A[0] == B[0] and A[1] == B[2] and not (A[0] == B[1] and B[2] == 1)


def stacked(name: str, parts: Parts, config: PeftConfig, weights: Path) -> list[AdapterModule]:
    """The update of each expert of the stack `name`, whose factors stand in stacks too (see `is_stacked`)."""
    A, B = parts["lora_A"], parts["lora_B"]
    check_floats(parts, f"{printable(str(weights))}: {printable(name)}")
    (experts, r, inner), out = A.shape, B.shape[1]
    scaling = config.scaling(name, r)
    _check_init(config, False, name, printable(str(weights)))
    return [
        AdapterModule(
            f"{name}[{e}]",
            Reshaped(Cut(A, 0, e, e + 1), (r, inner)),
            Reshaped(Cut(B, 0, e, e + 1), (out, r)),
            scaling,
            tensor=name,
            index=e,
        )
        for e in range(experts)
    ]


def check_all_there(found: Sequence[str], config: PeftConfig, base: Base, weights: Path) -> list[str]:
    """A note on those of target_parameters that the base has nothing of, if there are any.

    Raises `AdapterError` where one of them is of none of the parameters `found`, though the base has such.
    """
    held = Endings(found)
    absent = [entry for entry in config.target_parameters if not held.any_ends(entry)]
    held_so = Endings(name.rpartition(".")[0] for name in found if name.rpartition(".")[2] in _GATE_UP)  # fused, or each alone
    there = Endings(
        name
        for name in base.shapes
        if absent and not (name.rpartition(".")[2] in _GATE_UP and held_so.any_is_end_of(name.rpartition(".")[0]))
    )
    lost = [entry for entry in absent if there.any_ends(entry)]
    if lost:
        raise AdapterError(
            f"{printable(str(weights))} holds nothing for {len(lost)} of the {len(config.target_parameters)} target_parameters: "
            + ", ".join(printable(entry) for entry in lost),
            hint="tensors were lost, or the configuration is not of this file; nothing was written",
        )
    nowhere = ", ".join(printable(entry) for entry in absent)
    return [f"target_parameters names {nowhere}, which the base has no parameter for"] if nowhere else []


_GATE_UP = ("gate_up_proj", "gate_proj", "up_proj")


def _candidates(module: str, config: PeftConfig, base: Base | None) -> list[str]:
    """The parameters of `module` that the configuration may mean."""
    names = []
    for entry in config.target_parameters:
        path, _, parameter = entry.rpartition(".")
        if path and not is_or_ends(module, path):
            continue
        if not path and base is None and _is_targeted(module, config):
            continue
        if base is not None and not path and base.shape_of(f"{module}.{parameter}") is None:
            continue
        names.append(parameter)
    return list(dict.fromkeys(names))


def _is_targeted(module: str, config: PeftConfig) -> bool:
    targets = config.target_modules
    return not isinstance(targets, str) and any(is_or_ends(module, target) for target in targets)


def _names(
    module: str, wrappers: Sequence[tuple[str, Parts]], config: PeftConfig, base: Base | None, shown: str
) -> tuple[str, ...]:
    """The parameter of each of `wrappers`."""
    names = _candidates(module, config, base)
    if base is not None and len(names) > len(wrappers):
        names = [name for name in names if base.shape_of(f"{module}.{name}") is not None]
    elif base is None and len(names) > len(wrappers):  # a bare name may be of any module: those that name this one count first
        entries = [entry for entry in config.target_parameters if "." in entry]
        names = [name for name in names if any(is_or_ends(f"{module}.{name}", entry) for entry in entries)]
    if len(names) != len(wrappers):
        raise AdapterError(
            f"{shown} has adapters for {len(wrappers)} parameters, but target_parameters names {len(names)} of it"
            + (f": {', '.join(printable(name) for name in names)}" if names else ""),
            hint="tensors were lost, or the configuration is not of this file; nothing was written",
        )
    order = next((known for known in REGISTERED if set(names) <= set(known)), None)
    if order is not None:
        names.sort(key=order.index)
    if base is None or len(names) == 1:
        return tuple(names)
    shapes = {name: _shape(f"{module}.{name}", base) for name in names}
    fitting = [
        each
        for each in permutations(names)
        if all(_fits(parts, shapes[name]) for name, (_, parts) in zip(each, wrappers, strict=True))
    ]
    if order is not None and (tuple(names) in fitting or not fitting):
        return tuple(names)  # what does not fit is for the resolver to say
    if len(fitting) != 1:
        raise UnsupportedAdapterError(
            f"{shown} has adapters for {', '.join(printable(name) for name in names)}, and which one is whose cannot be told: the"
            f" order in which the model registers them is not known, and {len(fitting)} orders fit their shapes",
            hint="nothing was written",
        )
    return fitting[0]


def _shape(tensor: str, base: Base | None) -> tuple[int, ...] | None:
    return None if base is None else base.shape_of(tensor)


def _fits(parts: Parts, shape: tuple[int, ...] | None) -> bool:
    """Whether the factors are for a parameter of `shape`, whichever way round it is stored; unknown shapes fit."""
    if shape is None:
        return True
    (rows, inner), out = parts["lora_A"].shape, parts["lora_B"].shape[0]
    if len(shape) == 3:
        return (out, inner) in (shape[1:], shape[:0:-1]) and rows % shape[0] == 0
    return (out, inner) == shape


def _matrices(
    name: str,
    lora_A: TensorInfo,
    lora_B: TensorInfo,
    config: PeftConfig,
    layout: ExpertLayout | None,
    shape: tuple[int, ...] | None,
    shown: str,
) -> list[AdapterModule]:
    """The update of each matrix of the parameter `name`, of which `shape` is known only from a base that holds it."""
    rows = lora_A.shape[0]
    experts = shape[0] if shape is not None and len(shape) == 3 else 1 if shape is not None else _experts(name, rows, config)
    if experts == 0 or rows % experts:
        raise AdapterConfigError(
            f"{shown}: lora_A of {printable(name)} has {rows} rows, which is no multiple of {experts} experts",
            hint="the configuration and the tensors are not of one training run",
        )
    r = rows // experts
    scaling = config.scaling(name, r)
    if not (experts > 1 if shape is None else len(shape) == 3):
        residual = config.residual(scaling) if name.endswith(".weight") else None
        _check_init(config, residual is not None, name, shown)
        return [AdapterModule(name, lora_A, lora_B, scaling, tensor=name, residual=residual)]
    _check_init(config, False, name, shown)
    modules = []
    for e in range(experts):
        A: Matrix = Cut(lora_A, 0, e * r, (e + 1) * r)
        B: Matrix = Cut(lora_B, 1, e * r, (e + 1) * r) if layout == "expert-major" else Cut(lora_B, 1, e, rows, experts)
        modules.append(AdapterModule(f"{name}[{e}]", A, B, scaling, tensor=name, index=e))
    return modules


def _experts(name: str, rows: int, config: PeftConfig) -> int:
    """How many experts there must be, by the rank that is configured; 1 where that does not go into the rows."""
    r = config.rank(name)
    return rows // r if rows % r == 0 else 1


def _check_init(config: PeftConfig, plain: bool, name: str, shown: str) -> None:
    if config.init is not None and not plain:
        raise UnsupportedAdapterError(
            f"{shown}: {printable(name)} is a bare parameter, out of which PEFT takes nothing before training;"
            f" yet init_lora_weights is {printable(str(config.fields.get('init_lora_weights')))}",
            hint="nothing was written",
        )
