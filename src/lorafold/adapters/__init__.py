"""Adapters on disk: which format, what they hold, with which scaling. One file a format; what comes out is always an `Adapter`."""

from .adapter import Adapter as Adapter
from .adapter import AdapterModule as AdapterModule
from .adapter import Base as Base
from .adapter import Scaling as Scaling
from .adapter import TrainedRows as TrainedRows
from .adapter import WeightedAdapter as WeightedAdapter
from .adapter import on_base as on_base
from .formats.table import FORMATS as FORMATS
from .load import is_adapter as is_adapter
from .load import load_adapter as load_adapter
from .options import ReadOptions as ReadOptions
from .reader import AdapterReader as AdapterReader
from .reader import check_numbers as check_numbers
