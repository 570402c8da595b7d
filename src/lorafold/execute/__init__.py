"""Carrying out a plan: tensors streamed in the order of the files, a block of rows at a time, into a folder not yet visible."""

from .beside import write_beside as write_beside
from .output import Output as Output
from .resuming import is_of as is_of
from .resuming import journal_fields as journal_fields
from .resuming import still_whole as still_whole
from .run import run as run
from .whole import Whole as Whole
from .whole import take_whole as take_whole
