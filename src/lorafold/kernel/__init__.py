"""The one function that adds a ΔW to a weight, what it is made of, and its compiled part for rows that go from file to file."""

from .cpu.loader import build as build
from .cpu.stream import Destination as Destination
from .cpu.stream import FileRows as FileRows
from .cpu.stream import merge_between as merge_between
from .factors import Factors as Factors
from .factors import stack as stack
from .merge import Precision as Precision
from .merge import merge_measured as merge_measured
from .merge import merge_rows as merge_rows
from .merge import merge_weight as merge_weight
from .rounding import Rounding as Rounding
from .rounding import Stochastic as Stochastic
from .stats import Kept as Kept
from .update import LowRankUpdate as LowRankUpdate
from .update import scaling_factor as scaling_factor
