"""What a base is made of: one model, or the components of a pipeline, each with what of the adapters is for it.

This is the one place that asks which of the two a base is. The verbs are written over components: a base that is one model has one
component, whose name is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..adapters.adapter import WeightedAdapter
from ..adapters.formats.diffusion.names import MAIN, PIPELINE, folders_for, narrowed, parts_of
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.input_hashes import check_hashes
from ..checkpoints.open import open_checkpoint
from ..checkpoints.pipeline import Pipeline, is_pipeline, open_pipeline
from ..engine.proof import Proof
from ..errors import PlanError, UnmatchedAdapterError, printable
from ..options import MatchOptions, RunOptions, SumOptions
from ..planning.make import make_plan
from ..planning.plan import MergePlan, PlannedAdapter
from .given import Given, placed


@dataclass(frozen=True)
class OpenBase:
    """A base whose headers are read when a component is first asked for; `pipeline`: where it is one, else None."""

    root: Path
    match: MatchOptions
    pipeline: Pipeline | None
    _open: dict[str, Checkpoint] = field(default_factory=dict, compare=False, repr=False)

    def folder(self, component: str) -> Path:
        """Where `component` lies."""
        return self.root / component if component else self.root

    def checkpoint(self, component: str) -> Checkpoint:
        """The weights of `component`.

        Raises as `open_checkpoint` does.
        """
        if component not in self._open:
            match = self.match
            found = open_checkpoint(self.folder(component), prefer=match.prefer, repair_index=match.repair_index)
            if match.requantise_from is not None:
                found = replace(found, original=open_checkpoint(Path(match.requantise_from), repair_index=match.repair_index))
            self._open[component] = found
        return self._open[component]


@dataclass(frozen=True)
class Component:
    """One model of a base, and the adapters as they are on it; `name`: its folder in a pipeline, empty where there is none."""

    name: str
    checkpoint: Checkpoint
    adapters: tuple[WeightedAdapter, ...]

    def plan(self, options: SumOptions, match: MatchOptions) -> MergePlan:
        """The plan of this component.

        Raises as `make_plan` does.
        """
        return make_plan(self.checkpoint, self.adapters, options, match)


@dataclass(frozen=True)
class Division:
    """The components of `base` that adapters change.

    - `given`: the adapters whole; `left_out`: modules of theirs that are for no component, where that is allowed
    """

    base: OpenBase
    given: tuple[WeightedAdapter, ...]
    components: tuple[Component, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A division with the plan of each of its components."""

    of: Division
    plans: tuple[MergePlan, ...]

    @property
    def parts(self) -> list[tuple[Component, MergePlan]]:
        """Each component with its plan."""
        return list(zip(self.of.components, self.plans, strict=True))

    def joined(self) -> MergePlan:
        """One plan to show; that of a base that is one model can be run."""
        if self.of.base.pipeline is None:
            return self.plans[0]
        plans = {component.name: plan for component, plan in self.parts}
        return joined_plans(self.of.base.root, self.of.given, plans, self.of.left_out)

    def with_notes(self) -> Planned:
        """The same, with what was found when the base was opened among the notes of the plans."""
        return replace(self, plans=tuple(replace(plan, notes=(*part.checkpoint.notes, *plan.notes)) for part, plan in self.parts))


def open_base(root: Path, match: MatchOptions) -> OpenBase:
    """The base at `root`: a model, whose headers are read, or a pipeline, of which the list of components is.

    Raises `CheckpointError` where that is damaged.
    """
    base = OpenBase(root, match, open_pipeline(root) if is_pipeline(root) else None)
    if base.pipeline is None:
        base.checkpoint("")
    return base


def divided(base: OpenBase, given: Sequence[Given], *, allow_partial: bool = False) -> Division:
    """Which components of `base` the adapters `given` change, and what of each adapter is for which.

    Raises `UnmatchedAdapterError` where a part of an adapter has no component, unless that is allowed.
    """
    whole = tuple(each.weighted for each in given)
    if base.pipeline is None:
        checkpoint = base.checkpoint("")
        return Division(base, whole, (Component("", checkpoint, tuple(placed(given, checkpoint))),))
    shares, left_out = divide(base.pipeline, given, allow_partial=allow_partial)
    components = []
    for name, share in shares.items():
        checkpoint = base.checkpoint(name)
        components.append(Component(name, checkpoint, tuple(placed(share, checkpoint))))
    return Division(base, whole, tuple(components), left_out)


def planned(base: OpenBase, given: Sequence[Given], options: SumOptions) -> Planned:
    """The plan of every component of `base` that the adapters `given` change.

    Raises as `make_plan` and `divided` do.
    """
    division = divided(base, given, allow_partial=base.match.allow_partial)
    if base.match.requantise_from is not None:
        if base.pipeline is not None:
            raise PlanError(
                f"{printable(str(base.root))} is a pipeline, for which no original can be given",
                hint="merge each component alone, its folder being the base",
            )
        options = options.from_original()
    if not division.components:
        raise PlanError("there is no adapter to merge")
    coded = [each for each in division.components if each.checkpoint.encoded]
    plans = []
    for component in division.components:
        of_others = base.pipeline is not None and coded and component not in coded
        plans.append(component.plan(replace(options, output_format=None) if of_others else options, base.match))
    return Planned(division, tuple(plans))


