"""An adapter of an image model in the other side's names: diffusers', or those of the model's makers, as kohya's files have them.

Where one weight of the makers is several of diffusers', an update is divided by rows, or several are put together: the factors
lora_A one under the other, lora_B in blocks. Both give the same ΔW, number by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.convert.request import Update
from ..adapters.convert.scalings import with_scaling
from ..adapters.formats.diffusion.names import PIPELINE, component_of, folders_of
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UnsupportedAdapterError, printable
from ..planning.names.makers.slots import BODY, CLIP_G, PartOfBase, Stretch, called, parts_of_base
from ..planning.resolve import resolve
from ..planning.targets import Target


def respelled(
    updates: Sequence[Update], adapter: Adapter, checkpoint: Checkpoint, *, kohya: bool, rounded: bool
) -> tuple[list[Update], bool]:
    """`updates`, which are those of `adapter`, in diffusers' names or in those that `kohya` has; and whether there were others.

    What is for no model of a known family keeps its name.

    Raises as `resolve` does, and `UnsupportedAdapterError` for parts of DoRA or of a turned weight, which have no other form.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    parts = list(parts_of_base(shapes))
    if not parts:
        return list(updates), False
    targets = resolve(adapter, checkpoint).targets
    landed: dict[str, list[_Landed]] = {}
    for update in updates:
        for target in targets[update.name]:
            landed.setdefault(target.tensor, []).append(_Landed(update, target, shapes[target.tensor][0]))
    found: list[Update] = []
    used: dict[str, int] = {}
    for part in parts:
        wanted = part.family.kohya(part.here) if kohya else "diffusers"
        for name, pieces in called(part.here, part.family, part.side, wanted).items() if wanted != part.side else _as_it_is(part):
            shares = sorted(_shares(pieces, part, landed), key=lambda share: share.at)
            if not shares:
                continue
            for share in shares:
                used[share.landed.update.name] = used.get(share.landed.update.name, 0) + share.count
            found.append(_joined(_full_name(name, part, shares[0].landed.update, adapter), pieces, shares, rounded=rounded))
    for update in updates:
        if 0 < used.get(update.name, 0) != update.lora_B.shape[0]:
            raise _without_form(update, "holds rows that have no name there")
    return [*found, *(update for update in updates if update.name not in used)], True


@dataclass(frozen=True)
class _Landed:
    """An update, and where in the base it is for: `size` is how many rows the tensor has."""

    update: Update
    target: Target
    size: int

    @property
    def rows(self) -> tuple[int, int]:
        """Which rows of the tensor."""
        return self.target.rows or (0, self.size)

    @property
    def section(self) -> tuple[int, int]:
        """Which rows of the update."""
        return self.target.section or (0, self.update.lora_B.shape[0])


@dataclass(frozen=True)
class _Share:
    """What of an update is for one weight: `count` rows from `start` of it, which are there from `at` on; `turned`: all of it."""

    landed: _Landed
    start: int
    count: int
    at: int
    turned: bool = False


def _as_it_is(part: PartOfBase) -> Iterator[tuple[str, tuple[Stretch, ...]]]:
    for name, shape in part.here.items():
        size = shape[0] if shape else 1
        yield name, (Stretch(name, 0, size, size),)


def _shares(pieces: Sequence[Stretch], part: PartOfBase, landed: Mapping[str, list[_Landed]]) -> Iterator[_Share]:
    """What the updates hold for the weight that is `pieces` of the base's tensors."""
    at = 0
    for piece in pieces:
        for each in landed.get(part.own[piece.tensor], ()):
            if each.target.transposed or piece.turned:
                if len(pieces) > 1 or each.target.rows is not None or each.target.section is not None:
                    raise _without_form(each.update, "is for a part of a weight that is turned there")
                yield _Share(each, 0, each.update.lora_B.shape[0], 0, turned=each.target.transposed != piece.turned)
                continue
            (first, last), (section, _) = each.rows, each.section
            low, high = max(first, piece.start), min(last, piece.stop)
            if low < high:
                yield _Share(each, section + low - first, high - low, at + low - piece.start)
        at += piece.stop - piece.start


