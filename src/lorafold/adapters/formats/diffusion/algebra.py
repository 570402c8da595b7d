"""How the tensors of LoRA, LoCon, LoHa and LoKr become `lora_A` and `lora_B`: the algebra of each, and its shapes.

ΔW is (out, in, *kernel). Each function checks what its tensors must be to each other; which tensors there are, and the factor
before them, is for the readers. The formulas are those by which LyCORIS computes a layer's output (`lycoris/modules`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ....errors import AdapterError, printable
from ....files.expression import Identity, Matrix, Permuted, Reshaped
from ....files.products import Kron, Product, RowKron, Times
from ....files.safetensors.info import TensorInfo
from ...adapter import Scaling
from ...transform import ElementProduct, StoredMultiplicand
from ..single_file import Parts, check_shape

AS_IT_IS = "a difference as it is"
"""Why the factor of a whole difference is 1."""

WHOLE = Scaling(1.0, 1, 1.0, AS_IT_IS)


class FactorPair(NamedTuple):
    """`lora_A` (rank, in, *kernel), `lora_B` (out, rank), and the `dim` that alpha is divided by; None where nothing is.

    `product`: what they are made of, as it is in `AdapterModule`.
    """

    lora_A: Matrix
    lora_B: Matrix
    dim: int | None
    product: ElementProduct | None = None


def pair(parts: Parts, shown: str) -> FactorPair:
    """ΔW = up @ down: down (r, in, *kernel), up (out, r, 1, …)."""
    down, up = parts["lora_down"], parts["lora_up"]
    _check_dims(down, 2, shown)
    fits = len(up.shape) == len(down.shape) and up.shape[1] == down.shape[0] and all(size == 1 for size in up.shape[2:])
    check_shape(up, f"(out, {down.shape[0]}{', 1' * (len(down.shape) - 2)}) beside '{_name(down)}' {list(down.shape)}", fits, shown)
    return FactorPair(down, up, down.shape[0])


def tucker_pair(parts: Parts, shown: str) -> FactorPair:
    """ΔW[o, i, k] = Σ up[o, p] · mid[p, q, k] · down[q, i]: down (r, in, 1, …), mid (r, r, *kernel), up (out, r, 1, …)."""
    down, mid, up = parts["lora_down"], parts["lora_mid"], parts["lora_up"]
    _check_dims(mid, 3, shown)
    dims, r = len(mid.shape), down.shape[0] if down.shape else 0
    check_shape(down, f"(r, in{', 1' * (dims - 2)})", len(down.shape) == dims and _ones(down), shown)
    check_shape(up, f"(out, {r}{', 1' * (dims - 2)})", len(up.shape) == dims and _ones(up) and up.shape[1] == r, shown)
    check_shape(mid, f"({r}, {r}, …)", mid.shape[:2] == (r, r), shown)
    return FactorPair(_tucker(mid, Reshaped(down, down.shape[:2])), Reshaped(up, up.shape[:2]), r)


def hadamard(parts: Parts, shown: str) -> FactorPair:
    """ΔW = (w1_a @ w1_b) ∘ (w2_a @ w2_b), each w_a (out, r) and w_b (r, in · kernel) or (r, in, *kernel).

    With t (r, r, *kernel) each side is Σ t[p, q, k] · w_a[p, o] · w_b[q, i], with w_a (r, out) and w_b (r, in).
    """
    sides = [_side(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}"), shown) for n in (1, 2)]
    (a1, b1), (a2, b2) = ((_flat(A), B) for A, B in sides)  # (r, in · kernel), (out, r)
    check_shape(parts["hada_w2_b"], f"as '{_name(parts['hada_w1_b'])}' is, but for its rank", a1.shape[1] == a2.shape[1], shown)
    check_shape(parts["hada_w2_a"], f"as '{_name(parts['hada_w1_a'])}' is, but for its rank", b1.shape[0] == b2.shape[0], shown)
    shape = sides[0][0].shape[1:]
    if shape != sides[1][0].shape[1:]:
        raise AdapterError(
            f"{shown}: one of its factors is {list(shape)} but for its rank, the other {list(sides[1][0].shape[1:])}"
        )
    out, columns = b1.shape[0], a1.shape[1]
    A: Matrix
    B: Matrix
    if b1.shape[1] * b2.shape[1] <= min(out, columns):
        A, B = Permuted(RowKron(Permuted(a1), Permuted(a2))), RowKron(b1, b2)
    else:  # the product of both ranks is more than any matrix of this shape has
        A, B = _whole(Times(Product(b1, a1), Product(b2, a2)))
    dim = parts["hada_w1_b"].shape[0]
    return FactorPair(
        Reshaped(A, (A.shape[0], *shape)), B, dim, ElementProduct(StoredMultiplicand(a1, b1), StoredMultiplicand(a2, b2))
    )


def kronecker(parts: Parts, shown: str) -> FactorPair:
    """ΔW = w1 ⊗ w2 over the two dimensions of the matrix, w1 the same for all of the kernel; each whole or w_a @ w_b.

    w2 (c, d, *kernel), or w2_a (c, r) and w2_b (r, d · kernel) or (r, d, *kernel), or w2_a (r, c), w2_b (r, d) and t2
    (r, r, *kernel). alpha is divided by the rows of w2_b, else of w1_b; where both are whole there is no factor at all.
    """
    one, two = (_kronecker_side(parts, n, shown) for n in (1, 2))
    check_shape(parts.get("lokr_w1") or parts["lokr_w1_b"], "a matrix", len(one[0].shape) == 2, shown)
    (a1, b1), (a2, b2) = one, (_flat(two[0]), two[1])
    inner, kernel = a1.shape[1] * two[0].shape[1], two[0].shape[2:]
    out, columns = b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1]
    A: Matrix
    B: Matrix
    if b1.shape[1] * b2.shape[1] <= min(out, columns):
        A, B = Kron(a1, a2), Kron(b1, b2)
    else:
        A, B = _whole(Kron(Product(b1, a1), Product(b2, a2)))
    ranked = parts.get("lokr_w2_b") or parts.get("lokr_w1_b")
    w1, w2 = parts.get("lokr_w1"), parts.get("lokr_w2")
    product = ElementProduct(
        StoredMultiplicand(a1, b1) if w1 is None else StoredMultiplicand(w1),
        StoredMultiplicand(a2, b2) if w2 is None else StoredMultiplicand(_flat(w2)),
        kronecker=True,
    )
    return FactorPair(Reshaped(A, (A.shape[0], inner, *kernel)), B, None if ranked is None else ranked.shape[0], product)


def whole(info: TensorInfo, shown: str) -> FactorPair:
    """ΔW is the tensor itself, (out, in, *kernel) or a vector (out,)."""
    if len(info.shape) == 1:
        return FactorPair(Reshaped(Identity(1), (1,)), Reshaped(info, (info.shape[0], 1)), None)
    _check_dims(info, 2, shown)
    A, B = _whole(_flat(info))
    return FactorPair(Reshaped(A, (A.shape[0], *info.shape[1:])), B, None)


def _whole(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """A and B of a matrix of which no factors are known: one of the two is an identity, that of the shorter side."""
    rows, columns = matrix.shape
    return (matrix, Identity(rows)) if rows <= columns else (Identity(columns), matrix)


def _side(w_a: TensorInfo, w_b: TensorInfo, t: TensorInfo | None, shown: str) -> tuple[Matrix, Matrix]:
    """A (r, in, *kernel) and B (out, r) of one side of a product: of w_a and w_b, or of these and a core tensor t."""
    _check_dims(w_a, 2, shown, exactly=True)
    _check_dims(w_b, 2, shown, exactly=t is not None)
    r = w_b.shape[0]
    if t is None:
        check_shape(w_a, f"(…, {r}) beside '{_name(w_b)}' {list(w_b.shape)}", w_a.shape[1] == r, shown)
        return w_b, w_a
    check_shape(w_a, f"({r}, …) beside '{_name(w_b)}' {list(w_b.shape)}", w_a.shape[0] == r, shown)
    check_shape(t, f"({r}, {r}, …)", t.shape[:2] == (r, r) and len(t.shape) > 2, shown)
    return _tucker(t, w_b), Permuted(w_a)


def _kronecker_side(parts: Parts, n: int, shown: str) -> tuple[Matrix, Matrix]:
    """A and B of factor number `n`: of the shorter side's rank where it is stored whole."""
    full = parts.get(f"lokr_w{n}")
    if full is None:
        return _side(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"), shown)
    _check_dims(full, 2, shown)
    A, B = _whole(_flat(full))
    return Reshaped(A, (A.shape[0], *full.shape[1:])), B


def _tucker(t: TensorInfo, down: Matrix) -> Matrix:
    """(p, in, *kernel): Σ_q t[p, q, k] · down[q, i]."""
    p, q, *kernel = t.shape
    last = len(t.shape) - 1
    rows = Reshaped(Permuted(t, (0, *range(2, last + 1), 1)), (p * math.prod(kernel), q))
    product = Reshaped(Product(rows, down), (p, *kernel, down.shape[1]))  # (p, *kernel, in)
    return Permuted(product, (0, last, *range(1, last)))


def _flat(matrix: Matrix) -> Matrix:
    """The matrix that is (rows, everything else)."""
    return matrix if len(matrix.shape) == 2 else Reshaped(matrix, (matrix.shape[0], math.prod(matrix.shape[1:])))


def _ones(info: TensorInfo) -> bool:
    return all(size == 1 for size in info.shape[2:])


def _check_dims(info: TensorInfo, least: int, shown: str, *, exactly: bool = False) -> None:
    fits = len(info.shape) == least if exactly else len(info.shape) >= least
    check_shape(info, f"of {least}{'' if exactly else ' or more'} dimensions", fits and 0 not in info.shape, shown)


def _name(info: TensorInfo) -> str:
    return printable(info.name)
