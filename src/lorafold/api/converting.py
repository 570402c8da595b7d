"""From one format of adapters to another: read, made ready for the base, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ..adapters.adapter import Adapter, on_base
from ..adapters.convert.request import WriteRequest, WrittenAdapter, read_updates
from ..adapters.formats.diffusion.names import PIPELINE, component_of, folders_of, underscored, within
from ..adapters.formats.table import WRITTEN
from ..adapters.load import load_adapter
from ..adapters.numbers import check_numbers
from ..adapters.read_options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..declared import picked
from ..errors import InputError, OutputError, OutputExistsError, nearest_names, printable
from ..files.atomic.checks import output_fault
from ..files.atomic.file import StagedFile
from ..files.atomic.folder import StagedFolder
from ..options import ConvertArguments, ConvertOptions, TargetFormat
from ..planning.names.diffusion import named
from ..planning.names.gguf_names import told_of
from ..planning.names.makers.slots import maker_slots
from ..planning.names.renames import renamed
from ..planning.resolve import resolve
from ..text import Readable, Summary, plural, size
from .respelling import respelled
from .verbs import takes, tells


@dataclass(frozen=True)
class Conversion(Readable):
    """What a conversion did: the adapter at `path` is at `out` too.

    - `source`, `target`: the formats
    - `modules`: how many it holds; `nbytes`: bytes written
    - `exact`: whether it is the same update bit for bit; else its notes say what was rounded

    >>> import lorafold
    >>> print(lorafold.convert("adapter", "adapter.pt", "loralib"))
    adapter.pt is adapter (peft) in the format loralib: the same update, bit for bit
      holds     4 modules, ...
      note      ...
    """

    out: str
    source: str
    target: str
    modules: int
    nbytes: int
    notes: tuple[str, ...] = ()
    path: str = ""
    exact: bool = True

    def summary(self) -> Summary:
        """What was written, for people."""
        exactly = "the same update, bit for bit" if self.exact else "rounded where its notes say so"
        return Summary(
            f"{printable(self.out)} is {printable(self.path)} ({self.source}) in the format {self.target}: {exactly}",
            [("holds", f"{plural(self.modules, 'module')}, {size(self.nbytes)}"), *(("note", note) for note in self.notes)],
        )

    def to_json(self) -> dict[str, Any]:
        """The conversion as a JSON object."""
        return {**self.__dict__, "notes": list(self.notes)}


@tells
@takes(ConvertOptions)
def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: TargetFormat | str,
    *,
    base: str | os.PathLike[str] | None = None,
    read_options: ReadOptions | None = None,
    **options: Unpack[ConvertArguments],
) -> Conversion:
    """Write the adapter at `adapter` to `out` in the format `to`: a folder for peft and mlx, a file for the others.

    The update is the same, bit for bit. Factors that the format cannot state go into lora_B, where that is exact.

    - `base`: the base model, where names or the order of rows need it; of an image model it may be in diffusers' names or in its
      makers', and kohya's files get the names that they have of such a model, diffusers' theirs
    - `read_options`: what the files of `adapter` cannot tell; its `component` is also the part of a pipeline that the modules are
      of, where their names do not say
    - `**options`: as listed below

    Raises `UnsupportedAdapterError` for what the format has no place for, saying what would be lost; `InputError` of the kind that
    fits; `OutputError`. Nothing is written then.

    >>> import lorafold
    >>> done = lorafold.convert("adapter", "adapter.pt", "loralib")
    >>> done.source, done.target, done.modules, done.exact
    ('peft', 'loralib', 4, True)
    """
    if to not in WRITTEN:
        near = nearest_names(to, WRITTEN)
        raise InputError(
            f"'{printable(to)}' is not a format that is written; there are {', '.join(WRITTEN)}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    endings = WRITTEN[to].endings
    if endings and Path(out).suffix not in endings:
        raise OutputError(
            f"{printable(str(out))} is to be a file in the format {to}, whose name ends in {' or '.join(endings)}",
            hint="readers tell formats by that",
        )
    read, how = read_options or ReadOptions(), picked(ConvertOptions, options)
    found = load_adapter(adapter, read)
    check_numbers(found)
    checkpoint = None if base is None else open_checkpoint(Path(base))
    facts = None if checkpoint is None else told_of(checkpoint)
    if facts is not None and checkpoint is not None:
        found = _as_the_base_has_it(on_base(found, facts), checkpoint)
    if found.on_base is not None:
        raise InputError(
            f"{printable(str(found.path))} leaves to the base what its {found.format} files do not say",
            hint="give the base: `base=BASE`",
        )
    if not found.modules:
        raise InputError(f"{printable(str(found.path))} holds no updates")
    found = _by_tensor(found, read.renames)
    updates, makers = read_updates(found), False
    if checkpoint is not None and to in _OF_PIPELINES:
        updates, makers = respelled(updates, found, checkpoint, kohya=to == TargetFormat.kohya, rounded=how.allow_rounding)
    written = WRITTEN[to].write(WriteRequest(found, updates, facts, read.component, how.allow_rounding, makers))
    inputs = [Path(adapter), *([] if base is None else [Path(base)])]
    _write(Path(out), written, inputs, overwrite=how.overwrite)
    nbytes = sum(len(content) for content in written.files.values())
    return Conversion(
        str(out), found.format, to, len(found.modules), nbytes, (*found.notes, *written.notes), str(adapter), not how.allow_rounding
    )


_OF_PIPELINES = (TargetFormat.kohya, TargetFormat.diffusers)


def _as_the_base_has_it(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter` of a pipeline in the base's shapes, and in its names where it spells them with underscores; any other as it is.

    Raises as `resolve` does where something has no place in the base.
    """
    if adapter.format not in PIPELINE:
        return adapter
    resolution = resolve(adapter, checkpoint)
    fitted, _ = named(adapter, checkpoint, maker_slots({name: info.shape for name, info in checkpoint.tensors.items()}))
    modules = {}
    for name, module in fitted.modules.items():
        targets = resolution.targets[name]
        whole = len(targets) == 1 and targets[0].rows is None and targets[0].tensor.endswith(".weight")
        if underscored(name) and whole:
            plain, folder = targets[0].tensor.removesuffix(".weight"), folders_of(component_of(name))[0]
            told = component_of(plain) in folders_of(component_of(name))
            name = plain if told or not folder else f"{folder}.{within(plain)}"
        weight = len(targets) == 1 and module.tensor.endswith(".weight")
        modules[name] = replace(module, name=name, tensor="" if weight else module.tensor)
    return replace(adapter, modules=modules)


