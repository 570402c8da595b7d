"""One prefix rewrite that takes every name of an adapter to a tensor of the base.

The same model is saved with and without `model.`, inside a `module.` or an `_orig_mod.`, as part of a larger one. Which of these
it is shows only when all names are looked at together: a rewrite counts if it takes each of them to an existing tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import AmbiguousNameError, UnmatchedAdapterError, nearest_names, printable
from .families import WRAPPERS


@dataclass(frozen=True)
class Rename:
    """`strip` is taken off the front of a name that has it, then `add` is put there.

    >>> Rename("module.", "model.")("module.layers.0.q_proj.weight")
    'model.layers.0.q_proj.weight'
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.strip)

    def __str__(self) -> str:
        return f"'{printable(self.strip)}' → '{printable(self.add)}'" if self.strip or self.add else "as they are"


def find_rename(names: Collection[str], tensors: Collection[str], *, adapter: Path, base: Path, partial: bool = False) -> Rename:
    """The rewrite under which each of `names` (of tensors, as the adapter has them) is one of `tensors`; with `partial` that
    under which the most are, if any is.

    Raises `UnmatchedAdapterError` where there is none, listing what is left unmatched under the one that matches most, and
    `AmbiguousNameError` where there are several that lead to different places.
    """
    known = set(tensors)
    if known.issuperset(names):
        return Rename()
    candidates = list(dict.fromkeys(_candidates(names, tensors)))
    whole = [rename for rename in candidates if all(rename(name) in known for name in names)]
    places = {tuple(rename(name) for name in names): rename for rename in reversed(whole)}
    if len(places) > 1:
        first = next(iter(names))
        raise AmbiguousNameError(
            f"{printable(str(adapter))} fits {len(places)} places in {printable(str(base))}:\n"
            + "\n".join(f"  {printable(first)} could be {printable(rename(first))}" for rename in places.values()),
            hint="nothing was written; rename the adapter's tensors to those of the base that is meant",
        )
    if not places:
        best = _best(names, known, [Rename(), *candidates])
        if partial and any(best(name) in known for name in names):
            return best
        raise _unmatched(names, known, [Rename(), *candidates], adapter, base)
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
    return all(part in WRAPPERS for prefix in prefixes for part in prefix.rstrip(".").split("."))


def _best(names: Collection[str], known: set[str], candidates: list[Rename]) -> Rename:
    return max(candidates, key=lambda rename: sum(rename(name) in known for name in names))


def _unmatched(
    names: Collection[str], known: set[str], candidates: list[Rename], adapter: Path, base: Path
) -> UnmatchedAdapterError:
    best = _best(names, known, candidates)
    missing = [name for name in names if best(name) not in known]
    nearest = {}
    for name in missing[:20]:
        near = nearest_names(best(name), known)
        nearest[_module(name)] = [_module(each) for each in near]
    count = f"{len(missing)} of {len(names)}" if len(missing) < len(names) else f"none of the {len(names)}"
    verb = "have no tensor" if len(missing) < len(names) else "has a tensor"
    message = f"{printable(str(adapter))}: {count} adapter modules {verb} in {printable(str(base))}"
    if best != Rename() and len(missing) < len(names):
        message += f" (names rewritten {best})"
    if len(missing) == len(names):
        message += f", which holds {', '.join(printable(name) for name in sorted(known)[:3])}, …"
    return UnmatchedAdapterError(
        message,
        unmatched=[_module(name) for name in missing],
        nearest=nearest,
        hint="nothing was written; check that the adapter was trained on this base model",
    )


def _module(tensor: str) -> str:
    return printable(tensor.removesuffix(".weight"))
