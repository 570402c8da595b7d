"""The flags that say what the files of adapters cannot: the same for every command that reads adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import parse_flags, parse_renames

if TYPE_CHECKING:
    from ..adapters.options import ReadOptions


class ExpertLayout(StrEnum):
    """How an adapter's B holds the experts."""

    peft = "peft"
    expert_major = "expert-major"


class SplitQkv(StrEnum):
    """Which factor counts for projections that kohya trained apart and saved as one."""

    trained = "trained"
    stored = "stored"


class AlphaTensors(StrEnum):
    """Whether alphas beside diffusers' keys of a UNet count."""

    use = "use"
    ignore = "ignore"


@dataclass(frozen=True)
class Reading:
    """`ReadOptions` before torch is imported: its fields that are not as they are by default."""

    fields: dict[str, Any] = field(default_factory=dict)

    def options(self) -> ReadOptions:
        """The options themselves."""
        from ..adapters.options import ReadOptions

        return ReadOptions(**self.fields)


NO_FLAGS = Reading()


def _reading(
    adapter_format: Annotated[
        str | None, typer.Option(help="Of the adapters, where several fit what is there.", metavar="FORMAT", show_default=False)
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="For adapters that do not store it.", metavar="ALPHA", show_default=False)
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapters in .pt and .bin files too, with torch.load(weights_only=True).")
    ] = False,
    expert_layout: Annotated[
        ExpertLayout | None,
        typer.Option(help="How the adapters' B holds the experts. Default: as PEFT has it.", show_default=False),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Use what is of this part of a pipeline alone: unet, text_encoder, …", metavar="FOLDER")
    ] = None,
    split_qkv: Annotated[
        SplitQkv | None, typer.Option(help="Of kohya's FLUX projections: alpha / the rank of each part, or of all.")
    ] = None,
    alpha_tensors: Annotated[
        AlphaTensors | None, typer.Option(help="Of alphas that diffusers ignores beside its keys of a UNet.")
    ] = None,
    enable_lora: Annotated[
        str | None, typer.Option(help="Which blocks of loralib's MergedLinear are: true,false,true. Default: all.", metavar="FLAGS")
    ] = None,
    out_proj_factor: Annotated[
        int | None,
        typer.Option(min=1, max=2, help="How often PEFT added an attention's out_proj, where its version does not tell."),
    ] = None,
    initial_adapter: Annotated[
        str | None,
        typer.Option(help="The adapter as it was before training, for CorDA, LoRA-GA and pissa_niter.", metavar="FOLDER"),
    ] = None,
    dense_groups: Annotated[
        bool, typer.Option("--dense-groups", help="Write convolutions in groups as dense ones, where an update mixes the groups.")
    ] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option("--map", help="In names of the adapters' modules: read OLD as NEW, runs of whole names.", metavar="OLD=NEW"),
    ] = None,
) -> Reading:
    given: dict[str, Any] = {
        "format": adapter_format,
        "lora_alpha": lora_alpha,
        "allow_pickle": allow_pickle or None,
        "expert_layout": expert_layout and expert_layout.value,
        "component": component,
        "split_qkv": split_qkv and split_qkv.value,
        "alpha_tensors": alpha_tensors and alpha_tensors.value,
        "enable_lora": parse_flags(enable_lora),
        "out_proj_factor": out_proj_factor,
        "initial_adapter": initial_adapter,
        "dense_groups": dense_groups or None,
        "renames": parse_renames(rename or []) or None,
    }
    return Reading({name: value for name, value in given.items() if value is not None})


def reads_adapters(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which takes `reading`, as one that takes each of the flags in its place."""
    own = inspect.signature(command, eval_str=True)
    flags = inspect.signature(_reading, eval_str=True).parameters

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        reading = _reading(**{name: given.pop(name) for name in flags})
        command(**given, reading=reading)

    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += flags.values() if parameter.name == "reading" else [parameter]
    with_flags.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags
