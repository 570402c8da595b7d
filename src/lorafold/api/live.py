"""Adapters of any kind merged into a model in memory, and taken out again, through the plan that files are merged by.

The model's tensors stand in for a checkpoint. So everything that the merging of files reads, resolves and computes (DoRA, experts,
attention's packed projections, trained rows, every format) holds here too, and the weights have the bits that the files would have.
The layers of `lorafold.nn.layers` are the other means for a model in memory: they can be trained, this can only merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import nn

from ..adapters.formats.peft.from_model import is_peft_model
from ..adapters.read_options import ReadOptions
from ..declared import picked
from ..errors import LayerError
from ..nn.layers.locks import model_lock
from ..nn.layers.ownership import check_all_local
from ..options import LiveArguments, MatchOptions, SumOptions
from ..planning.make import make_plan
from .given import AdapterLike, loaded, placed
from .in_memory import as_checkpoint, check_plain_model, survey
from .live_merge import LiveMerge as LiveMerge
from .live_merge import merge_by_plan, merge_own
from .verbs import takes, tells


@tells
@takes(SumOptions, MatchOptions, live=True)
def merge_into(
    model: nn.Module,
    adapters: Sequence[AdapterLike] | None = None,
    *,
    read_options: ReadOptions | None = None,
    undo_device: torch.device | str | None = None,
    **options: Unpack[LiveArguments],
) -> LiveMerge:
    """Merge adapters into the weights of `model`, in place; what it returns takes them out again.

    - `adapters`, `read_options`: as for `merge`, of any format and kind that it takes; summed before the one rounding. None where
      `model` is a model of PEFT: its own active adapters, with the factors that its layers have
    - `undo_device`: where the copies of the changed weights are kept; by default beside the weights
    - `**options`: as listed below

    A model of PEFT is without its layers until it is unmerged, as after `merge_and_unload`: what it was made of is a plain model
    then. It gets the very same layers back. What is merged last is unmerged first.

    The arithmetic is done on the CPU, a block at a time, whatever the weights' device.

    Raises what `merge` does for adapters that do not fit, `UnsupportedAdapterError` where the model's structure would have to
    change (another vocabulary, tied weights that would come apart), `LayerError` for weights that are sharded, computed from others
    or quantised, and for a model that has LoRA layers of lorafold or of other libraries; all tensors are then as they were.

    >>> import lorafold, torch
    >>> from lorafold import nn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> _ = nn.attach(model, "all-linear", r=2)
    >>> _ = nn.save_adapter(model, "tiny")
    >>> _ = nn.detach(model)
    >>> with lorafold.merge_into(model, ["tiny"]) as done:
    ...     done.merged  # and what was merged is in the weights
    True
    >>> done.merged  # the base again, bit for bit
    False
    """
    own = is_peft_model(model)
    what, match = picked(SumOptions, options), picked(MatchOptions, options)
    if own and adapters is None:
        return merge_own(model, what, match, undo_device)
    if own:
        raise LayerError(
            "merge_into: the model has layers of PEFT, whose adapters are merged without naming any: merge_into(model)",
            hint="load the others with PEFT's load_adapter and set_adapter, or merge into what its unload() returns",
        )
    if adapters is None:
        raise LayerError(
            "merge_into: the model has no layers of PEFT, and so no adapter of its own", hint="give a list of adapters"
        )
    given = loaded(adapters, read_options)
    with model_lock(model), torch.no_grad():
        check_plain_model(model, "merge_into")
        check_all_local(model)
        found = survey(model)
        checkpoint = as_checkpoint(found)
        chosen = placed(given, checkpoint)
        plan = make_plan(checkpoint, chosen, what, match)
        return merge_by_plan(model, plan, checkpoint, chosen, found, undo_device)
