"""A checkpoint on disk: opened, and held to its own word."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import Shard as Shard
from .companions import companions as companions
from .index import INDEX_NAME as INDEX_NAME
from .index import write_index as write_index
from .inputhash import check_hashes as check_hashes
from .opening import open_checkpoint as open_checkpoint
from .quantised import method_beside as method_beside
from .quantised import quantisation_of as quantisation_of
from .wholefiles import files_beside_weights as files_beside_weights
