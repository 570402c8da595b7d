"""Adapters from one format to another. One file writes each; what they all start from is a list of updates."""

from .adapters import AdapterLike as AdapterLike
from .adapters import loaded as loaded
from .adapters import weighted as weighted
from .converting import WRITERS as WRITERS
from .converting import Conversion as Conversion
from .converting import convert as convert
from .each import merge_each as merge_each
from .live import LiveMerge as LiveMerge
from .live import merge_into as merge_into
from .merging import merge as merge
from .merging import plan as plan
from .unmerging import unmerge as unmerge
from .verifying import verify as verify
