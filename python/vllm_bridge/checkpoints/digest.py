"""Whether two machines have the same model."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import BinaryIO

from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Bytes that are looked at of a file, at each of three places. Weights are too many to read them
# all, and those of different models differ everywhere.
_SAMPLE = 65_536


def digest(checkpoint: Checkpoint) -> str:
    """A text that is the same for the same model wherever it lies: of its config, and of the name,
    the size and samples of each file with weights."""
    seen = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.files):
        with open(os.path.join(checkpoint.folder or "", name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            seen.update(f"\0{os.path.basename(name)}\0{size}\0".encode())
            for sample in _samples(file, size):
                seen.update(sample)
    return seen.hexdigest()[:16]


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    for offset in (0, size // 2, max(0, size - _SAMPLE)):
        file.seek(offset)
        yield file.read(_SAMPLE)
