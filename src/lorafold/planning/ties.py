"""Tied weights: tensors that share their numbers, such as the input embedding and the output head, of which a file may hold one.

Which they are is looked up (`known`); for a model that is in no table, its user says it. Nothing is guessed: `check_known` refuses
what would need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError, UnsupportedAdapterError, nearest_names, printable
from .families import families_of
from .known import NOTHING, Flag, KnownModel, KnownTie, ends_elsewhere, flag_at, has_vocabulary, known_model
from .names.renames import respelled
from .plan import Step


@dataclass(frozen=True)
class Tie:
    """Tensors that share their numbers, by their names in the base's files, the one that the others are tied to first.

    - `stored`: those that the base holds; `flag`: what says that they are tied
    - `embedding`: the one that embeds tokens, if one does and PEFT sees the tie
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]
    flag: Flag
    embedding: str | None = None

    @property
    def source(self) -> str:
        """The stored tensor whose numbers those have that are not stored."""
        return self.stored[0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Those that are not stored."""
        return tuple(name for name in self.names if name not in self.stored)


@dataclass(frozen=True)
class Ties:
    """What a base ties.

    - `tied`: what is in force; `ends`: all embeddings and heads of the model, tied or not
    - `known`: whether somebody knows, the table or the user; `model`: what the table says
    - `modules`: the name in the files of each tensor that may be tied, by the name that it has in the model
    """

    tied: tuple[Tie, ...] = ()
    ends: tuple[str, ...] = ()
    known: bool = True
    model: KnownModel = NOTHING
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def aliases(self) -> dict[str, str]:
        """The stored tensor for each name that is tied to it and not stored itself."""
        return {name: tie.source for tie in self.tied for name in tie.aliases}


def find_ties(checkpoint: Checkpoint, tied_head: str | None = None) -> Ties:
    """The ties of `checkpoint`.

    `tied_head`: for a model in no table, the tensor that is tied to the embedding, or ``NAME=EMBEDDING``, or ``"none"``.

    Raises `PlanError` for a `tied_head` that contradicts what is known, or leaves the embedding open.
    """
    if checkpoint.gguf is not None:
        return _in_gguf(checkpoint, tied_head)
    config = checkpoint.config or {}
    model = NOTHING if "_class_name" in config else known_model(config)
    if model is None and not has_vocabulary(checkpoint.config):
        model = NOTHING
    if model is None:
        return _unknown(checkpoint, tied_head)
    found = [(tie, _located(tie, model.prefix, checkpoint)) for tie in model.ties]
    tied: list[Tie] = []
    ends: list[str] = []
    for tie, names in found:
        stored = tuple(name for name in names if name in checkpoint.tensors)
        if any(name.endswith(".weight") for name in names) and not model.varies:
            ends += names
        if not stored or not tie.flag.in_force(config):
            continue
        embeds = model.embedding in tie.names and model.shows(tie, config)
        embedding = names[tie.names.index(str(model.embedding))] if embeds else None
        tied.append(Tie(names, stored, tie.flag, embedding))
    if tied_head is not None:
        said = {_weight(tied_head.partition("=")[0])} if tied_head != "none" else set()
        heads = {name for tie in tied for name in tie.names}
        if (said and not said <= heads) or (not said and heads):
            raise PlanError(
                f"tied_head is {printable(tied_head)}, but this architecture is known, and ties"
                f" {', '.join(printable(name) for name in sorted(heads)) or 'nothing'}",
                hint="leave out `tied_head=…`",
            )
    if not ends:
        ends = [
            name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and last_name(name) in ends_elsewhere()[0]
        ]
    modules = {module: name for tie, names in found for module, name in zip(tie.names, names, strict=True)}
    return Ties(tuple(tied), tuple(dict.fromkeys(ends)), True, model, modules)


def check_known(ties: Ties, steps: Mapping[str, Step], embeds: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raises `UnsupportedAdapterError` where the plan changes a tensor that may be tied to another, and nobody knows which.

    `embeds`: the tensors that an adapter's own file says embed tokens.
    """
    changed = [name for name, step in steps.items() if step.action not in ("copy", "cast")]
    if ties.model.varies and (found := next((name for name in changed if ties.model.numbered(name)), None)) is not None:
        raise UnsupportedAdapterError(
            f"{printable(found)} shares its numbers with others, and which they are depends on the configuration of this"
            " architecture in a way that is not known here",
            hint="nothing was written; leave its module out of the adapter",
        )
    for name in embeds:  # PEFT adds to what the module gives, which is not what the table holds
        inside = [
            each for each in checkpoint.tensors if each.startswith(name.removesuffix("weight")) and "." in each[len(name) - 6 :]
        ]
        if inside or (ties.model.computes and last_name(name) == last_name(str(ties.model.embedding))):
            also = f" with {printable(inside[0])}" if inside else ""
            raise UnsupportedAdapterError(
                f"{printable(name)} is looked up in a module that computes{also} too: no weight holds what was trained",
                hint="nothing was written; train the module whole instead (PEFT: modules_to_save)",
            )
    if ties.known or checkpoint.live or flag_at(checkpoint.config or {}, "") is False:
        return
    embeddings, heads = ends_elsewhere()
    for name in changed:
        whole = steps[name].replacement is not None and last_name(name) not in heads
        said = checkpoint.config is not None and (
            name in embeds or (whole and _rows(name, checkpoint) in _vocabularies(checkpoint))
        )
        if len(steps[name].shape) != 2 or (last_name(name) not in embeddings and not said):
            continue
        shape = checkpoint.tensors[name].shape if name in checkpoint.tensors else steps[name].shape
        beside = [t for t, info in checkpoint.tensors.items() if info.shape == shape and last_name(t) in heads and t != name]
        if beside and not steps[name].rows:
            continue
        named = (checkpoint.config or {}).get("architectures")
        shown = printable(str(named[0])) if isinstance(named, list) and named else "this model"
        also = f"{printable(beside[0])} may take the same rows" if beside else "a head that is not stored may be tied to it"
        raise UnsupportedAdapterError(
            f"the adapter changes the embedding {printable(name)}, and whether {shown} ties it is not known: {also}",
            hint="nothing was written; say which tensor is the tied head, as the model calls it: `tied_head='lm_head.weight'`,"
            " or `tied_head='none'` where there is none",
        )


def _rows(name: str, checkpoint: Checkpoint) -> int | None:
    return checkpoint.tensors[name].shape[0] if name in checkpoint.tensors and checkpoint.tensors[name].shape else None


def _vocabularies(checkpoint: Checkpoint) -> set[Any]:
    """How many tokens the model and its parts have, as config.json says it."""
    parts = [checkpoint.config or {}]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
    return {part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int}


def last_name(tensor: str) -> str:
    """The last name of the module whose weight the tensor is; empty where it is no weight."""
    module, _, parameter = tensor.rpartition(".")
    return module.rpartition(".")[2] if parameter == "weight" else ""


def _located(tie: KnownTie, prefix: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the tie in the base's files, as they are or would be."""
    best: tuple[int, tuple[str, ...]] = (0, tie.stored)
    for names in _spelled(tie, prefix):
        held = sum(name in checkpoint.tensors for name in names)
        if held > best[0]:
            best = (held, names)
    if best[0] or not checkpoint.config:
        return best[1]
    rules = [rule for family in families_of(checkpoint.config) for rule in family.spellings]
    by_spelling = {respelled(name, rules): name for name in checkpoint.tensors} if rules else {}
    return tuple(by_spelling.get(respelled(name, rules), stored) for name, stored in zip(tie.names, tie.stored, strict=True))


def _spelled(tie: KnownTie, prefix: str) -> Iterator[tuple[str, ...]]:
    """The names as files and as modules have them, with and without the name of the model that they are in."""
    for names in dict.fromkeys((tie.stored, tie.names)):
        yield names
        if prefix:
            yield tuple(name.removeprefix(f"{prefix}.") for name in names)


def _in_gguf(checkpoint: Checkpoint, tied_head: str | None) -> Ties:
    """The ties of a model in GGUF: llama.cpp takes the embedding where no head is stored, and knows no other tie."""
    if tied_head is not None:
        raise PlanError(f"tied_head is {printable(tied_head)}, but GGUF itself tells what is tied", hint="leave out `tied_head=…`")
    names = "token_embd.weight", "output.weight"
    stored = tuple(name for name in names if name in checkpoint.tensors)
    tied = (Tie(names, stored, Flag("", "T" * 9, means_more=True), names[0]),) if stored == names[:1] else ()
    return Ties(tied, stored)


def _weight(name: str) -> str:
    return name if name.endswith(".weight") else f"{name}.weight"


def _unknown(checkpoint: Checkpoint, tied_head: str | None) -> Ties:
    """The ties of a model in no table: what its user says, or both ends that are stored where config.json calls them tied."""
    embeddings, heads = ends_elsewhere()
    tables = [n for n, info in checkpoint.tensors.items() if len(info.shape) == 2 and last_name(n) in embeddings]
    outputs = [n for n, info in checkpoint.tensors.items() if len(info.shape) == 2 and last_name(n) in heads]
    flag = Flag("", "FFFTTTFFF" if flag_at(checkpoint.config or {}, "") is not None else "TTTTTTFFF")
    if tied_head == "none":
        return Ties((), (*tables, *outputs))
    if tied_head is None:
        shape = [checkpoint.tensors[name].shape for name in (*tables, *outputs)]
        stated = flag_at(checkpoint.config or {}, "") is True and len(tables) == len(outputs) == 1 and shape[0] == shape[1]
        tied = (Tie((*tables, *outputs), (*tables, *outputs), flag),) if stated else ()
        return Ties(tied, (*tables, *outputs), known=False)
    said, _, of = tied_head.partition("=")
    head = _weight(said)
    wanted = [_weight(of)] if of else [t for t in tables if head not in checkpoint.tensors or _fits(t, head, checkpoint)]
    if len(wanted) != 1 or wanted[0] not in checkpoint.tensors:
        near = nearest_names(wanted[0], list(checkpoint.tensors)) if wanted else []
        among = ", ".join(printable(name) for name in (near or wanted or tables or list(checkpoint.tensors)[:3]))
        raise PlanError(
            f"which tensor {printable(head)} is tied to is not clear: {among}",
            hint=f"nothing was written; say it: `tied_head='{printable(said)}=EMBEDDING'`",
        )
    names = (wanted[0], head)
    stored = tuple(name for name in names if name in checkpoint.tensors)
    return Ties((Tie(names, stored, flag, wanted[0]),), (*dict.fromkeys((*tables, *outputs, *names)),))


def _fits(table: str, head: str, checkpoint: Checkpoint) -> bool:
    return checkpoint.tensors[table].shape == checkpoint.tensors[head].shape


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """`tie_word_embeddings` as the configuration says it, at the top or for the text model; None where it says nothing."""
    said = [flag_at(config or {}, place) for place in ("", "text_config")]
    return next((each for each in said if each is not None), None)