def _by_tensor(adapter: Adapter, renames: Sequence[tuple[str, str]]) -> Adapter:
    """`adapter` with `renames` applied, and each module called as the one whose weight it changes."""
    (found,) = renamed([adapter], renames)
    modules = {}
    for name, module in found.modules.items():
        whole = module.index is None and module.tensor.endswith(".weight")
        plain = module.tensor.removesuffix(".weight") if whole else name
        if plain in modules or (plain != name and plain in found.modules):
            plain = name
        modules[plain] = replace(module, name=plain)
    return replace(found, modules=modules)


def _write(out: Path, written: WrittenAdapter, inputs: list[Path], *, overwrite: bool) -> None:
    if "" in written.files:
        with StagedFile(out, inputs=inputs, replaces=lambda _: overwrite) as file:
            _fill(file.fd, written.files[""], out)
            file.place()
            file.keep()
        return
    if out.is_file():
        raise OutputExistsError(f"{printable(str(out))} is a file", hint="this format is a folder; choose another output")
    with StagedFolder(out, overwrite=overwrite, inputs=inputs) as folder:
        for name, content in written.files.items():
            fd = os.open(folder.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                _fill(fd, content, out)
            finally:
                os.close(fd)
        folder.commit()


def _fill(fd: int, content: bytes, out: Path) -> None:
    """Write all of `content` and bring it to the disk."""
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError as cause:
        raise output_fault(cause, out, len(content)) from cause
