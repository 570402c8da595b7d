"""Rules that bring one spelling of a dotted name to another: what a family's tensors were called, and what they are called now.

A rule is a pair of runs of whole names, ``("block_sparse_moe", "mlp")``. ``*`` stands for one name whatever it is, which is carried
over; ``^`` at the beginning ties the rule to the front of the name.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

Rule = tuple[str, str]


def respelled(name: str, rules: Iterable[Rule]) -> str:
    """`name` with each of `rules` applied to the first place that it fits, in their order.

    >>> respelled("h.0.block_sparse_moe.experts.3.w1", [("block_sparse_moe", "mlp"), ("experts.*.w1", "experts.*.gate_proj")])
    'h.0.mlp.experts.3.gate_proj'
    >>> respelled("model.language_model.norm.weight", [("^language_model", "model.language_model")])
    'model.language_model.norm.weight'
    """
    for old, new in rules:
        front, run, needed = _parsed(old)
        if not all(word in name for word in needed):  # which spares most names the rest
            continue
        parts = name.split(".")
        last = 0 if front else len(parts) - len(run)
        for start in range(last + 1):
            here = parts[start : start + len(run)]
            if len(here) == len(run) and all(want in ("*", found) for want, found in zip(run, here, strict=True)):
                stars = iter([found for want, found in zip(run, here, strict=True) if want == "*"])
                put = [next(stars, part) if part == "*" else part for part in new.split(".") if part]
                name = ".".join([*parts[:start], *put, *parts[start + len(run) :]])
                break
    return name


@cache
def _parsed(old: str) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether the rule is tied to the front; its names; and those of them that must be there, the last ones first."""
    run = tuple(old.removeprefix("^").split("."))
    return old.startswith("^"), run, tuple(name for name in reversed(run) if name != "*")