def check_inputs(several: Sequence[Planned], run: RunOptions) -> None:
    """Raises where the bytes of base and adapters are not those that `run` expects, or it asks what cannot be of this base."""
    only_changed = any(plan.options.only_changed for each in several for plan in each.plans)
    if only_changed and run.undo is not None:
        raise PlanError(
            "an undo file restores a whole checkpoint", hint="beside the tensors that changed the base is all that is needed"
        )
    if run.expect_sha256 or run.verify_input:
        opened = [component.checkpoint for each in several for component in each.of.components]
        opened += [each.original for each in opened if each.original is not None]
        bases = [shard.path for each in opened for shard in each.shards]
        adapters = [weighted.adapter.header.path for each in several for weighted in each.of.given]
        check_hashes(list(dict.fromkeys([*bases, *adapters])), run.expect_sha256 or {}, named_by_hash=run.verify_input)


def divide(
    pipeline: Pipeline, given: Sequence[Given], *, allow_partial: bool = False
) -> tuple[dict[str, list[Given]], tuple[str, ...]]:
    """By component of `pipeline` what of each adapter is for it, and the modules that `allow_partial` leaves out: those for none.

    An adapter that names no component is for the one that its options say, by default the main model.

    Raises `UnmatchedAdapterError` where a part of one has no component there.
    """
    shares: dict[str, list[Given]] = {}
    left: list[str] = []
    for each in given:
        adapter, component = each.weighted.adapter, each.options.component
        main = MAIN if component is None else (component,)
        chosen: dict[str, list[str]] = {}
        for part, names in parts_of(adapter).items():
            folder = next((name for name in folders_for(part, component) if name in pipeline.models), None)
            if folder is None and allow_partial and len(names) < len(adapter.modules):
                left += names
                continue
            if folder is None:
                raise UnmatchedAdapterError(
                    f"{printable(str(adapter.path))} has {len(names)} modules for {printable(part or 'the main model')}, which"
                    f" {printable(str(pipeline.root))} does not have; it has {', '.join(pipeline.models) or 'no weights'}",
                    unmatched=[printable(name) for name in names],
                    nearest={},
                    hint="nothing was written; `ReadOptions(component=…)` merges what is for that one alone",
                )
            chosen.setdefault(folder, []).append(part)
        if (
            adapter.replacements or adapter.rows
        ) and adapter.format not in PIPELINE:  # only formats that name no component have them
            folder = next((name for name in main if name in pipeline.models), None)
            chosen.setdefault(folder or main[0], [])
        for folder, parts in chosen.items():
            shares.setdefault(folder, []).append(replace(each, weighted=replace(each.weighted, adapter=narrowed(adapter, parts))))
    return shares, tuple(left)


def joined_plans(
    base: Path, adapters: Sequence[WeightedAdapter], plans: Mapping[str, MergePlan], left_out: Sequence[str] = ()
) -> MergePlan:
    """One plan to show, of those of the components and what was `left_out` of the adapters; it cannot be run."""
    if not plans:
        raise PlanError("there is no adapter to merge")
    first = next(iter(plans.values()))
    given: dict[str, PlannedAdapter] = {}
    for planned in (planned for plan in plans.values() for planned in plan.adapters):
        other = given.get(planned.sha256, planned)
        left = {name: why for name, why in planned.left_out.items() if name in other.left_out}  # in no component
        given[planned.sha256] = replace(planned, left_out=left)
    order = {weighted.adapter.sha256: i for i, weighted in enumerate(adapters)}

    def place(plan: MergePlan, adapter: int) -> int:
        return order[plan.adapters[adapter].sha256]

    shards = tuple(
        replace(
            shard,
            name=f"{name}/{shard.name}",
            steps=tuple(
                replace(
                    step,
                    tensor=f"{name}/{step.tensor}",
                    source=None if step.source is None else f"{name}/{step.source}",
                    addends=tuple(replace(addend, adapter=place(plan, addend.adapter)) for addend in step.addends),
                    rows=tuple(replace(rows, adapter=place(plan, rows.adapter)) for rows in step.rows),
                    adapter=None if step.adapter is None else place(plan, step.adapter),
                )
                for step in shard.steps
            ),
        )
        for name, plan in plans.items()
        for shard in plan.shards
    )
    return replace(
        first,
        base=str(base),
        adapters=tuple(given[weighted.adapter.sha256] for weighted in adapters),
        shards=shards,
        config={f"{name}/{field}": value for name, plan in plans.items() for field, value in plan.config.items()},
        notes=tuple(dict.fromkeys(f"{name}: {note}" for name, plan in plans.items() for note in plan.notes)),
        unmatched=(*left_out, *(f"{name}/{left}" for name, plan in plans.items() for left in plan.unmatched)),
    )


def joined_proofs(proofs: Mapping[str, Proof]) -> Proof:
    """The proof of all components."""
    return Proof(
        tensors={f"{name}/{tensor}": each for name, proof in proofs.items() for tensor, each in proof.tensors.items()},
        files={f"{name}/{file}": sha256 for name, proof in proofs.items() for file, sha256 in proof.files.items()},
        failures=tuple(f"{name}: {failure}" for name, proof in proofs.items() for failure in proof.failures),
        nbytes=sum(proof.nbytes for proof in proofs.values()),
        kept={f"{name}/{tensor}": kept for name, proof in proofs.items() for tensor, kept in proof.kept.items()},
        notes=tuple(f"{name}: {note}" for name, proof in proofs.items() for note in proof.notes),
    )
