"""The nouns of a plan. A plan holds no tensor and no open file; two equal plans lead to equal files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import PlanError
from ..files.safetensors.info import BITS
from ..options import SumOptions
from ..text import Readable, Summary

FORMAT = 1
"""Of the JSON of a plan; a reader that knows another one refuses it."""

Action = Literal["copy", "cast", "merge", "encode", "replace", "rows"]


@dataclass(frozen=True)
class Addend:
    """One update of a merged tensor.

    - `adapter`: its place in the plan's list of adapters; `module`: the module's name there
    - `part`: ``"weight"`` for the LoRA pair, ``"bias"`` for its lora_bias
    - `transposed`: whether the tensor is stored (in_features, out_features)
    - `scaling`: the whole factor, adapter_weight included; `why`: how it came about
    - `rows`: the rows (start, stop) of the tensor, as a matrix as it is stored, that it is added to; None for all
    - `section`: the rows (start, stop) of ΔW, as its layer has it, that are added; None for all
    - `columns`: which of all columns (start, stop, how many) ΔW, transposed, is added to; None for all
    - `residual`: how what is left of the base tensor is computed, which stands in its place (``"pissa"`` …); None where all is
    - `stored`: the tensors of the adapter's file that it is made of
    - `transform`: the kind that makes a new tensor of the one that is there (``"OFT"`` …), at the strength `scaling`; else None
    - `dora`: where the sum is rescaled after, with what strength (`scaling` is then without adapter_weight); else None
    """

    adapter: int
    module: str
    part: Literal["weight", "bias"]
    transposed: bool
    scaling: float
    why: str
    dora: float | None = None
    rows: tuple[int, int] | None = None
    section: tuple[int, int] | None = None
    residual: str | None = None
    stored: tuple[str, ...] = ()
    transform: str | None = None
    columns: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class NewRows:
    """Rows `indices` of a tensor, replaced by those of the tensor `values` of adapter number `adapter`."""

    adapter: int
    values: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Coded:
    """What a quantised weight of the base is stored as.

    - `encoding`: what people call it; `nbytes`: of all tensors that it is stored as
    - `numbers`: the shape of its numbers, in the order of their codes
    - `together`: how many rows of these are the fewest whose codes are whole bytes
    """

    encoding: str
    nbytes: int
    numbers: tuple[int, ...]
    together: int = 1


@dataclass(frozen=True)
class Step:
    """How one output tensor comes about.

    - `copy`: the bytes of `source`, a base tensor
    - `cast`: `source`, rounded to `dtype`
    - `merge`: `source` and `addends`, summed and rounded once to `dtype`; where there is a `replacement`, that is the source
    - `encode`: `source` and `addends`, summed, and made codes again with the scales that are stored; `tensor`, `dtype` and `shape`
      are those of the codes
    - `replace`: the tensor `replacement` of adapter number `adapter`, rounded to `dtype`
    - `rows`: `source` with some `rows` replaced, rounded to `dtype`

    Where there is no `source`, it is zeros: a bias that the base lacks.

    `dtype` is safetensors' name; `shape` that of the output. `groups`: how many `source` has, a convolution's weight, which then
    stands in blocks on the diagonal of a dense one, of `shape`. `coded`: what `source` is stored as, where it is quantised and not
    copied.
    """

    tensor: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    addends: tuple[Addend, ...] = ()
    adapter: int | None = None
    replacement: str | None = None
    rows: tuple[NewRows, ...] = ()
    groups: int = 1
    coded: Coded | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The shape of the numbers that updates are added to: the tensor's own, but for codes."""
        return self.coded.numbers if self.coded is not None and self.action == "encode" else self.shape


def nbytes(step: Step) -> int:
    """Bytes of the output tensor; 0 for an element type whose width is not known."""
    return math.prod(step.shape) * BITS.get(step.dtype, 0) // 8


