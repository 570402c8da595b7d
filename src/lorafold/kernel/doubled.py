"""Sums rounded to float64 that carry what float64 loses beside them: what `exact` asks first where its result is in float64.

The sums of cpu/float64.h, with the bound that is derived there, in operations on whole tiles; products are split as Dekker does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errorfree import halves, two_product, two_sum
from .factors import Factors

_TILE = 1 << 14  # elements at once, whose intermediate numbers stay in the cache
_UNIT = 2.0**-53


def doubled_sums(base: Tensor, factors: Factors, rows: Tensor, columns: Tensor, merged: Tensor) -> Tensor:
    """Fill `merged` with W + ΔW rounded to float64; (n,) the flat indices at which that is not certain.

    - `base`: (rows, columns) float64, W; `merged`: of its shape, contiguous; `factors`: of these rows
    - `rows`, `columns`: (rows,) and (columns,) float64, whose products are (R + 6) · 2⁻⁵³ · Σ_k |s B_ik A_kj| or more
    """
    scaled, rest = two_product(factors.given_B.double(), factors.scaling)  # s · B without error
    lora_A = factors.given_A.double()
    (high_B, low_B), (high_A, low_A) = halves(scaled), halves(lora_A)
    carried = bool((rest != 0).any())
    step, undecided = max(1, _TILE // max(1, base.shape[1])), []
    for start in range(0, base.shape[0], step):
        here = slice(start, start + step)
        sums, lost = torch.zeros_like(base[here]), torch.zeros_like(base[here])
        total, product, error, loss = (torch.empty_like(sums) for _ in range(4))
        for k in range(factors.r):
            b, high, low = (side[here, k, None] for side in (scaled, high_B, low_B))
            torch.mul(b, lora_A[k], out=product)
            torch.mul(high, high_A[k], out=error).sub_(product).addcmul_(high, low_A[k])
            error.addcmul_(low, high_A[k]).addcmul_(low, low_A[k])
            if carried:
                error.addcmul_(rest[here, k, None], lora_A[k])
            torch.add(sums, product, out=total)  # and what that loses, as `two_sum` has it
            product.sub_(torch.sub(total, sums, out=loss))
            torch.sub(sums, torch.sub(total, loss, out=loss), out=loss)
            lost.add_(error.add_(loss.add_(product)))
            sums, total = total, sums
        head, loss = two_sum(base[here], sums)
        loss += lost
        head, tail = two_sum(head, loss)
        error = torch.outer(rows[here] * ((factors.r + 6) * _UNIT), columns)
        error.add_(loss.abs_().add_(tail.abs(), alpha=2), alpha=2 * _UNIT)
        merged[here] = head + (tail + error)
        apart = (head + (tail - error) != merged[here]).view(-1)
        undecided.append(apart.nonzero().squeeze(1) + start * base.shape[1])
    return torch.cat(undecided)
