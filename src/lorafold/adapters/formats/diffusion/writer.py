"""The single files of diffusion models: kohya's and diffusers'. Names begin with the part of the pipeline that a module is of."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from ....errors import AmbiguousNameError, InputError, printable
from ...convert.request import Update, WriteRequest, WrittenAdapter, refuse, refuse_parts, safetensors_bytes
from ..peft.writer import peft_fields, peft_tensors, peft_updates
from .diffusers import METADATA_KEY
from .kohya import ALPHA_IS, AS_STORED
from .names import component_of, folders_of, underscored, within

_KOHYA = {
    "unet": "lora_unet", "prior": "lora_prior",
    "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
}  # fmt: skip
"""What kohya calls a folder of the pipeline. Where there are several text encoders, the first is lora_te1.

A transformer is not here: kohya has the names of its makers, which are not those of diffusers; with these it is a lora_unet too.
"""


def write_kohya(request: WriteRequest) -> WrittenAdapter:
    """One file of `lora_down`, `lora_up` and `alpha`, a module's dots as underscores.

    Raises `InputError` where it is not said of which part a module is, `AmbiguousNameError` where two modules would have one name.
    """
    refuse(request, "kohya")
    refuse_parts(request, "kohya", "magnitude", "lora_bias", "embedding")
    updates, notes = peft_updates(request, zero=False)
    tensors: dict[str, Tensor] = {}
    several = any(_folder(update, request) in ("text_encoder_2", "text_encoder_3") for update in updates)
    names: dict[str, str] = {}
    for update in updates:
        name = _kohya_name(update, request, several)
        if name in names:
            raise AmbiguousNameError(f"{printable(names[name])} and {printable(update.name)} would both be {printable(name)}")
        names[name] = update.name
        tensors |= {f"{name}.lora_down.weight": update.lora_A, f"{name}.lora_up.weight": update.lora_B}
        tensors[f"{name}.alpha"] = _scalar(update)
    _check_base(names, request)
    return WrittenAdapter({"": safetensors_bytes(tensors, {ALPHA_IS: AS_STORED})}, tuple(notes))


def write_diffusers(request: WriteRequest) -> WrittenAdapter:
    """One file in PEFT's endings, a module's name after the folder of the pipeline, with PEFT's configuration in the metadata.

    Raises `InputError` where it is not said of which part a module is.
    """
    refuse(request, "diffusers")
    refuse_parts(request, "diffusers", "embedding")
    updates, notes = peft_updates(request)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[Update]] = {}
    for update in updates:
        if underscored(update.name):
            raise InputError(
                f"{request.shown}: {printable(update.name)} is spelled with underscores, and what it was is not known",
                hint="give the base that has the module: `base=BASE`",
            )
        folder, name = _folder(update, request), _within(update.name, request)
        parts.setdefault(folder, []).append(update)
        tensors |= {f"{folder}.{name}.{part}": tensor for part, tensor in peft_tensors(update).items()}
    fields: dict[str, object] = {}
    for folder, held in parts.items():
        inside = [replace(update, name=_within(update.name, request)) for update in held]
        fields |= {f"{folder}.{name}": value for name, value in peft_fields(inside).items()}
    return WrittenAdapter({"": safetensors_bytes(tensors, {METADATA_KEY: json.dumps(fields, sort_keys=True)})}, tuple(notes))


def _folder(update: Update, request: WriteRequest) -> str:
    """The folder of the pipeline that the module of `update` is in."""
    component = component_of(update.name) if request.of_pipeline else ""
    if not component and request.component is None:
        raise InputError(
            f"{request.shown}: of which part of a pipeline {printable(update.name)} is, is not said",
            hint="say it: `ReadOptions(component='unet')`, or transformer, text_encoder, …",
        )
    if not component:
        return str(request.component)
    folders = folders_of(component)
    return request.component if request.component in folders else folders[0]


def _kohya_name(update: Update, request: WriteRequest, several: bool) -> str:
    if underscored(update.name):
        return update.name
    folder = _folder(update, request)
    part = "lora_te1" if folder == "text_encoder" and several else _KOHYA.get(folder)
    if part is None and request.makers and folder in ("transformer", "transformer_2"):
        part = "lora_unet"
    if part is None:
        raise InputError(
            f"kohya's files have no part '{printable(folder)}', or other names in it; there are {', '.join(_KOHYA)}",
            hint="give the base, whose makers' names are looked up where they are known: `base=BASE`; or choose diffusers",
        )
    return f"{part}_{_within(update.name, request).replace('.', '_')}"


def _within(name: str, request: WriteRequest) -> str:
    return within(name) if request.of_pipeline else name


def _check_base(names: dict[str, str], request: WriteRequest) -> None:
    """Raises `AmbiguousNameError` where two modules of the base would have the name of one of `names`."""
    if request.base is None:
        return
    spelled = Counter(
        within(name.removesuffix(".weight")).replace(".", "_") for name in request.base.shapes if name.endswith(".weight")
    )
    for module in names.values():
        if spelled[within(module).replace(".", "_")] > 1:
            raise AmbiguousNameError(
                f"{printable(module)} and another module of the base are the same name with underscores for dots",
                hint="nothing was written; choose diffusers",
            )


def _scalar(update: Update) -> Tensor:
    """alpha as a tensor, in float32 where that can hold it."""
    alpha = torch.tensor(update.scaling * update.r, dtype=torch.float64, device="cpu")
    for candidate in (update.lora_alpha, update.scaling * update.r):
        if candidate / update.r == update.scaling:
            alpha = torch.tensor(candidate, dtype=torch.float64, device="cpu")
            break
    return alpha.float() if float(alpha.float()) == float(alpha) else alpha
