"""Where a base keeps what the other side calls otherwise: makers' names for a base in diffusers', and diffusers' for one in theirs.

All goes by way of diffusers' names: each tensor of the base becomes the weights of diffusers' that it is, and of these each weight
of the makers' is put together again. A file of the makers is therefore also found under another of their spellings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ..offers import Offers, Slot
from .code_base import Makers, Side
from .lines import FAMILIES
from .rules import Found, Rule, fitting, rules_of

IMAGE = ("", "model.diffusion_model.", "net.", "diffusion_model.", "unet.", "transformer.")
CLIP = ("", "text_encoder.", "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.")
CLIP_G = ("", "text_encoder_2.", "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.")
CLIP_L = "text_encoders.clip_l.transformer."
TEXT = tuple(dict.fromkeys((*CLIP, *CLIP_G, CLIP_L)))
BODY = "text_model."
"""What transformers 5 leaves out of the names of a text encoder; adapters have it."""


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `stop` of the `size` that the base's `tensor` has; `turned`: of its transpose."""

    tensor: str
    start: int
    stop: int
    size: int
    turned: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor, as it is stored."""
        return self.start == 0 and self.stop == self.size and not self.turned

    @property
    def slot(self) -> Slot:
        """The same as a share of the outputs."""
        size = max(1, self.size)
        share = (Fraction(0), Fraction(1)) if (self.start, self.stop) == (0, self.size) else None
        return Slot(self.tensor, None, share or (Fraction(self.start, size), Fraction(self.stop, size)), self.turned)


def with_makers(offers: Offers, found: Mapping[str, tuple[Slot, ...]]) -> Offers:
    """`offers` and the names that `maker_slots` has `found`."""
    return (
        replace(offers, slots={**{offers.spell(name): each for name, each in found.items()}, **offers.slots}) if found else offers
    )


def maker_slots(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Slot, ...]]:
    """By the names that the base with tensors of these `shapes` does not have itself: where it stores what is meant.

    A part of a file of all parts is found by what its names begin with, which is also what the other names begin with.
    """
    found: dict[str, tuple[Slot, ...]] = {}
    for part in parts_of_base(shapes):
        names = called(part.here, part.family, part.side)
        found |= {f"{part.place}{name}": part.slots(pieces) for name, pieces in names.items() if name not in part.here}
    return found


@dataclass(frozen=True)
class PartOfBase:
    """The tensors of a base that are of one model, whose names begin with `place`.

    - `family`: what it is, and `side`: in whose names
    - `here`: their shapes by their names without `place`, and `own`: their whole names by those
    """

    place: str
    family: Makers
    side: Side
    here: Mapping[str, tuple[int, ...]]
    own: Mapping[str, str]

    def slots(self, pieces: Sequence[Stretch]) -> tuple[Slot, ...]:
        """`pieces` as shares of the base's tensors."""
        return tuple(replace(piece, tensor=self.own[piece.tensor]).slot for piece in pieces)


