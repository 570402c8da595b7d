"""What a base checkpoint is, as values: shards with their headers, and where every tensor lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..files.evaluation import evaluate, rows_of
from ..files.expression import Matrix, tensors_of
from ..files.gguf.gguf_header import GgufHeader
from ..files.safetensors.info import Header, TensorInfo
from ..files.safetensors.reader import TensorFile
from .conv1d import model_types
from .encodings.encoded import Encoded
from .quantised import Quantisation

_DIFFUSERS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Shard:
    """One .safetensors or .gguf file of a checkpoint.

    - `name`: its file name in the folder
    - `sha256`: of the whole file, where its place in a hub cache states it; it has not been checked
    """

    name: str
    header: Header
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.header.path


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint on disk, of which only headers have been read.

    - `root`: its folder
    - `shards`: in the order of their names
    - `tensors`: the model's, by name, in the order of shards and of bytes in them, each as an expression of the tensors that the
      shards hold; nearly always that is one of them as it is
    - `config`: config.json, None where there is none
    - `indexed`: whether an index file lists the shards; `index_metadata`: what else the index says
    - `single_file`: whether the path of one file was given, so that its neighbours need not belong to it
    - `live`: whether it stands for a model in memory, and there are no files
    - `transposed`: of a model in memory, the weights that their modules' classes store (in_features, out_features); None: not known
    - `without_bias`: of a model in memory, the weights of modules that have no bias and would compute with one
    - `notes`: what was found and set right, in words
    - `encoded`: of the tensors that stand for other numbers than are stored, how; `tensors` has those numbers
    - `companions`: names of stored tensors that go with activations of a quantised model, and are no tensors of the model
    - `quantisation`: what the configuration says of it
    - `original`: the same model in floats, of which codes are made anew; None where they are made of what they state

    >>> import lorafold
    >>> base = lorafold.open_checkpoint("base")
    >>> len(base.shards), base.tensors["model.layers.0.q_proj.weight"].shape
    (2, (8, 8))
    """

    root: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Matrix]
    config: dict[str, Any] | None
    index_metadata: Mapping[str, Any]
    indexed: bool
    single_file: bool = False
    live: bool = False
    transposed: frozenset[str] | None = None
    without_bias: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    quantisation: Quantisation | None = None
    original: Checkpoint | None = None

    @property
    def name(self) -> str:
        """What people call it: its folder's name; of a snapshot in a hub cache, that of the repository; of GGUF the file's."""
        if self.gguf is not None:
            return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", self.shards[0].name)
        for folder in (self.root.resolve(), *self.root.resolve().parents):
            if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
                return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return self.root.resolve().name

    @property
    def gguf(self) -> GgufHeader | None:
        """The header of its first file where it is in GGUF, which has llama.cpp's names and the model's metadata; else None."""
        header = self.shards[0].header if self.shards else None
        return header if isinstance(header, GgufHeader) else None

    @property
    def place(self) -> Path:
        """Where it is: its folder, or its first file where it is in GGUF."""
        return self.root if self.gguf is None else self.shards[0].path

    @property
    def stem(self) -> str:
        """How the names of its files of weights begin: as diffusers calls those of its models, or as everybody else does."""
        ours = bool(self.shards) and all(shard.name.startswith(_DIFFUSERS) for shard in self.shards)
        return _DIFFUSERS if ours else "model"

    @property
    def index_name(self) -> str:
        """What the file is called that lists its shards, or would be."""
        return f"{self.stem}.safetensors.index.json"

    @cached_property
    def model_types(self) -> tuple[str, ...]:
        """Every `model_type` of the configuration, of the model and of its parts, each once."""
        return tuple(dict.fromkeys(model_types(self.config)))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(matrix.nbytes for matrix in self.as_stored.values())

    @cached_property
    def as_stored(self) -> Mapping[str, Matrix]:
        """The tensors that a copy has: the model's, and in the place of each encoded one those that it is stored as."""
        if not self.encoded:
            return self.tensors
        stored, found = self.stored, dict[str, Matrix]()
        for name, matrix in self.tensors.items():
            parts = self.encoded[name].stored if name in self.encoded else ()
            found |= {part: stored[part] for part in parts} if parts else {name: matrix}
        return found | {name: stored[name] for name in self.companions}

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """All tensors as the shards hold them, by name."""
        return {name: info for shard in self.shards for name, info in shard.header.tensors.items()}

    @property
    def weight_map(self) -> dict[str, str]:
        """The name of the shard that holds each tensor, or of an expression the first that it is made of."""
        names = {shard.path: shard.name for shard in self.shards}
        return {name: names[self.file_of(tensor)] for name, tensor in {**self.as_stored, **self.tensors}.items()}

    def file_of(self, tensor: Matrix) -> Path:
        """Where the file is that holds `tensor`, or of an expression the first that it is made of."""
        return next((info.path for info in tensors_of(tensor)), self.shards[0].path)


class BaseReader:
    """The files of a checkpoint, and of its original where there is one, open for reading; a context manager.

    Entering raises `CheckpointError` where one is not the file whose header was read, leaving where one changed meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, TensorFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            original = self._checkpoint.original
            for shard in (*self._checkpoint.shards, *(() if original is None else original.shards)):
                self._files[shard.path] = stack.enter_context(TensorFile(shard.header))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def file(self, info: TensorInfo) -> TensorFile | None:
        """The open file that the tensor `info` is stored in; None where that is none of these."""
        return self._files.get(info.path)

    def read(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        """The stored tensor `info`, or slices of one, in new memory or over the first bytes of `buffer`.

        Raises `CheckpointError` where it cannot be read, or torch has no such dtype.
        """
        return self._files[info.path].read(info, buffer=buffer)

    def rows(self, matrix: Matrix, start: int, count: int) -> Tensor:
        """Rows of `matrix`, from row `start` of its first dimension on: (count, numbers of a row). Raises as `read` does."""
        columns = matrix.numel // max(1, matrix.shape[0] if matrix.shape else 1)
        return evaluate(rows_of(matrix, start, count, columns), self.read).contiguous()
