"""What an adapter is, whatever format it came in: LoRA pairs by module name, and tensors that replace one of the base.

Only headers and configuration have been read; `AdapterReader` reads the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import AdapterError, printable
from ..files.expression import Matrix, Permuted, tensors_of
from ..files.safetensors.info import Header, TensorInfo
from .transform import ElementProduct, Transform

Rule: TypeAlias = Literal["peft", "lycoris"]
"""What the user's weight of an adapter does to DoRA: it counts from W, as in PEFT, or from W + ΔW, as in LyCORIS."""


@dataclass(frozen=True)
class Scaling:
    """The factor of an update, with what it was computed from and why.

    - `value`: lora_alpha / r, or lora_alpha / √r with rsLoRA
    - `why`: in words, for the plan and the receipt
    """

    value: float
    r: int
    lora_alpha: float
    why: str


ResidualKind: TypeAlias = Literal["pissa", "olora", "kasa", "given"]


@dataclass(frozen=True)
class Residual:
    """That an adapter was trained not on the base weight W but on what was left of it, rounded to its dtype.

    - ``"pissa"``: W without its `r` largest singular values (arXiv:2404.02948); ``"kasa"``: without its `r` smallest
      (arXiv:2412.06071)
    - ``"olora"``: W − `factor` · Q[:, :r] R[:r] with W = QR (arXiv:2406.01775)
    - ``"given"``: without the update that the adapter was before training, `Adapter.initial`
    """

    kind: ResidualKind
    r: int
    factor: float = 1.0


