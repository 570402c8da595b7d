"""What an encoding is: the stored tensors that a weight is made of, the numbers that they state, how codes are written back.

The number is what codes and scales state, as a float64: products and differences exact, a quotient rounded once. A format is a
function that finds its weights among the stored tensors (`Find`); with others it shares the nodes that it is composed of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ...files.expression import Matrix, Node, Permuted, narrow
from ...files.safetensors.info import TensorInfo

Read: TypeAlias = Callable[[TensorInfo], Tensor]
"""Gives the numbers of a stored tensor, or of slices of one."""

Stored: TypeAlias = Mapping[str, TensorInfo]
"""All tensors that the shards hold, by name, whatever they stand for."""

Config: TypeAlias = Mapping[str, Any]
"""The part of a configuration file that says how a model is quantised; empty where there is none."""


class Encode(Protocol):
    """How numbers become codes again, with the scales, zeros and minima that are stored."""

    def __call__(self, numbers: Tensor, rows: Matrix, read: Read, uniform: Tensor | None) -> Tensor:
        """The codes for `numbers`: the bytes of those rows of the stored codes, as the tensor that `read` gives for them.

        - `numbers`: (count, …) float64, of the shape of `rows`; the sum, never through a narrower type
        - `rows`: rows of `Encoded.natural` as `narrow` makes them, so that scales and old codes are found in it
        - `uniform`: of the same shape, in (0, 1): the neighbour farther from zero is taken where the share of the way to it exceeds
          this number; None takes the nearest

        A number that `rows` states already gets its own code, with all its bits. One out of range gets the code at the end of it.
        """


@dataclass(frozen=True)
class Encoded:
    """One weight of a quantised checkpoint.

    - `encoding`: what people call it, such as "bitsandbytes NF4"
    - `stored`: names of the stored tensors that belong to it, the codes first; they are no tensors of the model's
    - `decoded`: its numbers, of the shape that the model has; where the codes are stored transposed, a `Permuted` of `natural`
    - `bits`: of one code
    - `companions`: stored tensors that go with its activations or a cache (``input_scale``), which mean nothing for floats
    - `encode`: how it is written back; None where that cannot be done
    - `together`: how many rows of `natural` are the fewest whose codes are whole rows of the stored codes, or whole bytes of them
    - `of_floats`: whether floats are stored, of which `decoded` makes what they became when a model was loaded
    """

    encoding: str
    stored: tuple[str, ...]
    decoded: Node
    bits: float
    companions: tuple[str, ...] = ()
    encode: Encode | None = None
    together: int = 1
    of_floats: bool = False

    @property
    def natural(self) -> Matrix:
        """The numbers in the order of their codes: the decoded ones, or these with the last two dimensions exchanged."""
        return self.decoded.of if isinstance(self.decoded, Permuted) else self.decoded

    def rows(self, start: int, count: int) -> Matrix:
        """Slices of `natural` along its first dimension, from `start` on."""
        return narrow(self.natural, 0, start, count)


class Find(Protocol):
    """Finds the weights of one family of formats."""

    def __call__(self, stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
        """The weights, each with the name that the model has for it. They are told by the tensors beside them, never by trying.

        `config` is held against what is found. `read` is for small tensors, such as JSON in bytes or zeros to be told apart.

        Raises `CheckpointError` where tensors contradict each other or `config`: file, tensor, expected and found, and a hint.
        """


def transposed(encoded: Encoded) -> Encoded:
    """The same weight for a model that has it the other way round; its codes stay as they are stored."""
    decoded = encoded.decoded
    if isinstance(decoded, Permuted) and isinstance(decoded.of, Node):
        return replace(encoded, decoded=decoded.of)
    return replace(encoded, decoded=Permuted(decoded))
