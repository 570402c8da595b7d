"""The two orders that the rows of queries and keys come in: rotary embedding turns pairs of rows, and which rows pair up differs.

transformers pairs row i of a head with row i + d / 2; Meta's code, llama.cpp and torchtune pair rows 2i and 2i + 1. The same model
in the other order has its rows permuted, and so has lora_B (transformers, `convert_llama_weights_to_hf.py`, `permute`).
"""

from __future__ import annotations

from ...files.expression import Matrix, Permuted, Reshaped


def to_halves(matrix: Matrix, heads: int) -> Matrix:
    """`matrix` (rows, …) with neighbouring pairs, in transformers' order; `heads` must divide half of the rows.

    >>> from lorafold.files.expression import Zeros
    >>> to_halves(Zeros((8, 3)), 2).shape
    (8, 3)
    """
    rows, *rest = matrix.shape
    apart = Reshaped(matrix, (heads, rows // heads // 2, 2, *rest))
    return Reshaped(Permuted(apart, (0, 2, 1, *range(3, 3 + len(rest)))), matrix.shape)


def to_pairs(matrix: Matrix, heads: int) -> Matrix:
    """`matrix` (rows, …) in transformers' order, with neighbouring pairs: the inverse of `to_halves`."""
    rows, *rest = matrix.shape
    apart = Reshaped(matrix, (heads, 2, rows // heads // 2, *rest))
    return Reshaped(Permuted(apart, (0, 2, 1, *range(3, 3 + len(rest)))), matrix.shape)
