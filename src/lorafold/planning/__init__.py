"""What a merge will do, as pure data: printing it is the dry run, running it is `lorafold.execute`."""

from .json import plan_from_json as plan_from_json
from .json import plan_to_json as plan_to_json
from .make import fingerprint as fingerprint
from .make import make_plan as make_plan
from .names.offers import shapes_of as shapes_of
from .names.renames import renamed as renamed
from .plan import Addend as Addend
from .plan import MergeOptions as MergeOptions
from .plan import MergePlan as MergePlan
from .plan import NewRows as NewRows
from .plan import PlannedAdapter as PlannedAdapter
from .plan import PlannedShard as PlannedShard
from .plan import Step as Step
from .resolve import Resolution as Resolution
from .resolve import resolve as resolve
from .shards import nbytes as nbytes
from .shards import needs_index as needs_index
from .targets import Target as Target
from .ties import Tie as Tie
from .ties import find_tie as find_tie
