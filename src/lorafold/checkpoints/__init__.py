"""A checkpoint on disk: opened, and held to its own word."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import Shard as Shard
from .hashes import check_hashes as check_hashes
from .index import INDEX_NAME as INDEX_NAME
from .index import write_index as write_index
from .open import open_checkpoint as open_checkpoint
from .quantised import method_beside as method_beside
from .quantised import quantisation_of as quantisation_of
from .sidecars import companions as companions
from .sidecars import files_beside_weights as files_beside_weights