def _joined(name: str, pieces: Sequence[Stretch], shares: Sequence[_Share], *, rounded: bool) -> Update:
    """The update of one weight."""
    update = shares[0].landed.update
    size = sum(piece.stop - piece.start for piece in pieces)
    if any(share.turned for share in shares):
        if len(shares) > 1 or update.magnitude is not None or update.lora_bias is not None or update.kernel:
            raise _without_form(update, "is for a weight that is turned there")
        return replace(update, name=name, lora_A=update.lora_B.T.contiguous(), lora_B=update.lora_A.T.contiguous())
    if len(shares) == 1 and shares[0].count == size == update.lora_B.shape[0]:
        return replace(update, name=name)
    groups: list[tuple[Update, list[_Share]]] = []
    for share in shares:
        own = share.landed.update
        group = next((held for other, held in groups if _alike(own, other) and not _overlaps(share, held)), None)
        if group is None:
            groups.append((own, [share]))
        else:
            group.append(share)
    scaled, _ = with_scaling([own for own, _ in groups], lambda _: update.scaling, rounded=rounded)
    same = {own.name: each for (own, _), each in zip(groups, scaled, strict=True)}
    columns = []
    for own, held in groups:
        factor = same[own.name]
        column = factor.lora_B.new_zeros((size, *factor.lora_B.shape[1:]))
        for share in held:
            rows = with_scaling([share.landed.update], lambda _: update.scaling, rounded=rounded)[0][0].lora_B
            column = column.to(torch.promote_types(column.dtype, rows.dtype))
            column[share.at : share.at + share.count] = rows[share.start : share.start + share.count]
        columns.append(column)
    lora_A = torch.cat([same[own.name].lora_A for own, _ in groups])
    alpha = update.lora_alpha if len(groups) == 1 else update.scaling * lora_A.shape[0]
    return Update(
        name=name,
        lora_A=lora_A,
        lora_B=torch.cat(columns, dim=1),
        scaling=update.scaling,
        lora_alpha=alpha,
        magnitude=_vector("magnitude", size, shares),
        lora_bias=_vector("lora_bias", size, shares),
    )


def _alike(one: Update, other: Update) -> bool:
    """Whether two updates have the same lora_A, as those have that were made from one by dividing it."""
    return one is other or (one.scaling == other.scaling and torch.equal(one.lora_A, other.lora_A))


def _overlaps(share: _Share, others: Sequence[_Share]) -> bool:
    return any(share.at < other.at + other.count and other.at < share.at + share.count for other in others)


def _vector(field: str, size: int, shares: Sequence[_Share]) -> Tensor | None:
    """The magnitudes or biases of a weight; a bias that an update lacks is 0, and a magnitude would be what the base's rows are."""
    held: list[tuple[_Share, Tensor | None]] = [(share, getattr(share.landed.update, field)) for share in shares]
    have = [(share, tensor) for share, tensor in held if tensor is not None]
    if not have:
        return None
    ends = sorted((share.at, share.at + share.count) for share, _ in have)
    whole = [0, *(stop for _, stop in ends)] == [*(start for start, _ in ends), size]
    if field == "magnitude" and (not whole or len(have) < len(held)):
        raise _without_form(have[0][0].landed.update, "is DoRA of a part of a weight")
    found = have[0][1].new_zeros(size)
    for share, tensor in have:
        found[share.at : share.at + share.count] += tensor[share.start : share.start + share.count]
    return found


def _full_name(name: str, part: PartOfBase, update: Update, adapter: Adapter) -> str:
    """The module of the weight `name`, after the folder of a pipeline where the adapter has one."""
    name = name.removesuffix(".weight")
    if part.family.text and not name.startswith("text_projection"):
        name = BODY + name
    if adapter.format not in PIPELINE:
        return name
    component = component_of(update.name)
    if part.family.text:
        folder = folders_of(component)[0] if component else "text_encoder_2" if part.place in CLIP_G[1:] else "text_encoder"
    else:
        main = ("unet", "prior") if part.family.name == "UNet" else ("transformer", "transformer_2")
        folder = component if component in main else main[0]
    return f"{folder}.{name}"


def _without_form(update: Update, words: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{printable(update.name)} {words}, and cannot be written in the other names",
        hint="nothing was written; merge it instead",
    )
