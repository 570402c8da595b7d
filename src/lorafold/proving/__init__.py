"""Reading a written checkpoint back, and proving from base and adapters that it holds what it must."""

from .proof import Proof as Proof
from .proof import TensorProof as TensorProof
from .prove import prove as prove
