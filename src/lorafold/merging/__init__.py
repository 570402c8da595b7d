"""The whole road in one call: open, plan, run, prove, and only then appear. Nothing here touches a number."""

from .adapterlike import AdapterLike as AdapterLike
from .adapterlike import loaded as loaded
from .adapterlike import weighted as weighted
from .each import merge_each as merge_each
from .single import merge as merge
from .single import plan as plan
