"""What must be kept of a base weight so that unmerging gives it back bit for bit.

Subtracting ΔW from a merged weight misses the base in about one element of ten, in every dtype, and each cycle adds to the
error. So nothing here subtracts and hopes: `"copy"` keeps the base itself, `"compact"` keeps what separates it from a number
that can be computed again with the same bits, and a checksum.
"""

from .keep import UndoKind as UndoKind
from .keep import check_undo_kind as check_undo_kind
from .keep import merge_keeping as merge_keeping
from .undo import Undo as Undo
