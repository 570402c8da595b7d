"""Reading a written checkpoint back, and proving from base and adapters that it holds what it must."""

from .asyouwrite import Proofs as Proofs
from .proof import Proof as Proof
from .proof import ShardProof as ShardProof
from .proof import TensorProof as TensorProof
from .prove import conclude as conclude
from .prove import prove as prove
from .prove import prove_shard as prove_shard
from .receipts import make_receipt as make_receipt
from .receipts import receipt_failures as receipt_failures
from .tensorhashes import tensor_hashes as tensor_hashes
from .unchanged import hashes_beside as hashes_beside
from .unchanged import unchanged as unchanged
