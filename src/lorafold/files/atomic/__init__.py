"""Outputs that appear whole or not at all: made beside their place, on disk before they are put there, gone on with after a crash.

Nothing here needs torch, and nothing knows what is in the files."""

from .checks import free_bytes as free_bytes
from .checks import output_fault as output_fault
from .checks import require_space as require_space
from .copying import clone_file as clone_file
from .copying import kernel_copy as kernel_copy
from .copying import link_file as link_file
from .durable import copy_file as copy_file
from .durable import copy_proven as copy_proven
from .durable import keep_only as keep_only
from .durable import write_json as write_json
from .durable import write_text as write_text
from .file import StagedFile as StagedFile
from .folder import StagedFolder as StagedFolder
from .journal import JOURNAL_NAME as JOURNAL_NAME
from .journal import Finished as Finished
from .journal import begin_journal as begin_journal
from .journal import journal_finished as journal_finished
from .journal import read_journal as read_journal
from .owner import OWNER_NAME as OWNER_NAME
from .prehash import begin_to_hash as begin_to_hash
from .prehash import sha256_found as sha256_found
