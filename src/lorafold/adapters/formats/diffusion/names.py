"""The names of tensors in the files of diffusion, which begin with a part of the pipeline and end in a suffix.

Trainers name the parts by what they are (`lora_unet`, `lora_te2`), diffusers by the folder of the pipeline. In which folder, and
under which names there, the modules are found is for `planning.resolve`. The suffixes are kohya's and LyCORIS's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from ....errors import AdapterError, nearest_names, printable
from ...adapter import Adapter

_IMAGE = ("transformer", "unet")
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "lora_unet": ("unet", "transformer", "prior"),
    "oft_unet": ("unet", "transformer"),
    "lora_transformer": _IMAGE,
    "Hunyuan_video_I2V_lora": _IMAGE,
    "lora_prior_unet": ("prior",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3", "text_encoder_2"),
    "lora_prior": ("prior",),
    **dict.fromkeys(("diffusion_model", "model.diffusion_model", "pipe.dit", "conditional_transformer"), _IMAGE),
    **dict.fromkeys(("base_model.model", "transformer.base_model.model", "diffusion_model.base_model.model"), _IMAGE),
    "unet.base_model.model": ("unet",),
    "text_encoders.clip_l.transformer": ("text_encoder",),
    "text_encoders.clip_g.transformer": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer": ("text_encoder_3", "text_encoder_2"),
}
"""The folders of a pipeline that a trainer's part may be in, the likeliest first. What is not here is called as its folder is."""

_FOLDER_NAMES = (
    "unet", "unet_2", "transformer", "transformer_2", "prior", "decoder", "controlnet", "text_encoder", "text_encoder_2",
    "text_encoder_3", "image_encoder",
)  # fmt: skip
_UNDERSCORED = sorted((name for name in FOLDERS if "lora" in name or name == "oft_unet"), key=len, reverse=True)
_DOTTED = sorted({*_FOLDER_NAMES, *FOLDERS} - {*_UNDERSCORED}, key=len, reverse=True)
_IN_DOTS = frozenset(_DOTTED)
_LONGEST = len(_DOTTED[0])
_BEGINNINGS = tuple(f"{name}_" for name in _UNDERSCORED)
_ENCODER = re.compile(r"text_encoders\.\w+\.transformer(?=\.)")
"""What ComfyUI calls a text encoder, whichever it is."""

PIPELINE = ("kohya", "lycoris", "diffusers")
"""The formats of adapters for pipelines."""

WRAPPED = "base_model.model"
"""What PEFT puts before all names: the folder of an adapter then says the rest, a single file does not."""


def component_of(module: str) -> str:
    """The part that a module's name begins with; empty where it begins with none.

    >>> component_of("lora_te2_text_model_encoder_layers_0_mlp_fc1"), component_of("unet.conv_in"), component_of("lycoris_conv_in")
    ('lora_te2', 'unet', '')
    """
    end = len(module)
    while (end := module.rfind(".", 0, min(end, _LONGEST + 1))) >= 0:  # the longest first
        if module[:end] in _IN_DOTS:
            return module[:end]
    if found := _ENCODER.match(module):
        return found[0]
    if not module.startswith(_BEGINNINGS):
        return ""
    return next((name for name in _UNDERSCORED if module.startswith(f"{name}_")), "")


def within(module: str) -> str:
    """The name of a module in its part.

    >>> within("lora_unet_conv_in"), within("text_encoder.text_projection"), within("lycoris_conv_in")
    ('conv_in', 'text_projection', 'conv_in')
    """
    component = component_of(module)
    name = module[len(component) + 1 :] if component else module.removeprefix("lycoris_")
    return name.lstrip("_") if component in _UNDERSCORED else name


def folders_of(component: str) -> tuple[str, ...]:
    """The folders of a pipeline that the part `component` may be in."""
    return FOLDERS.get(component, ("text_encoder",) if _ENCODER.match(f"{component}.") else (component,))


MAIN = ("unet", "transformer", "prior")
"""What an adapter is for that names no component."""

SECOND = {"transformer_2": "transformer", "unet_2": "unet"}
"""Models beside the main one that adapters name as that: Wan 2.2 has one for much noise and one for little."""


def folders_for(part: str, component: str | None) -> tuple[str, ...]:
    """The folders that the part of an adapter may be for, where the user asked for `component`.

    >>> folders_for("diffusion_model", None), folders_for("diffusion_model", "transformer_2"), folders_for("", "prior")
    (('transformer', 'unet'), ('transformer_2',), ('prior',))
    """
    folders = folders_of(part) if part else MAIN
    if component is not None and (not part or SECOND.get(component) in folders):
        return (component,)
    return folders


def parts_of(adapter: Adapter) -> dict[str, list[str]]:
    """The modules of `adapter` by the part that they are of; of a part that it has only new tensors for, none."""
    parts: dict[str, list[str]] = {}
    for name in adapter.replacements if adapter.format in PIPELINE else ():
        parts.setdefault(component_of(name), [])
    for name in adapter.modules:
        parts.setdefault(component_of(name), []).append(name)
    return parts


