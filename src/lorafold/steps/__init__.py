"""What a plan's steps are made from and what they must yield: where writing and proving both start."""

from .beside import files_beside as files_beside
from .blocks import BLOCK_BYTES as BLOCK_BYTES
from .blocks import Block as Block
from .blocks import block_bytes as block_bytes
from .blocks import blocks_of as blocks_of
from .blocks import compute as compute
from .blocks import matrix_shape as matrix_shape
from .buffers import Buffers as Buffers
from .change import Change as Change
from .config import edited as edited
from .memory import threads_within as threads_within
from .once import Once as Once
from .passing import Way as Way
from .passing import pass_through as pass_through
from .sources import Sources as Sources
from .workers import Workers as Workers
from .workers import workers as workers
