"""Hashes of files and tensors of a merged checkpoint: computed for its receipt, and held to those that a receipt has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint, Shard
from ..checkpoints.receipt import RECEIPT_NAME, Receipt
from ..errors import CheckpointError, VerificationError, printable
from ..files.atomic.journal import JOURNAL_NAME
from ..files.atomic.owner import OWNER_NAME
from ..files.digests import algorithm_of, hash_of, shown_hash
from ..files.gguf.gguf_header import blank_of
from ..files.regular import sha256_of
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile
from .claims import added_files, files_in, not_covered, not_part
from .modelcard import CARD_NAME
from .proof import Proof, TensorProof

_NOT_HASHED = (CARD_NAME, RECEIPT_NAME, JOURNAL_NAME, OWNER_NAME)
"""Files that are in no receipt: people write into the first, the others are not of the checkpoint."""


def hashes_beside(folder: Path, weights: Collection[str]) -> dict[str, str]:
    """sha256 of every file in `folder`, by its path in it, but for its `weights`, the model card and lorafold's own.

    Raises `CheckpointError` where one cannot be read.
    """
    wanted = sorted(name for name in files_in(folder) if name not in _NOT_HASHED and name not in weights and not name.endswith("/"))
    return {name: sha256_of(folder / name, error=CheckpointError) for name in wanted}


def unchanged(output: Checkpoint, receipt: Receipt, *, on_bytes: Callable[[int], None] | None = None) -> Proof:
    """What of `output` is no longer as its `receipt` says it was written.

    Raises `VerificationError` where the receipt has no hashes, `CheckpointError` where a file cannot be read.
    """
    shown = printable(str(output.root))
    if not receipt.files:
        raise VerificationError(
            f"{shown}: its {RECEIPT_NAME} has no hashes of files", hint="give `base=BASE` and `adapters=ADAPTER` as well"
        )
    tensors: dict[str, TensorProof] = {}
    files: dict[str, str] = {}
    failures = [f"{printable(name)} is missing" for name in receipt.files if name not in {shard.name for shard in output.shards}]
    for shard in output.shards:
        stated = receipt.files.get(shard.name, "")
        files[shard.name] = hash_of(shard.path, algorithm_of(stated), error=CheckpointError, blank=blank_of(shard.header))
        same = stated == files[shard.name]
        damaged = {} if same else _damaged(shard, receipt)
        failures += [f"{printable(name)} {what}" for name, what in damaged.items() if receipt.tensor_hashes]
        for name in shard.header.tensors:
            action = str(receipt.tensors.get(name, {}).get("action", "copy"))
            tensors[name] = TensorProof(action, name not in damaged, damaged.get(name))
        if shard.name not in receipt.files:
            failures.append(f"{printable(shard.name)} is not part of the checkpoint")
        elif not same:
            failures.append(f"{printable(shard.name)} has {shown_hash(files[shard.name])}, expected {printable(stated)}")
        if on_bytes is not None:
            on_bytes(shard.header.file_size)
    for name, sha256 in receipt.beside.items():
        try:
            found = sha256_of(output.root / name, error=CheckpointError) if not Path(name).is_absolute() else ""
        except CheckpointError as error:
            failures.append(error.message)
            continue
        if found != sha256:
            failures.append(f"{printable(name)} has sha256 {found}, expected {printable(sha256)}")
    others, of_people = ((), ()) if output.gguf else added_files(output.root, {*receipt.files, *receipt.beside, *files})
    return Proof(
        tensors,
        files,
        (*failures, *not_part(others)),
        sum(shard.header.file_size for shard in output.shards),
        notes=tuple(not_part(of_people)),
        not_covered=not_covered(by_receipt=True, only_changed=receipt.options.only_changed),
    )


def _damaged(shard: Shard, receipt: Receipt) -> dict[str, str]:
    """What is wrong with the tensors of a file that has changed, in words: with all of them, unless the receipt knows better."""
    if not receipt.tensor_hashes:
        return dict.fromkeys(shard.header.tensors, f"is in {printable(shard.name)}, which has changed")
    found = tensor_hashes([shard])
    wanted = {name: str(receipt.tensor_hashes.get(name, "none")) for name in found}
    return {name: f"has sha256 {found[name]}, expected {printable(wanted[name])}" for name in found if found[name] != wanted[name]}


_BLOCK = 1 << 20


def tensor_hashes(
    shards: Sequence[Shard], *, threads: int | None = None, on_bytes: Callable[[int], None] | None = None
) -> dict[str, str]:
    """sha256 of the bytes of each tensor, by name, hexadecimal; `threads`: tensors that are read at once.

    Raises `CheckpointError` where one cannot be read.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(threads or os.cpu_count(), "hash") as pool:
        for shard in shards:
            with TensorFile(shard.header) as file:
                infos = list(shard.header.tensors.values())
                for info, sha256 in zip(infos, pool.map(lambda info, file=file: _sha256(file, info), infos), strict=True):
                    found[info.name] = sha256
                    if on_bytes is not None:
                        on_bytes(info.nbytes)
    return found


def _sha256(file: TensorFile, info: TensorInfo) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(_BLOCK, info.nbytes))
    for offset in range(0, info.nbytes, _BLOCK):
        view = memoryview(buffer)[: min(_BLOCK, info.nbytes - offset)]
        file.read_into(info.start + offset, view)
        digest.update(view)
    return digest.hexdigest()
