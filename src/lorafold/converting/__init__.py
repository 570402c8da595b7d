"""Adapters from one format to another. One file writes each; what they all start from is a list of updates."""

from .conversion import WRITERS as WRITERS
from .conversion import Conversion as Conversion
from .conversion import convert as convert
