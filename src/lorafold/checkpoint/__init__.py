"""A checkpoint on disk: opened and held to its own word, and written so that it appears whole or not at all."""

from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import Shard as Shard
from .companions import companions as companions
from .durable import copy_file as copy_file
from .durable import keep_only as keep_only
from .durable import write_json as write_json
from .durable import write_text as write_text
from .index import INDEX_NAME as INDEX_NAME
from .index import write_index as write_index
from .inputhash import check_hashes as check_hashes
from .journal import Finished as Finished
from .journal import begin_journal as begin_journal
from .journal import journal_finished as journal_finished
from .journal import read_journal as read_journal
from .opening import open_checkpoint as open_checkpoint
from .outputplace import require_space as require_space
from .quantised import method_beside as method_beside
from .quantised import quantisation_of as quantisation_of
from .stagedfile import StagedFile as StagedFile
from .staging import StagedFolder as StagedFolder
from .wholefiles import files_beside_weights as files_beside_weights
