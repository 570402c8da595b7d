"""How many threads fit into a given memory: an estimate from above, tensor by tensor, before anything is read.

What is counted is what a merge takes on top of the interpreter and its libraries: blocks, the kernel's tiles, factors.
"""

from __future__ import annotations

import math
import os

from ..errors import InputError, printable
from ..files.evaluation import footprint, rows_of
from ..files.safetensors.info import BITS, TensorInfo
from ..planning.plan import MergePlan, Step
from .blocks import block_bytes, blocks_of, passes_of
from .residual import DECOMPOSED, nbytes_needed
from .sources import Sources
from .threads import AHEAD

FIXED = 24_000_000
"""Bytes beside blocks and factors: headers, what moves untouched bytes where the system cannot, stacks."""

TILES = 16_000_000
"""Bytes of the kernel's tiles, one set a thread."""


def threads_within(sources: Sources, limit: int) -> int:
    """The most threads, up to one per CPU, with which no tensor needs more than `limit` bytes.

    Raises `InputError` naming the tensor where not even one thread fits.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    steps = [step for step in sources.plan.steps if step.action != "copy"]
    needed = {step.tensor: _needed(step, sources.plan, sources, 1) for step in steps}
    for adapter in sources.adapters:  # its tensors are looked through one by one
        for info in adapter.header.tensors.values():
            needed[info.name] = FIXED + 2 * info.nbytes
    name = max(needed, key=lambda each: needed[each], default=None)
    if name is not None and needed[name] > limit:
        raise InputError(
            f"tensor '{printable(name)}' needs {needed[name]} bytes of memory, more than `max_memory={limit}`",
            hint="nothing was written; allow more",
        )
    fit = 1
    while fit < processors and all(_needed(step, sources.plan, sources, fit + 1) <= limit for step in steps):
        fit += 1
    return fit


def _needed(step: Step, plan: MergePlan, sources: Sources, threads: int) -> int:
    """Bytes for `step`: in each thread a block read, a block made, a block read back, tiles and wide factors; all factors twice.

    The blocks are twice as many, since proving has its own. They are wide where a sum is rescaled, or made of what a residual was
    taken out of; those of a base tensor that is not stored as it is need what it is made of besides.
    """
    block = next(iter(blocks_of(step)), None)
    if block is None:
        return FIXED
    start = sources.origin(step)
    nodes = [start] if step.action != "encode" else [start, sources.checkpoint.encoded[str(step.source)].natural]
    of_rows = [
        rows_of(node, block.start, block.count, block.columns) for node in dict.fromkeys(nodes) if not isinstance(node, TensorInfo)
    ]
    made = sum(map(footprint, of_rows))
    dtypes = [step.dtype, start.dtype, *("F64" for addend in step.addends if addend.dora or addend.residual or addend.transform)]
    one = 3 * max(block.numel * BITS.get(dtype, 64) // 8 for dtype in dtypes) + made
    through = next(passes_of(step))
    if step.coded is not None:  # its codes, or what is made of them, go from file to file in larger blocks
        one += block_bytes(through, step.dtype)
    factors, rank = 0, 0
    for addend in step.addends:
        module = sources.adapters[addend.adapter].modules[addend.module]
        factors += module.lora_A.nbytes + module.lora_B.nbytes
        rank += module.lora_A.shape[0] if module.lora_A.shape else 1
    columns = math.prod(step.shape[1:])
    computed = any(addend.residual not in (None, "given") for addend in step.addends)
    residual = computed and step.replacement is None
    whole = nbytes_needed(step.shape[0], columns, rank) if residual else 0
    whole = max(whole, min(threads * whole, DECOMPOSED))  # of several weights at once, where they are small
    return FIXED + whole + AHEAD * threads * one + threads * (TILES + 16 * rank * (columns + block.count)) + 3 * factors
