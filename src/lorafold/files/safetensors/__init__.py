"""One .safetensors file: its header read strictly, its tensors read and written by position, never mapped, never held whole."""

from .coverage import Written as Written
from .dtypes import BITS as BITS
from .dtypes import NAMES as NAMES
from .dtypes import TORCH_DTYPES as TORCH_DTYPES
from .dtypes import dtype_name as dtype_name
from .growing import GrowingWriter as GrowingWriter
from .header import parse_header as parse_header
from .header import read_header as read_header
from .info import FileIdentity as FileIdentity
from .info import Header as Header
from .info import TensorInfo as TensorInfo
from .info import TensorSpec as TensorSpec
from .layout import PT_METADATA as PT_METADATA
from .layout import encode_header as encode_header
from .memory import bytes_of as bytes_of
from .memory import same_bytes as same_bytes
from .memory import tensor_over as tensor_over
from .reader import TensorFile as TensorFile
from .reader import Until as Until
from .writer import CopyRun as CopyRun
from .writer import ShardWriter as ShardWriter
