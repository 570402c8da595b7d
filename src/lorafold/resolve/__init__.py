"""Where in the base an adapter's tensors belong: by name in any spelling, one prefix rewrite for all, and shapes that fit."""

from .renamed import renamed as renamed
from .resolve import Resolution as Resolution
from .resolve import resolve as resolve
from .shapes import shapes_of as shapes_of
from .target import Target as Target
from .tying import Tie as Tie
from .tying import find_tie as find_tie
