"""One prefix rewrite that takes every name of an adapter to a weight of the base.

The same model is saved with and without `model.`, inside a `module.` or an `_orig_mod.`, as part of a larger one. Which of these
it is shows only when all names are looked at together: a rewrite counts if it takes each of them to a weight that is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import AmbiguousNameError, UnmatchedAdapterError, nearest_names, printable
from ..families import VISION, WRAPPERS
from .offers import Offers


@dataclass(frozen=True)
class Rename:
    """`strip` is taken off the front of a name, and `add` put there; a name that does not begin so stays as it is.

    >>> rename = Rename("module.", "model.")
    >>> rename("module.layers.0.q_proj.weight"), rename("lm_head.weight")
    ('model.layers.0.q_proj.weight', 'lm_head.weight')
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name

    def __str__(self) -> str:
        return f"'{printable(self.strip)}' → '{printable(self.add)}'" if self.strip or self.add else "as they are"


def find_rename(own: Mapping[str, str], offers: Offers, *, adapter: Path, base: Path, partial: bool = False) -> Rename:
    """The rewrite under which each name in `own` is one of what the base `offers`; with `partial` that under which most are.

    - `own`: the adapter's own names of tensors, by the base's spelling of them

    Raises `UnmatchedAdapterError` where there is none, listing what is left unmatched under the one that matches most, and
    `AmbiguousNameError` where there are several that lead to different places.
    """
    names, known = list(own), offers.names
    if known.issuperset(names):
        return Rename()
    candidates = list(dict.fromkeys(_candidates(names, known)))
    whole = [rename for rename in candidates if all(rename(name) in known for name in names)]
    places = {tuple(rename(name) for name in names): rename for rename in reversed(whole)}
    if len(places) > 1:
        first = next(iter(names))
        raise AmbiguousNameError(
            f"{printable(str(adapter))} fits {len(places)} places in {printable(str(base))}:\n"
            + "\n".join(f"  {printable(own[first])} could be {printable(rename(first))}" for rename in places.values()),
            hint="nothing was written; rename the adapter's tensors to those of the base that is meant: `ReadOptions(renames=…)`",
        )
    if not places:
        best = _best(names, known, [Rename(), *candidates])
        if partial and any(best(name) in known for name in names):
            return best
        raise unmatched([name for name in names if best(name) not in known], own, best, offers, adapter, base)
    return next(iter(places.values()))


def _candidates(names: Collection[str], tensors: Collection[str]) -> Iterator[Rename]:
    """Rewrites that take one of the names to an existing tensor; only wrappers are exchanged for other wrappers."""
    for name in list(names)[:3]:
        parts = name.split(".")
        for count in range(_unnumbered(parts) + 1):
            strip, rest = "".join(part + "." for part in parts[:count]), ".".join(parts[count:])
            for tensor in tensors:
                if tensor == rest or tensor.endswith("." + rest):
                    add = tensor.removesuffix(rest)
                    if not strip or not add or _wraps(strip, add):
                        yield Rename(strip, add)


def _unnumbered(parts: list[str]) -> int:
    """How many names stand before the first number, the last two (module and parameter) not counted."""
    leading = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return max(0, min(leading, len(parts) - 2))


def _wraps(*prefixes: str) -> bool:
    """Whether all of them are of names that wrap the same model: that of pictures is never the one of text."""
    named = [prefix.rstrip(".").split(".") for prefix in prefixes]
    return (
        all(part in WRAPPERS for parts in named for part in parts) and len({not VISION.isdisjoint(parts) for parts in named}) == 1
    )


def _best(names: Collection[str], known: set[str], candidates: list[Rename]) -> Rename:
    return max(candidates, key=lambda rename: sum(rename(name) in known for name in names))


def unmatched(
    missing: Collection[str], own: Mapping[str, str], rename: Rename, offers: Offers, adapter: Path, base: Path
) -> UnmatchedAdapterError:
    """The error that says which of the names in `own` have no weight in the base, and what they might have meant."""
    stored = {name: slots[0].tensor for name, slots in offers.slots.items() if len(slots) == 1 and slots[0].whole}
    numbered: dict[tuple[str, ...], list[str]] = {}
    for name in stored:
        numbered.setdefault(_numbers(name), []).append(name)
    nearest = {}
    for count, name in enumerate(list(missing)[:20]):
        near = numbered.get(
            _numbers(rename(name)), list(stored) if count < 2 else []
        )  # comparing all of a large model takes seconds
        nearest[_module(own[name])] = [_module(stored[each]) for each in nearest_names(rename(name), near)]
    many = f"{len(missing)} of {len(own)}" if len(missing) < len(own) else f"none of the {len(own)}"
    verb = "have no tensor" if len(missing) < len(own) else "has a tensor"
    message = f"{printable(str(adapter))}: {many} adapter modules {verb} in {printable(str(base))}"
    if rename != Rename() and len(missing) < len(own):
        message += f" (names rewritten {rename})"
    if len(missing) == len(own):
        message += f", which holds {', '.join(printable(name) for name in sorted(stored.values())[:3])}, …"
    hint = "nothing was written; check that the adapter was trained on this base model"
    fused = [offers.withheld[rename(name)] for name in missing if rename(name) in offers.withheld]
    if fused:
        hint = (
            f"nothing was written; the base has {printable(fused[0])}, but how query, key and value or gate and up lie in a"
            " fused weight is not known for this model"
        )
    return UnmatchedAdapterError(message, unmatched=[_module(own[name]) for name in missing], nearest=nearest, hint=hint)


def _numbers(name: str) -> tuple[str, ...]:
    """Which layer, which expert."""
    return tuple(part for part in name.split(".") if part.isdigit())


def _module(tensor: str) -> str:
    return printable(tensor.removesuffix(".weight"))
