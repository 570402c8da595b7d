"""Where in the base an adapter's tensors belong: by exact name, one prefix rewrite for all of them, and shapes that fit."""

from .resolve import Resolution as Resolution
from .resolve import Target as Target
from .resolve import resolve as resolve
from .tying import Tie as Tie
from .tying import find_tie as find_tie
