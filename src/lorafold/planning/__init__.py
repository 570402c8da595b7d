"""What a merge will do, as pure data: printing it is the dry run, running it is `lorafold.execute`."""

from .layout import nbytes as nbytes
from .layout import needs_index as needs_index
from .make import fingerprint as fingerprint
from .make import make_plan as make_plan
from .plan import Addend as Addend
from .plan import MergeOptions as MergeOptions
from .plan import MergePlan as MergePlan
from .plan import NewRows as NewRows
from .plan import PlannedAdapter as PlannedAdapter
from .plan import PlannedShard as PlannedShard
from .plan import Step as Step
from .planjson import plan_from_json as plan_from_json
from .planjson import plan_to_json as plan_to_json
