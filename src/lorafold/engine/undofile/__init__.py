"""What turns a merged checkpoint back into its base without the base: written beside a merge, and read to undo it."""

from .changed import check_undoable as check_undoable
from .read import UndoFile as UndoFile
from .restore import base_size as base_size
from .restore import restore as restore
from .session import Undoing as Undoing
