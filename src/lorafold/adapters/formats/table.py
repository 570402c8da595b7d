"""The tables of formats: of each its name, what such an adapter looks like on disk, how it is told, read and written.

A format is a folder beside this file, with a reader, a writer or both. A line here makes it known, to errors, `load_adapter` and
`convert` alike; one that is written is also named in `options.TargetFormat`, which the command line reads before torch is there.

A format is told by what is there, never by trying: `fits` looks at names of files and tensors. `load` may then find fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..adapter import Adapter
from ..convert.request import WriteRequest, WrittenAdapter
from ..source import Source
from .diffusion.diffusers import is_diffusers, load_diffusers
from .diffusion.kohya import is_kohya, load_kohya
from .diffusion.lycoris import is_lycoris, load_lycoris
from .diffusion.writer import write_diffusers, write_kohya
from .gguf.reader import is_gguf, load_gguf
from .gguf.writer import write_gguf
from .litgpt.reader import is_litgpt, load_litgpt
from .loralib.reader import is_loralib, load_loralib
from .loralib.writer import write_loralib
from .mlx.reader import is_mlx, load_mlx
from .mlx.writer import write_mlx
from .peft.config import CONFIG_NAME
from .peft.reader import PICKLE_NAME, WEIGHTS_NAME, load_peft
from .peft.writer import write_peft
from .torchtune.reader import is_torchtune, load_torchtune


@dataclass(frozen=True)
class Format:
    """One format: its `name`, what it looks like in words, whether a path fits it, and its reader."""

    name: str
    looks: str
    fits: Callable[[Source], bool]
    load: Callable[[Source], Adapter]


def _is_peft(source: Source) -> bool:
    return CONFIG_NAME in source.names and source.find(WEIGHTS_NAME, PICKLE_NAME) is not None


FORMATS: tuple[Format, ...] = (
    Format("peft", f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}", _is_peft, load_peft),
    Format("loralib", "one file, .pt or other, with …lora_A and …lora_B", is_loralib, load_loralib),
    Format("mlx", "a folder with adapters.safetensors and mlx-lm's adapter_config.json", is_mlx, load_mlx),
    Format("torchtune", "a folder with adapter_model.pt, or that file", is_torchtune, load_torchtune),
    Format("litgpt", "a folder with lit_model.pth.lora and hyperparameters.yaml", is_litgpt, load_litgpt),
    Format("gguf", "one .gguf file whose general.type is adapter", is_gguf, load_gguf),
    Format("kohya", "one file, …lora_down.weight and …lora_up.weight of lora_unet_…, lora_te_…", is_kohya, load_kohya),
    Format("lycoris", "one file, …hada_w1_a, …lokr_w1, …lora_mid.weight, …diff or …dora_scale", is_lycoris, load_lycoris),
    Format("diffusers", "one file, unet.….lora_A.weight, text_encoder.…, or older names", is_diffusers, load_diffusers),
)
"""All formats, in the order that errors list them."""


@dataclass(frozen=True)
class FormatWriter:
    """How a format is written: its writer, and for a format that is one file, what the name of the file may end in."""

    write: Callable[[WriteRequest], WrittenAdapter]
    endings: tuple[str, ...] = ()


WRITTEN: Mapping[str, FormatWriter] = {
    "peft": FormatWriter(write_peft),
    "kohya": FormatWriter(write_kohya, (".safetensors",)),
    "diffusers": FormatWriter(write_diffusers, (".safetensors",)),
    "mlx": FormatWriter(write_mlx),
    "gguf": FormatWriter(write_gguf, (".gguf",)),
    "loralib": FormatWriter(write_loralib, (".pt", ".pth")),
}
"""The formats that are written, by name."""