def of_component(adapter: Adapter, component: str | None) -> Adapter:
    """`adapter` with what is of `component` alone, a part or the folder that it may be in; all of it where that is None.

    What is left out is said in its notes. Raises `AdapterError` where nothing is of it.
    """
    if component is None:
        return adapter
    parts = parts_of(adapter)
    main = component in MAIN or component in SECOND
    chosen = [name for name in parts if component == name or (component in folders_for(name, component) if name or main else False)]
    if component in chosen:  # what is called so is meant
        chosen = [name for name in chosen if name == component or component in folders_of(name)]
    if not chosen:
        names = sorted({folder for name in parts for folder in folders_of(name) if folder})
        near = nearest_names(component, names)
        raise AdapterError(
            f"{printable(str(adapter.path))} holds nothing for the component '{printable(component)}'; it is for"
            f" {', '.join(names) or 'one model, not for parts of a pipeline'}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    left = [f"{len(modules)} of {printable(name or 'no part')}" for name, modules in parts.items() if name not in chosen]
    notes = [f"only what is for {printable(component)} is used; left out: {', '.join(left)}"] if left else []
    found = narrowed(adapter, chosen)
    return replace(found, notes=(*adapter.notes, *notes))


def narrowed(adapter: Adapter, parts: Collection[str]) -> Adapter:
    """`adapter` with what is of `parts` alone; of the tensors of the others it says which part they are for."""
    kept = {name: module for name, module in adapter.modules.items() if component_of(name) in parts}
    replacements = adapter.replacements
    left = {}
    if adapter.format in PIPELINE:
        replacements = {name: info for name, info in replacements.items() if component_of(name) in parts}
        left = {
            info.name: f"it is for {printable(component_of(name) or 'another part')}"
            for name, info in adapter.replacements.items()
            if name not in replacements
        }
    left |= {
        info.name: f"it is for {printable(component_of(name) or 'another part')}"
        for name, module in adapter.modules.items()
        if name not in kept
        for info in module.stored
    }
    return replace(adapter, modules=kept, replacements=replacements, left_out={**adapter.left_out, **left})


EMBEDDINGS = re.compile(r"bundle_emb\..+|emb_params|string_to_param\..+|.+\.emb_params")


def embeddings_in(names: Collection[str]) -> dict[str, str]:
    """Which of the tensors `names` are textual inversions that were packed beside a LoRA, and why nothing is merged of them."""
    return {name: "a textual inversion, which no weight of the model holds" for name in names if EMBEDDINGS.fullmatch(name)}


def embeddings_note(left: Collection[str]) -> tuple[str, ...]:
    """A note on the textual inversions `left` out, where there are any."""
    if not left:
        return ()
    return (f"{len(left)} tensors are of textual inversions packed beside the LoRA, and are left out: give them to the pipeline",)


KOHYA = {
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "alpha": "alpha",
}
"""Some trainers write PEFT's names of the two after kohya's module."""

_OWN = (
    "dora_scale", "diff", "diff_b", "diff_m", "set_weight", "on_input", "oft_blocks", "rescale", "w_norm", "b_norm",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_GLORA = {f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")}
LYCORIS = {
    **KOHYA, "lora_mid.weight": "lora_mid", "lora_B.bias": "diff_b", "weight": "ia3", **_GLORA, **{name: name for name in _OWN},
}  # fmt: skip

REFUSED = {
    "oft_diag": "OFT in a form that LyCORIS no longer writes",
    **{f"oft_blocks.{i}": "OFT of the parts of a fused weight, each with a norm of its own" for i in range(4)},
    "bm.weight": "GLoRA with a core tensor",
    "reshape_weight": "a control adapter, for which the base's weight is first made wider",
    "lambda_layer": "T-LoRA, whose rank depends on the time step",
    "lokr_t1": "a LoKr with a core tensor for w1, which LyCORIS does not compute with",
}
"""Kinds of LyCORIS that are not merged, and why."""

_LYCORIS_ALONE = {*_OWN, *_GLORA, "lora_mid.weight", *REFUSED}


def of_lycoris(names: Collection[str]) -> bool:
    """Whether some of the tensors `names` are such as only LyCORIS writes."""
    return any(split_name(name, _LYCORIS_ALONE) for name in names)


def underscored(name: str) -> bool:
    """Whether the path of a module is spelled with underscores in the name of this tensor of it.

    >>> underscored("lora_unet_conv_in.alpha"), underscored("unet.conv_in.lora_A.weight")
    (True, False)
    """
    module = name.partition(".")[0]
    return module.startswith("lycoris_") or component_of(module) in _UNDERSCORED


def split_name(name: str, endings: Collection[str]) -> tuple[str, str] | None:
    """The module and the ending of a tensor's name; None where it has none of `endings`.

    >>> split_name("lora_unet_conv_in.lora_up.weight", ["weight", "lora_up.weight"])
    ('lora_unet_conv_in', 'lora_up.weight')
    """
    at = name.find(".", max(1, len(name) - 1 - max(map(len, endings), default=0)))
    while at > 0:
        if name[at + 1 :] in endings:
            return name[:at], name[at + 1 :]
        at = name.find(".", at + 1)
    return None
