"""What must be kept of a base weight so that unmerging gives it back bit for bit.

Subtracting ΔW from a merged weight misses the base in about one element of ten, in every dtype, and each cycle adds to the
error. So nothing here subtracts and hopes:

- ``"copy"``, the default, keeps the base itself, and takes as much memory again as the weights it is for. Merging and restoring a
  bfloat16 weight of 4096² takes half the time of loralib's inexact way (`benchmarks/undo.py`); that is why it is the default.
- ``"copy-cpu"`` keeps it in main memory, for layers on a device that has no room for it.
- ``"compact"`` keeps what separates the base from a number that can be computed again with the same bits, and a checksum: a seventh
  of a bfloat16 weight, a thirteenth of a float32 one. It computes that number when merging and when restoring, and takes some seven
  times as long as a copy."""

from .bits import Packed as Packed
from .bits import code_bytes as code_bytes
from .bits import pack as pack
from .bits import unpack as unpack
from .compact import corrected as corrected
from .compact import correction as correction
from .compact import tile_rows as tile_rows
from .keep import Undo as Undo
from .keep import UndoKind as UndoKind
from .keep import check_undo_kind as check_undo_kind
from .keep import merge_keeping as merge_keeping
