"""What an adapter took out of a base weight before it was trained, computed again from that weight.

In float64, whatever PEFT computed in: its float32 leaves noise that no other machine repeats, and this is what the noise is around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.adapter import Residual
from ..errors import AdapterError
from ..update import LowRankUpdate

_TOLD_APART = 2.0**-22
"""Singular values nearer to each other than this, of the largest, are the same to a decomposition in float32: which of them an
adapter took was chance. So it is with columns of which this much, of their own length, is new."""


def taken_out(weight: Tensor, residual: Residual, shown: str) -> LowRankUpdate:
    """What W must be given to be the residual, minus what was taken out: of rank `residual.r`, float64.

    - `weight`: (out, in), of any floating dtype, all of it
    - `shown`: the tensor's name, for errors

    PEFT, `tuners/lora/layer.py` (`pissa_init`, `olora_init`) and `tuners/lora/variants.py` (`KasaLinearVariant`).

    Raises `AdapterError` where the weight has no such part, or does not tell which it is.

    >>> update = taken_out(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Residual("pissa", 1), "w")
    >>> (torch.diag(torch.tensor([3.0, 2.0, 1.0])) + update.dense(torch.float32)).diag().abs()
    tensor([0., 2., 1.])
    """
    W = weight.double()
    r, smaller = residual.r, min(W.shape)
    if r > smaller or (residual.kind == "kasa" and r == smaller):
        raise AdapterError(
            f"{shown} is {list(W.shape)}, of which nothing of rank {r} can be taken out",
            hint="the adapter was not trained on this base model",
        )
    if residual.kind == "olora":
        return _first_columns(W, r, residual.factor, shown)
    left, values, right = torch.linalg.svd(W, full_matrices=False)
    chosen = slice(0, r) if residual.kind == "pissa" else slice(smaller - r, smaller)
    edge = r if residual.kind == "pissa" else smaller - r
    if 0 < edge < smaller and values[0] > 0 and values[edge - 1] - values[edge] <= _TOLD_APART * values[0] < values[edge - 1]:
        raise _not_told(shown, f"its singular values {edge} and {edge + 1} are the same")
    return LowRankUpdate(right[chosen].contiguous(), left[:, chosen] * values[chosen], -1.0)


def _first_columns(W: Tensor, r: int, factor: float, shown: str) -> LowRankUpdate:
    """Q[:, :r] R[:r] of W = QR: W projected on what its first r columns span, whatever the signs in Q."""
    Q, R = torch.linalg.qr(W[:, :r])
    new, whole = R.diagonal().abs(), torch.linalg.vector_norm(W[:, :r], dim=0)
    if bool((new <= _TOLD_APART * whole).any()):
        raise _not_told(shown, f"its first {r} columns are not independent")
    return LowRankUpdate(Q.T @ W, Q.contiguous(), -factor)


def _not_told(shown: str, why: str) -> AdapterError:
    return AdapterError(
        f"{shown}: what was taken out of it before training cannot be told, since {why}",
        hint="save the adapter as plain LoRA with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
    )


def nbytes_needed(rows: int, columns: int) -> int:
    """Bytes that `taken_out` takes for a weight, itself included: from above, as LAPACK's decomposition of it was measured."""
    smaller = min(rows, columns)
    return 8 * (2 * rows * columns + smaller * (rows + columns)) + 36 * smaller * smaller
