"""The headers of safetensors files: which tensors they hold, and where."""

import math
import os
import struct
from typing import NamedTuple

from vllm_bridge import json_files
from vllm_bridge.errors import BridgeError

# A safetensors header is at most so long, by its specification.
MAX_LENGTH = 100_000_000

# Bits per element of the dtypes that weights have.
WIDTH = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip


class Tensor(NamedTuple):
    """Where a tensor of a checkpoint is and what it looks like.

    Args:
        dtype: as safetensors writes it, such as ``BF16``
        shape: its sizes
        file: the file with it; empty where that is still on the hub
        start: of its bytes in the file
        size: of its bytes
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    size: int

    @property
    def is_here(self) -> bool:
        """Whether the numbers in it can be read, and not only where they are."""
        return self.file != ""


def read_header(path: str) -> dict[str, Tensor]:
    """What a safetensors file says it holds.

    Raises:
        BridgeError: ``invalid_checkpoint`` if the file is shorter or longer than its header says,
            or a tensor's bytes are not those of its shape
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_LENGTH:
                raise ValueError("its header is too long")
            tensors, end = {}, 0
            for name, tensor in json_files.parse(file.read(length)).items():
                if name == "__metadata__":
                    continue
                first, last = tensor["data_offsets"]
                shape = tuple(tensor["shape"])
                width = WIDTH.get(tensor["dtype"])
                if width and (last - first) * 8 != width * math.prod(shape):
                    raise ValueError(f"`{name}` has {last - first} bytes for {list(shape)}")
                end = max(end, last)
                tensors[name] = Tensor(
                    tensor["dtype"], shape, path, 8 + length + first, last - first
                )
            actual = os.fstat(file.fileno()).st_size
            if actual != 8 + length + end:
                raise ValueError(f"it has {actual} bytes, its header says {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"`{path}` is damaged: {error}.",
            {"file": path},
            remedy="Download it again.",
        ) from error
    return tensors
