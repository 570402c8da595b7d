"""A plan as JSON and back: equal after the round trip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PlanError
from ..options import SumOptions
from .plan import FORMAT, Addend, MergePlan, NewRows, PlannedAdapter, PlannedShard, Step


def plan_to_json(plan: MergePlan) -> dict[str, Any]:
    """`plan` as a JSON object."""
    return plan.to_json()


def plan_from_json(value: Any) -> MergePlan:
    """The plan that `plan_to_json` made `value` of.

    Raises `PlanError` where it is not one.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise PlanError(f"a plan of format {FORMAT} is expected, found {found!r}")
    try:
        fields = {name: entry for name, entry in value.items() if name != "format"}
        return MergePlan(
            **{
                **fields,
                "adapters": tuple(PlannedAdapter(**adapter) for adapter in fields["adapters"]),
                "options": SumOptions(**fields["options"]),
                "shards": tuple(
                    PlannedShard(shard["name"], tuple(_step(step) for step in shard["steps"])) for shard in fields["shards"]
                ),
                "notes": tuple(fields["notes"]),
                "unmatched": tuple(fields["unmatched"]),
            }
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as cause:
        raise PlanError(f"the plan cannot be read: {type(cause).__name__}: {cause}", hint="make it anew") from None


def _step(value: dict[str, Any]) -> Step:
    addends = tuple(
        Addend(
            **{
                **addend,
                "rows": _range(addend["rows"]),
                "section": _range(addend["section"]),
                "stored": tuple(addend["stored"]),
            }
        )
        for addend in value["addends"]
    )
    rows = tuple(NewRows(**{**new, "indices": tuple(new["indices"])}) for new in value["rows"])
    return Step(**{**value, "shape": tuple(value["shape"]), "addends": addends, "rows": rows})


def _range(value: list[int] | None) -> tuple[int, int] | None:
    return None if value is None else (value[0], value[1])
