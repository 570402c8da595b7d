"""What the table says of a family of models: how its files are told by their tensors, and its makers' names beside diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

Side = Literal["makers", "diffusers"]


@dataclass(frozen=True)
class Makers:
    """The models of one code base.

    - `makers`, `diffusers`: tensors that tell a base in these names; of `makers` all of one of several sets
    - `lines`: of the table, or what makes them of the names of a base's tensors
    - `aliases`: lines with what adapters also call a weight, or a part of one
    - `text`: whether it is a text encoder
    - `kohya`: in whose names kohya's files have it, given the names of a base's tensors
    """

    name: str
    makers: tuple[tuple[str, ...], ...]
    diffusers: tuple[str, ...]
    lines: tuple[str, ...] | Callable[[Collection[str]], Iterator[str]]
    text: bool = False
    aliases: tuple[str, ...] = ()
    kohya: Callable[[Collection[str]], Side] = lambda names: "makers"

    def side(self, names: Collection[str]) -> Side | None:
        """In whose names the base with the tensors `names` is; None where it is of another family."""
        if any(all(name in names for name in each) for each in self.makers):
            return "makers"
        return "diffusers" if all(name in names for name in self.diffusers) else None

    def lines_for(self, names: Collection[str]) -> Iterator[str]:
        """The lines for the base with the tensors `names`; `{last}` in them is the number of its last double block."""
        if callable(self.lines):
            yield from self.lines(names)
            return
        numbers = [int(name.split(".")[1]) for name in names if name.startswith(("joint_blocks.", "transformer_blocks."))]
        for line in self.lines:
            yield line.replace("{last}", str(max(numbers, default=0)))
