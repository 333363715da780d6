"""Small GGUF files, written byte by byte so that they may say what no writer of others' would."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_bridge.checkpoints.gguf import TYPES

MAGIC = b"GGUF"
ALIGNMENT = 32

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
_FORMATS = {U8: "<B", U16: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}


class Raw(NamedTuple):
    """The bytes of a value, after the number of its type."""

    kind: int
    data: bytes


class Info(NamedTuple):
    """A tensor; its shape as torch has it."""

    shape: tuple[int, ...]
    type: str | int = "F32"
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def array(kind: int, items: Sequence[Any], count: int | None = None) -> Raw:
    """An array that says it has ``count`` items."""
    head = struct.pack("<IQ", kind, len(items) if count is None else count)
    each = string if kind == STRING else lambda item: struct.pack(_FORMATS[kind], item)
    return Raw(ARRAY, head + b"".join(map(each, items)))


def number(kind: int, value: float) -> Raw:
    return Raw(kind, struct.pack(_FORMATS[kind], value))


def value(given: Any) -> Raw:
    """As llama.cpp's converters write it."""
    match given:
        case Raw():
            return given
        case str():
            return Raw(STRING, string(given))
        case bool():
            return number(BOOL, given)
        case int():
            return number(U32, given)
        case float():
            return number(F32, given)
    kinds: dict[type, int] = {str: STRING, bool: BOOL, int: I32, float: F32}
    return array(kinds[type(given[0])], given)


def header(
    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]],
    tensors: Mapping[str, Info] | Sequence[tuple[str, Info]] = (),
    *,
    magic: bytes = MAGIC,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
) -> bytes:
    """The header of a file, padded.

    Args:
        counts: of tensors and of values, where it is to lie about them
    """
    values = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    infos = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
    tensor_count, value_count = counts
    data = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if tensor_count is None else tensor_count,
        len(values) if value_count is None else value_count,
    )
    for key, given in values:
        kind, packed = value(given)
        data += string(key) + struct.pack("<I", kind) + packed
    offset = 0
    for name, info in infos:
        start = offset if info.offset is None else info.offset
        kind = info.type if isinstance(info.type, int) else TYPES[info.type].number
        data += string(name) + struct.pack("<I", len(info.shape))
        data += struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        data += struct.pack("<IQ", kind, start)
        offset = start + padded(size(info))
    return data.ljust(padded(len(data)), b"\0")


def size(info: Info) -> int:
    """Of a tensor's bytes; 0 for a type that there is not."""
    if isinstance(info.type, int):
        return 0
    kind = TYPES[info.type]
    return math.prod(info.shape) // kind.block * kind.size


def padded(count: int) -> int:
    return math.ceil(count / ALIGNMENT) * ALIGNMENT


def write(path: Path, metadata: Any, tensors: Any = (), **lies: Any) -> Path:
    """A file whose tensors are zeros, sparse."""
    data = header(metadata, tensors, **lies)
    infos = (dict(tensors) if not isinstance(tensors, Mapping) else tensors).values()
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + sum(padded(size(info)) for info in infos))
    return path


# A small Llama.
VOCABULARY, HIDDEN, INTERMEDIATE, KEYS, LAYERS = 96, 64, 128, 32, 2
LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "small",
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INTERMEDIATE,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"token{number}" for number in range(VOCABULARY)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def llama_tensors(type: str = "Q8_0", layers: int = LAYERS) -> dict[str, Info]:
    """Its tensors, matrices in the type."""
    tensors = {
        "token_embd.weight": Info((VOCABULARY, HIDDEN), type),
        "output_norm.weight": Info((HIDDEN,)),
        "output.weight": Info((VOCABULARY, HIDDEN), type),
    }
    for number in range(layers):
        tensors |= {
            f"blk.{number}.attn_norm.weight": Info((HIDDEN,)),
            f"blk.{number}.attn_q.weight": Info((HIDDEN, HIDDEN), type),
            f"blk.{number}.attn_k.weight": Info((KEYS, HIDDEN), type),
            f"blk.{number}.attn_v.weight": Info((KEYS, HIDDEN), type),
            f"blk.{number}.attn_output.weight": Info((HIDDEN, HIDDEN), type),
            f"blk.{number}.ffn_norm.weight": Info((HIDDEN,)),
            f"blk.{number}.ffn_gate.weight": Info((INTERMEDIATE, HIDDEN), type),
            f"blk.{number}.ffn_up.weight": Info((INTERMEDIATE, HIDDEN), type),
            f"blk.{number}.ffn_down.weight": Info((HIDDEN, INTERMEDIATE), type),
        }
    return tensors


def write_llama(path: Path, type: str = "Q8_0", **said: Any) -> Path:
    """A file with it, that says what is given beside the rest; ``None`` leaves a value out.

    Args:
        said: values by their keys, with ``__`` for ``.``
    """
    metadata = LLAMA | {key.replace("__", "."): given for key, given in said.items()}
    return write(path, {k: v for k, v in metadata.items() if v is not None}, llama_tensors(type))