@dataclass(frozen=True)
class PlannedShard:
    """One output file and its tensors, in the order of their bytes."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter of the plan; `sha256` ties the plan to its files, `left_out` has its tensors that go nowhere, and why."""

    name: str
    path: str
    sha256: str
    adapter_weight: float
    format: str
    base_model: str | None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedOriginal:
    """The model in floats of which codes are made: its path, and the fingerprint of its headers."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class MergePlan(Readable):
    """A merge, decided to the last tensor.

    - `base`: the base's path; `fingerprint`: of its headers, ties the plan to its files
    - `shards`: the output files in order
    - `config`: fields of config.json that change, by dotted path; `dropped`: those that go; `files_dropped`: files beside the
      weights that are not copied, since they say how the base is quantised
    - `original`: of which the codes of an output are made, where that is not the base
    - `notes`: what a reader should know before it runs
    - `unmatched`: adapter tensors that are left out because the base has no place for them, where that was allowed

    `str` of it groups what is alike; a notebook shows the same as a table.

    >>> import lorafold
    >>> plan = lorafold.plan("base", [("adapter", 0.5)])
    >>> print(plan)
    base + adapter@0.5
      tensors: 4 merged, 2 copied; ... in 2 files; exact, nearest
      adapter   adapter, in the format peft
         tensors                       action  shape   dtype  how
      2  model.layers.*.q_proj.weight  merge   [8, 8]  BF16   × 1 (...)
      2  model.layers.*.v_proj.weight  merge   [8, 8]  BF16   × 1 (...)
    >>> [step.tensor for step in plan.steps if step.action == "copy"]
    ['model.layers.0.norm.weight', 'model.layers.1.norm.weight']
    """

    base: str
    fingerprint: str
    adapters: tuple[PlannedAdapter, ...]
    options: SumOptions
    shards: tuple[PlannedShard, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    files_dropped: tuple[str, ...] = ()
    original: PlannedOriginal | None = None

    @property
    def steps(self) -> Iterator[Step]:
        """All steps, in the order of files and bytes."""
        return (step for shard in self.shards for step in shard.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(nbytes(step) for step in self.steps)

    def count(self, action: Action) -> int:
        """How many tensors are made by `action`."""
        return sum(step.action == action for step in self.steps)

    def summary(self, *, everything: bool = False) -> Summary:
        """What a merge would do, for people: grouped by kind of module, or with `everything` tensor by tensor."""
        from .summary import plan_summary  # which reads plans

        return plan_summary(self, everything=everything)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object; `lorafold.run` takes it."""
        return {"format": FORMAT, **asdict(self)}


def plan_to_json(plan: MergePlan) -> dict[str, Any]:
    """`plan` as a JSON object."""
    return plan.to_json()


def plan_from_json(value: Any) -> MergePlan:
    """The plan that `plan_to_json` made `value` of.

    Raises `PlanError` where it is not one.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise PlanError(f"a plan of format {FORMAT} is expected, found {found!r}")
    try:
        fields = {name: entry for name, entry in value.items() if name != "format"}
        return MergePlan(
            **{
                **fields,
                "adapters": tuple(PlannedAdapter(**adapter) for adapter in fields["adapters"]),
                "options": SumOptions(**fields["options"]),
                "shards": tuple(
                    PlannedShard(shard["name"], tuple(_step(step) for step in shard["steps"])) for shard in fields["shards"]
                ),
                "notes": tuple(fields["notes"]),
                "unmatched": tuple(fields["unmatched"]),
                **{name: tuple(fields.get(name, ())) for name in ("dropped", "files_dropped")},
                "original": None if fields.get("original") is None else PlannedOriginal(**fields["original"]),
            }
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as cause:
        raise PlanError(f"the plan cannot be read: {type(cause).__name__}: {cause}", hint="make it anew") from None


def _step(value: dict[str, Any]) -> Step:
    addends = tuple(
        Addend(
            **{
                **addend,
                "rows": _range(addend["rows"]),
                "section": _range(addend["section"]),
                "columns": None if addend.get("columns") is None else tuple(addend["columns"]),
                "stored": tuple(addend["stored"]),
            }
        )
        for addend in value["addends"]
    )
    rows = tuple(NewRows(**{**new, "indices": tuple(new["indices"])}) for new in value["rows"])
    coded = value.get("coded")
    coded = None if coded is None else Coded(**{**coded, "numbers": tuple(coded["numbers"])})
    return Step(**{**value, "shape": tuple(value["shape"]), "addends": addends, "rows": rows, "coded": coded})


def _range(value: list[int] | None) -> tuple[int, int] | None:
    return None if value is None else (value[0], value[1])
