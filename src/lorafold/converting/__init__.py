"""Adapters from one format to another. One file writes each; what they all start from is a list of updates."""

from .convert import WRITERS as WRITERS
from .convert import Conversion as Conversion
from .convert import convert as convert