def parts_of_base(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[PartOfBase]:
    """The models of known families that the base with tensors of these `shapes` holds; each place is of one at most."""
    for places, text in ((IMAGE, False), (TEXT, True)):
        for place in places:
            for body in ("", BODY) if text else ("",):
                for family in FAMILIES:
                    side = family.side(_Within(shapes, place, body)) if family.text == text else None
                    if side is not None:
                        own = {name[len(place) :].removeprefix(body): name for name in shapes if name.startswith(place)}
                        yield PartOfBase(place, family, side, {name: shapes[whole] for name, whole in own.items()}, own)
                        break


class _Within(Collection[str]):
    """The names of a base's tensors that begin with `place`, without it and `body`."""

    def __init__(self, names: Collection[str], place: str, body: str) -> None:
        self.names, self.place, self.body = names, place, body

    def __contains__(self, name: object) -> bool:
        return f"{self.place}{self.body}{name}" in self.names

    def __iter__(self) -> Iterator[str]:
        front = self.place + self.body
        return (name.removeprefix(front) for name in self.names if name.startswith(front))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def called(
    shapes: Mapping[str, tuple[int, ...]], family: Makers, side: Side, wanted: Side | None = None
) -> dict[str, tuple[Stretch, ...]]:
    """All names of the weights of a base in `side`'s names, and where they are; those that files in `wanted`'s names have."""
    rules = list(rules_of((*family.lines_for(shapes), *(family.aliases if wanted is None else ()))))
    theirs = {rule.maker: rule for rule in rules}
    weights: dict[str, tuple[Stretch, ...]] = {}  # by diffusers' names
    for name, shape in shapes.items():
        size = shape[0] if shape else 1
        match = fitting(name, theirs) if side == "makers" else None
        if match is None:
            weights[name] = (Stretch(name, 0, size, size),)
        else:
            weights |= _apart(Stretch(name, 0, size, size), theirs[match.pattern], match, shapes)
    if wanted == "diffusers":
        return weights
    whole = _together(weights, rules)
    if wanted is None:
        return {**whole, **weights}
    shares = {share.name: rule for rule in rules for share in rule.shares}
    return {**whole, **{name: pieces for name, pieces in weights.items() if fitting(name, shares) is None}}


def _apart(piece: Stretch, rule: Rule, match: Found, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Stretch, ...]]:
    """What one weight of the makers is in diffusers' names; nothing where its rows cannot be told apart."""
    names = [match.put(share.name) for share in rule.shares]
    if len(names) == 1:
        return {names[0]: _another_way((piece,), rule)}
    weight = piece.tensor.removesuffix("bias") + "weight" if piece.tensor.endswith("bias") else piece.tensor
    inputs = shapes[weight][1] if len(shapes.get(weight, ())) > 1 else 0
    known = [inputs if share.inputs else 0 for share in rule.shares]
    rest, equal = piece.size - sum(known), sum(not share.inputs for share in rule.shares)
    if (any(share.inputs for share in rule.shares) and not inputs) or rest <= 0 or rest % max(1, equal):
        return {}
    found: dict[str, tuple[Stretch, ...]] = {}
    start = 0
    for name, size in zip(names, (size or rest // equal for size in known), strict=True):
        found[name] = (replace(piece, start=start, stop=start + size),)
        start += size
    return found


def _together(weights: Mapping[str, tuple[Stretch, ...]], rules: Sequence[Rule]) -> dict[str, tuple[Stretch, ...]]:
    """What the weights of diffusers' names are in the makers'."""
    by_share: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for i, share in enumerate(rule.shares):
            by_share.setdefault(share.name, []).append((rule, i))
    gathered: dict[str, tuple[Rule, dict[int, tuple[Stretch, ...]]]] = {}
    for name, pieces in weights.items():
        match = fitting(name, by_share)
        if match is None:
            continue
        for rule, i in by_share[match.pattern]:
            whole = match.put(rule.maker)
            gathered.setdefault(whole, (rule, {}))[1][i] = pieces
    return {
        name: _another_way(_adjoined([piece for i in sorted(parts) for piece in parts[i]]), rule)
        for name, (rule, parts) in gathered.items()
        if len(parts) == len(rule.shares)
    }


def _adjoined(pieces: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """`pieces` with those made one that follow each other in one tensor."""
    found: list[Stretch] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and (last.tensor, last.stop, last.turned) == (piece.tensor, piece.start, piece.turned):
            found[-1] = replace(last, stop=piece.stop)
        else:
            found.append(piece)
    return tuple(found)


def _another_way(pieces: tuple[Stretch, ...], rule: Rule) -> tuple[Stretch, ...]:
    """`pieces` as the other side has them; both ways there and back are the same."""
    if rule.way == "turned":
        return tuple(replace(piece, turned=not piece.turned) for piece in pieces)
    if rule.way == "halves":
        half = sum(piece.stop - piece.start for piece in pieces) // 2
        return _adjoined([*_from(pieces, half, 2 * half), *_from(pieces, 0, half)])
    return pieces


def _from(pieces: Sequence[Stretch], start: int, stop: int) -> Iterator[Stretch]:
    """What of the rows of all `pieces` is from `start` to `stop`."""
    first = 0
    for piece in pieces:
        count = piece.stop - piece.start
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            yield replace(piece, start=piece.start + low - first, stop=piece.start + high - first)
        first += count