@dataclass(frozen=True)
class AdapterModule:
    """The LoRA pair of one module, or of one matrix of it.

    - `name`: the module's, as the adapter has it; where there are several for one module, what tells them apart follows
    - `lora_A`: (r, in_features); of an embedding (r, num_embeddings), of a convolution (r, in_channels, *kernel_size)
    - `lora_B`: (out_features, r); of an embedding (embedding_dim, r), of a convolution (out_channels, r, 1, …)
    - `embedding`: whether the base weight is (num_embeddings, embedding_dim), so that ΔW is the transpose of B @ A
    - `lora_bias`: (out_features,), scaled and added to the module's bias, or None
    - `magnitude`: DoRA's, one number for each output, in any shape, or None
    - `magnitude_axis`: 1 where it has a number for each input instead; `rule`: whose DoRA it is
    - `tensor`: the base tensor that it is added to, as the adapter names it; by default the module's weight
    - `index`: which matrix of that tensor, where it has three dimensions and the first counts experts
    - `groups`: how many the base's convolution has, where ΔW is for a dense one with that one's weight in blocks on its diagonal
    - `exchanged`: whether its factors have changed places, so that ΔW is seen the way round that the base stores it
    - `residual`: what is left of the base tensor before anything is added to it; None where that is all
    - `transform`: what makes a new weight of the one that is there, where it is no sum; the factors are zeros then
    - `product`: LoHa's or LoKr's, of which the factors are made
    """

    name: str
    lora_A: Matrix
    lora_B: Matrix
    scaling: Scaling
    embedding: bool = False
    lora_bias: Matrix | None = None
    magnitude: Matrix | None = None
    tensor: str = ""
    index: int | None = None
    magnitude_axis: int = 0
    rule: Rule = "peft"
    residual: Residual | None = None
    groups: int = 1
    exchanged: bool = False
    transform: Transform | None = None
    product: ElementProduct | None = None

    def __post_init__(self) -> None:
        if not self.tensor:
            object.__setattr__(self, "tensor", f"{self.name}.weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW as its layer has it: (out, in, …), or (num_embeddings, embedding_dim)."""
        out, inner = self.lora_B.shape[0], self.lora_A.shape[1:]
        return (*inner, out) if self.embedding else (out, *inner)

    def turned(self) -> AdapterModule:
        """The module of the transpose of ΔW, which is Aᵀ @ Bᵀ."""
        product = None if self.product is None else self.product.turned()
        return replace(self, lora_A=Permuted(self.lora_B), lora_B=Permuted(self.lora_A), exchanged=True, product=product)

    @property
    def _transforming(self) -> tuple[TensorInfo, ...]:
        return () if self.transform is None else tuple(self.transform.parts.values())

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of the adapter's file that it is made of."""
        parts = (self.lora_A, self.lora_B, self.lora_bias, self.magnitude, *self._transforming)
        return tuple(info for part in parts if part is not None for info in tensors_of(part))

    def stored_names(self, part: Literal["weight", "bias"]) -> tuple[str, ...]:
        """The names of those that its weight's update is made of, or its bias's."""
        weight = (self.lora_A, self.lora_B, self.magnitude, *self._transforming)
        parts = weight if part == "weight" else (self.lora_bias,)
        return tuple(dict.fromkeys(info.name for each in parts if each is not None for info in tensors_of(each)))


@dataclass(frozen=True)
class TrainedRows:
    """Rows of an embedding that were trained on their own.

    - `values`: (n, embedding_dim), the new rows themselves
    - `indices`: the n rows of the base tensor that they replace
    """

    values: TensorInfo
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    - `name`: its folder's name, for people
    - `path`: its folder or file; `format`: ``"peft"`` or another that `load_adapter` names
    - `modules`: LoRA pairs by module name
    - `replacements`: tensors that replace one of the base, by the base tensor's name as the adapter has it
    - `rows`: rows that replace rows of a base tensor, by that tensor's name as the adapter has it
    - `header`: of the file with its tensors; `sha256`: of its configuration and that file together, hexadecimal
    - `config`: the configuration as it was read
    - `base_model`: the base model's name, as the adapter states it
    - `fan_in_fan_out`: what its configuration says of the layout of base weights; known to be unreliable;
      `given_fan_in_fan_out`: what its user says
    - `notes`: what a reader should know, in words
    - `left_out`: tensors of its file that nothing is merged of, by name, and why
    - `unasked`: tensors of its file that replace one of the base though its configuration names neither them nor their module
    - `layers`: ranges of the base's layers, [first, one after the last), that the model it is for is made of; empty: as the base is
    - `initial`: the adapter as it was before training, where that is needed to tell what it then took out of the base
    - `on_base`: what makes it the adapter as it is on a base, where its files leave something to that (see `onbase`)

    >>> import lorafold
    >>> adapter = lorafold.load_adapter("adapter")
    >>> adapter.format, adapter.base_model, list(adapter.modules)[0]
    ('peft', 'org/tiny', 'model.layers.0.q_proj')
    """

    name: str
    path: Path
    format: str
    modules: Mapping[str, AdapterModule]
    replacements: Mapping[str, TensorInfo]
    header: Header
    sha256: str
    config: Mapping[str, Any]
    base_model: str | None = None
    fan_in_fan_out: bool = False
    given_fan_in_fan_out: bool | None = None
    notes: tuple[str, ...] = ()
    rows: Mapping[str, TrainedRows] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    unasked: frozenset[str] = frozenset()
    layers: tuple[tuple[int, int], ...] = ()
    initial: Adapter | None = None
    on_base: Callable[[Base], Adapter] | None = field(default=None, compare=False, repr=False)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The base tensors that the adapter changes, biases with a lora_bias left out, as the adapter names them."""
        return tuple(dict.fromkeys((*(module.tensor for module in self.modules.values()), *self.replacements, *self.rows)))


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and the factor that the user gives it, 0.7 for ``adapter@0.7``."""

    adapter: Adapter
    adapter_weight: float = 1.0


@dataclass(frozen=True)
class Base:
    """Of a base model: the fields of its `config.json`, and the shapes of its tensors by name."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def model_type(self) -> str:
        """The family, transformers' word for it; empty where the configuration has none."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    def heads(self, adapter: Adapter) -> tuple[int, int]:
        """How many heads the queries have, and how many the keys.

        Raises `AdapterError` where the configuration does not say.
        """
        text = self.config.get("text_config")
        config = text if isinstance(text, Mapping) else self.config
        queries = config.get("num_attention_heads")
        keys = config.get("num_key_value_heads", queries)
        for heads in (queries, keys):
            if type(heads) is not int or heads <= 0:
                raise AdapterError(
                    f"{printable(str(adapter.path))} has the rows of queries and keys in another order than the base, and the"
                    " base's config.json does not say how many heads they are: num_attention_heads, num_key_value_heads",
                    hint="nothing was written; put the config.json of the base model beside its weights",
                )
        return int(str(queries)), int(str(keys))

    def shape_of(self, tensor: str) -> tuple[int, ...] | None:
        """The shape of `tensor`, or of what ends in that name; None where nothing does, or it has several shapes."""
        if tensor in self.shapes:
            return self.shapes[tensor]
        found = {shape for name, shape in self.shapes.items() if name.endswith(f".{tensor}")}
        return found.pop() if len(found) == 1 else None


def on_base(adapter: Adapter, base: Base) -> Adapter:
    """`adapter` as it is on `base`: itself, where its files leave nothing open.

    Raises `AdapterError` where the base does not tell what is needed.
    """
    if adapter.on_base is None:
        return adapter
    return replace(adapter.on_base(base), name=adapter.name, format=adapter.format, on_base=None)
