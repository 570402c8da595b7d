"""What an adapter took out of a base weight before it was trained, computed again from that weight.

In more than float64, whatever PEFT computed in: its float32 leaves noise that no other machine repeats, and this is what the noise
is around. A decomposition in float64 is off by other bits on every machine, too; so its vectors are corrected once, to about twice
their digits, and what is left of the weight is then rounded to the same bits everywhere, but for what is that near to a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.adapter import Residual
from ..errors import AdapterError
from ..kernel.errorfree import product, two_product, two_sum
from ..kernel.update import LowRankUpdate

_TOLD_APART = 2.0**-22
"""Singular values nearer to each other than this, of the largest, are the same to a decomposition in float32: which of them an
adapter took was chance. So it is with columns of which this much, of their own length, is new."""


def taken_out(weight: Tensor, residual: Residual, shown: str) -> LowRankUpdate:
    """What W must be given to be the residual, minus what was taken out: of rank 3 · `residual.r`, float64.

    - `weight`: (out, in), of any floating dtype, all of it
    - `shown`: the tensor's name, for errors

    PEFT, `tuners/lora/layer.py` (`pissa_init`, `olora_init`) and `tuners/lora/variants.py` (`KasaLinearVariant`).

    Raises `AdapterError` where the weight has no such part, or does not tell which it is.

    >>> update = taken_out(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Residual("pissa", 1), "w")
    >>> (torch.diag(torch.tensor([3.0, 2.0, 1.0])) + update.dense(torch.float32)).diag().abs()
    tensor([0., 2., 1.])
    """
    if residual.kind == "given":
        raise ValueError("what is given is not computed")
    W = weight.double()
    r, smaller = residual.r, min(W.shape)
    if r > smaller or (residual.kind == "kasa" and r == smaller):
        raise AdapterError(
            f"{shown} is {list(W.shape)}, of which nothing of rank {r} can be taken out",
            hint="the adapter was not trained on this base model",
        )
    if residual.kind == "olora":
        Q, D = _span_of_columns(W[:, :r], shown)
        return _projected(W, Q, D, product(Q.T, W), -residual.factor)
    turned = W.shape[0] > W.shape[1]
    S = W.T.contiguous() if turned else W  # (smaller, larger)
    edge = r if residual.kind == "pissa" else smaller - r
    left, values = _left_singular(S, edge)
    if 0 < edge < smaller and values[edge - 1] - values[edge] <= _TOLD_APART * values[0] < values[edge - 1]:
        raise _not_told(shown, f"its singular values {edge} and {edge + 1} are the same")
    chosen = torch.arange(smaller, device="cpu") < edge
    Q, D, T = _singular_space(S, left, values, chosen if residual.kind == "pissa" else ~chosen)
    update = _projected(S, Q, D, T, -1.0)
    return update.T if turned else update


_APART = 2.0**-14
"""Squares of singular values that are further from each other than this, of the largest, have vectors from S Sᵀ whose error, 2⁻⁵²
by some tens over this, is no more after one correction than that of vectors from S of values that can just be told apart."""


def _left_singular(S: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """All left singular vectors of S, (smaller, smaller), and the singular values, the largest first.

    Those of S Sᵀ, which take a fourth of the time, unless the values at the `edge` of what is wanted are too near to each other.
    """
    squares, vectors = torch.linalg.eigh(S @ S.T)
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
    smaller = squares.numel()
    if not 0 < edge < smaller or squares[edge - 1] - squares[edge] > _APART * squares[0]:
        return vectors, squares.sqrt_()
    left, values, _ = torch.linalg.svd(S, full_matrices=False)
    return left, values


def _singular_space(S: Tensor, left: Tensor, values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The `chosen` U₁ of all `left` singular vectors of S, what must be added to them to span their space to twice the digits, and
    U₁ᵀ S as a sum of two.

    The space of the chosen is that of U₁ + U₂ X, where X_ij = (U₂ᵀ (S Sᵀ U₁ − U₁ σ²))_ij / (σ_j² − σ_i²) but for squares of what
    is small. What U₂ᵀ is applied to is small itself, and is all that is computed in more than float64.
    """
    U1, U2 = left[:, chosen], left[:, ~chosen]
    inside, outside = values[chosen] ** 2, values[~chosen] ** 2
    high, low = product(S.T, U1)  # Sᵀ U₁
    above, below = product(S, high)
    scaled, lost = two_product(U1, inside.expand_as(U1))
    total, error = two_sum(above, -scaled)
    off = total + (error + (below + S @ low - lost))
    gaps = inside[None, :] - outside[:, None]
    X = torch.where(gaps.abs() > 2.0**-60 * values[0] ** 2, U2.T @ off / gaps, 0.0)
    return U1, U2 @ X, (high.T, low.T)


def _span_of_columns(columns: Tensor, shown: str) -> tuple[Tensor, Tensor]:
    """Q of QR of `columns`, and what must be added to it to span just what they do: (columns − Q R) R⁻¹."""
    Q, R = torch.linalg.qr(columns)
    new, whole = R.diagonal().abs(), torch.linalg.vector_norm(columns, dim=0)
    if bool((new <= _TOLD_APART * whole).any()):
        raise _not_told(shown, f"its first {columns.shape[1]} columns are not independent")
    high, low = product(Q, R)
    return Q, torch.linalg.solve_triangular(R, (columns - high) - low, upper=True, left=False)


def _projected(S: Tensor, Q: Tensor, D: Tensor, applied: tuple[Tensor, Tensor], factor: float) -> LowRankUpdate:
    """`factor` times S projected on the span of Q + D, where Q is orthonormal but for δ, which is as small as D.

    (Q + D)(I − δ)(Q + D)ᵀ S = Q T + Q (t − δ T) + D T but for squares of what is small, with T + t = (Q + D)ᵀ S.

    `applied`: Qᵀ S as a sum of two.
    """
    high, low = product(Q.T, Q)
    delta = (high - torch.eye(Q.shape[1], dtype=torch.float64, device="cpu")) + low + Q.T @ D + D.T @ Q
    T, t = applied
    return LowRankUpdate(torch.cat([T, t + D.T @ S - delta @ T, T]), torch.cat([Q, Q, D], 1), factor)


def _not_told(shown: str, why: str) -> AdapterError:
    return AdapterError(
        f"{shown}: what was taken out of it before training cannot be told, since {why}",
        hint="save the adapter as plain LoRA with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
    )


DECOMPOSED = 200_000_000
"""Bytes that weights which are decomposed at once may take; a larger one is alone."""


def nbytes_needed(rows: int, columns: int, r: int) -> int:
    """Bytes that `taken_out` takes for a weight, itself included: from above, as LAPACK's decomposition of it was measured.

    The slices of `doubled` come after that, those of the weight one at a time.
    """
    smaller = min(rows, columns)
    decomposed = 8 * (2 * rows * columns + smaller * (rows + columns)) + 36 * smaller * smaller
    sliced = 8 * (6 * rows * columns + 5 * smaller * smaller + 60 * r * (rows + columns))
    return max(decomposed, sliced)
