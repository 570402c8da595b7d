"""Carrying out a plan: tensors streamed in the order of the files, a block of rows at a time, into a folder not yet visible."""

from .beside import write_beside as write_beside
from .run import run as run
