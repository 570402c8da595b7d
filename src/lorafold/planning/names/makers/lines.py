"""The table of all families; the first that fits counts.

The lines are those of diffusers' conversion of checkpoints (`loaders/single_file_utils.py`), which the tests hold them to; what is
not in a line is called alike on both sides.
"""

from __future__ import annotations

from .code_base import Makers
from .cross_attention import CROSS_ATTENTION
from .double_stream import DOUBLE_STREAM
from .single_stream import SINGLE_STREAM
from .text_encoders import TEXT_ENCODERS
from .unets import UNETS

FAMILIES: tuple[Makers, ...] = (*UNETS, *TEXT_ENCODERS, *DOUBLE_STREAM, *CROSS_ATTENTION, *SINGLE_STREAM)
