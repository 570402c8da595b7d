"""A line of the table of names: which weight of the makers is which of diffusers', whole, joined, halves exchanged, or transposed.

`*` stands for a number, `**` at the end for the rest of a name, `{a|b}` for one of several words, the same ones on both sides, in
their order. A line is for the weight and the bias of a module, or for one tensor where it begins with a colon::

    blocks.*.{q|k} ~ blocks.*.attn.{to_q|to_k}       the same
    blocks.*.qkv = blocks.*.to_q + blocks.*.to_k     rows of one after rows of the other, equally many
    linear1 = to_q[in] + to_k[in] + proj_mlp         as many rows as the weight has inputs, and the rest
    final.1 ~ norm_out.linear halves                 the second half of the rows first
    :text_projection ~ text_projection.weight turned the transpose
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

Way = Literal["", "halves", "turned"]
_CHOICE = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class Share:
    """A weight of diffusers' in one of the makers': its name, and whether it has as many rows as the makers' has inputs."""

    name: str
    inputs: bool = False


@dataclass(frozen=True)
class Rule:
    """What one weight of the makers is made of: `shares` of diffusers', one after another; `way`: as it is, or how it differs."""

    maker: str
    shares: tuple[Share, ...]
    way: Way = ""


def rules_of(lines: Iterable[str]) -> Iterator[Rule]:
    """The rules that `lines` stand for.

    >>> [rule.maker for rule in rules_of(["{a|b}.* ~ c.{d|e}.*"])]
    ['a.*.weight', 'a.*.bias', 'b.*.weight', 'b.*.bias']
    """
    for line in lines:
        maker, sign, rest = line.removeprefix(":").split(maxsplit=2)
        if sign not in ("~", "="):
            raise ValueError(line)
        words = rest.split()
        way: Way = "halves" if words[-1] == "halves" else "turned" if words[-1] == "turned" else ""
        shares = [Share(word.removesuffix("[in]"), word.endswith("[in]")) for word in words if word not in ("+", way)]
        kinds = ("",) if line.startswith(":") or maker.endswith("**") else (".weight", ".bias")
        for choice in product(*(range(len(found.split("|"))) for found in _CHOICE.findall(maker))):
            for kind in kinds:
                chosen = tuple(Share(_chosen(share.name, choice) + kind, share.inputs) for share in shares)
                yield Rule(_chosen(maker, choice) + kind, chosen, way)


def _chosen(pattern: str, choice: tuple[int, ...]) -> str:
    """`pattern` with one word for each of its choices.

    >>> _chosen("a.{b|c}.{d|e}", (0, 1))
    'a.b.e'
    """
    numbers = iter(choice)
    return _CHOICE.sub(lambda found: found[1].split("|")[next(numbers)], pattern)


@dataclass(frozen=True)
class Found:
    """The patterns that a name fits: which, and what its stars stand for."""

    pattern: str
    stars: tuple[str, ...]

    def put(self, pattern: str) -> str:
        """The name that another pattern has for the same stars."""
        stars = iter(self.stars)
        return ".".join(next(stars) if part in ("*", "**") else part for part in pattern.split("."))


def fitting(name: str, patterns: Mapping[str, object]) -> Found | None:
    """The pattern that `name` fits, the one with the fewest stars; None where it fits none.

    >>> fitting("blocks.3.net.0.weight", {"blocks.*.net.0.weight": 1}).stars
    ('3',)
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for count in range(len(numbers) + 1):
        for starred in combinations(numbers, count):
            shown = ["*" if i in starred else part for i, part in enumerate(parts)]
            if (whole := ".".join(shown)) in patterns:
                return Found(whole, tuple(parts[i] for i in starred))
            for end in range(len(parts) - 1, 0, -1):
                if all(i < end for i in starred) and (front := ".".join([*shown[:end], "**"])) in patterns:
                    return Found(front, (*(parts[i] for i in starred), ".".join(parts[end:])))
    return None
