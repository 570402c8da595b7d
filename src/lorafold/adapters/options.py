"""What the files of an adapter cannot tell, and its user can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExpertLayout = Literal["peft", "expert-major"]
SplitScale = Literal["trained", "stored"]
AlphaTensors = Literal["use", "ignore"]


@dataclass(frozen=True)
class ReadOptions:
    """How adapters are to be read; None where the files decide.

    - `format`: which of the formats that fit is meant
    - `lora_alpha`: for formats that do not store it
    - `expert_layout`: how B holds the experts: ``"peft"`` rank-major, or ``"expert-major"``
    - `component`: the part of a pipeline, as its folder is called, whose modules are used; the others are left out
    - `split_qkv`: the factor of projections that kohya trained apart and saved as one: ``"trained"`` alpha / dim of each part, or
      ``"stored"`` alpha / the rows of lora_down
    - `alpha_tensors`: whether alphas count beside `lora_A` of a UNet in diffusers' names, where diffusers ignores them
    - `enable_lora`: which blocks of loralib's MergedLinear are; None: all
    - `out_proj_factor`: how often PEFT added the update of an attention's out_proj, where its version does not tell
    - `initial_adapter`: the folder of the same adapter as it was before training, where what it then took out of the base cannot be
      computed again (CorDA, LoRA-GA, `pissa_niter`)
    - `dense_groups`: write convolutions in groups, whose update mixes them, as dense ones
    - `renames`: (old, new) runs of whole names in the names of their modules, before these are looked for in the base
    - `allow_pickle`: read .pt and .bin files, with `weights_only`
    """

    format: str | None = None
    lora_alpha: float | None = None
    expert_layout: ExpertLayout | None = None
    allow_pickle: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    component: str | None = None
    split_qkv: SplitScale | None = None
    alpha_tensors: AlphaTensors | None = None
    out_proj_factor: Literal[1, 2] | None = None
    enable_lora: tuple[bool, ...] | None = None
    initial_adapter: str | None = None
    dense_groups: bool = False
