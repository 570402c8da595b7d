"""What a merge did and found, as a value, and ways to show it."""

from .report import MergeReport as MergeReport
from .report import peak_memory as peak_memory
