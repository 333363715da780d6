"""The headers of GGUF files, llama.cpp's format: what they say of a model, which tensors they hold,
and where. The format is described in ggml's docs/gguf.md.
"""

import math
import os
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, NamedTuple

from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError


class Type(NamedTuple):
    """A type of ggml's, in which the elements of a row are stored block by block.

    Args:
        number: what files and ggml call it
        name: what people call it
        block: how many elements are stored together
        size: of a block, in bytes
    """

    number: int
    name: str
    block: int
    size: int


# Numbers that are missing were of types that ggml has given up.
TYPES: Final[Mapping[str, Type]] = {
    name: Type(number, name, block, size)
    for number, name, block, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}
_TYPES: Final = {found.number: found for found in TYPES.values()}

# The types of weights that stay as they are in memory, because there are kernels for them.
KEPT: Final = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
})  # fmt: skip

# Those of all that can be read: the others of them are numbers of the engine's dtype once they are
# loaded.
READ: Final = KEPT.union(
    ("F32", "F16", "BF16"),
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)

# Types of values: the format of `struct`, which is that of `array` too.
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9

# A header is at most so long. The format has no bound; the longest that are known, with a
# vocabulary of 262,144 tokens and their merges, have a fifth of it.
_MAX_HEADER: Final = 100_000_000

# Nor has an array so many strings: merges of the largest vocabularies are 1,000,000.
_MAX_STRINGS: Final = 2**22

# What the format allows.
_MAX_KEY: Final = 2**16 - 1
_MAX_NAME: Final = 64
_MAX_DIMENSIONS: Final = 4
_VERSIONS: Final = (2, 3)

_MAGIC: Final = b"GGUF"

# What a value and what a tensor takes in a header, at least.
_LEAST_VALUE: Final = 8 + 4 + 1
_LEAST_TENSOR: Final = 8 + 4 + 8 + 4 + 8

_READ: Final = 2**20

# How many missing parts are named: a file's name alone can say that there are 99,999.
_MAX_MISSING: Final = 10

_NUMBERS: Final = {code: struct.Struct(f"<{code}") for code in _SCALARS.values()}
_LENGTH: Final = _NUMBERS["Q"]

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class File(NamedTuple):
    """A GGUF file; one that is split into several is one.

    Args:
        path: as it was named
        version: of the format
        metadata: by key, such as ``general.architecture``. Arrays of numbers are `array.array`s,
            those of strings and truth values tuples
        tensors: by the file's names of them. Their dtype is the name of a ``Type``; their shape is
            what torch and NumPy call so, rows before columns
        parts: the paths of all its files, in order
    """

    path: str
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    parts: tuple[str, ...]


def read(path: str) -> File:
    """What a GGUF file says and holds. Only headers are read.

    Args:
        path: of the file; of one that is split, any of its parts

    Raises:
        BridgeError: ``invalid_checkpoint`` for a file that is damaged, of which a part is missing,
            or that says what cannot be
    """
    header = _read_header(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise _damaged(path, f"its `split.count` is {count!r:.64}", key="split.count")
    if count in (0, 1):
        return header
    paths = parts(path)
    if len(paths) != count:
        raise _damaged(
            path,
            f"it is one of {count} parts, and its name does not end with such as "
            f"`-00001-of-{count:05}.gguf`, by which the others are found",
            remedy="Give the files the names that they had.",
        )
    headers = [header if part == path else _read_header(part) for part in paths]
    tensors: dict[str, Tensor] = {}
    for number, found in enumerate(headers):
        said = found.metadata.get("split.no"), found.metadata.get("split.count")
        if said != (number, count):
            raise _damaged(
                found.path, f"it says that it is part {said[0]} (from 0) of {said[1]}, its name not"
            )
        if twice := found.tensors.keys() & tensors.keys():
            name = min(twice)
            raise _damaged(found.path, f"another part of it holds `{name}` too", tensor=name)
        tensors |= found.tensors
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise _damaged(paths[0], f"its parts hold {len(tensors)} tensors, it says {expected}")
    return File(path, header.version, headers[0].metadata, tensors, paths)


def is_one(path: str) -> bool:
    """Whether a file begins as one of GGUF does, whatever its name is."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def parts(path: str) -> tuple[str, ...]:
    """The paths of all parts of the file that this one is a part of, by its name; itself for one
    that is whole.

    Raises:
        BridgeError: ``invalid_checkpoint`` where one of them is not there
    """
    folder, name = os.path.split(path)
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return (path,)
    stem, _, total = match.groups()
    paths = [
        os.path.join(folder, f"{stem}-{number:05}-of-{total}.gguf")
        for number in range(1, int(total) + 1)
    ]
    missing = [os.path.basename(part) for part in paths if not os.path.exists(part)]
    if missing:
        raise BridgeError(
            "invalid_checkpoint",
            f"{len(missing)} of {len(paths)} parts of `{path}` are missing, the first is "
            f"{missing[0]}.",
            {"file": path, "missing": missing[:_MAX_MISSING]},
            remedy="Finish its download, or repeat it.",
        )
    return tuple(paths)


def _read_header(path: str) -> File:
    try:
        with open(path, "rb") as file:
            return read_one(path, file)
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror or error})") from error


def read_one(path: str, file: BinaryIO) -> File:
    """What one file, which may be a part, says and holds.

    Args:
        path: what it is called
        file: it, open; its header is read from the front, and no more of it than that

    Raises:
        BridgeError: see ``read``
    """
    try:
        return _parse(path, _Reader(file))
    except _DamagedError as error:
        raise _damaged(path, *error.args, **error.details) from None


def _parse(path: str, reader: "_Reader") -> File:
    version = _read_version(reader)
    tensor_count, value_count = reader.number("Q"), reader.number("Q")
    reader.expect(tensor_count * _LEAST_TENSOR + value_count * _LEAST_VALUE, "its counts")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = reader.string("a key", _MAX_KEY)
        if key in metadata:
            raise _DamagedError(f"it has the key `{_short(key)}` twice", key=_short(key))
        metadata[key] = _read_value(reader, key)
    infos = list(_read_infos(reader, tensor_count))
    alignment = _alignment(metadata)
    start = math.ceil(reader.offset / alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, kind, shape, offset in infos:
        if name in tensors:
            raise _DamagedError(f"it has the tensor `{name}` twice", tensor=name)
        size = math.prod(shape) // kind.block * kind.size
        if offset % alignment:
            raise _DamagedError(
                f"`{name}` is at {offset}, which is no multiple of {alignment}", tensor=name
            )
        if start + offset + size > reader.size:
            raise _DamagedError(
                f"`{name}` ends at byte {start + offset + size}, the file at {reader.size}",
                tensor=name,
            )
        tensors[name] = Tensor(kind.name, shape, path, start + offset, size)
    _check_overlap(tensors)
    return File(path, version, metadata, tensors, (path,))


def _read_version(reader: "_Reader") -> int:
    if not reader.size:
        raise _DamagedError("it is empty")
    magic = reader.take(len(_MAGIC), "its first bytes")
    if magic == b"vers":
        raise _DamagedError(
            "it is not the model but what Git LFS has in its place",
            remedy="Fetch the model with `git lfs pull`.",
        )
    if magic != _MAGIC:
        raise _DamagedError(
            f"it begins with the bytes {magic.hex(' ')}, not with `GGUF`",
            remedy="Give the path of a GGUF file; files of older formats of ggml's must be made "
            "again with llama.cpp.",
        )
    version: int = reader.number("I")
    if version and version % 2**16 == 0:
        raise _DamagedError(
            "it is written for big-endian machines",
            remedy="Use the usual little-endian variant of the model.",
        )
    if version not in _VERSIONS:
        raise _DamagedError(
            f"it has version {version} of the format, and versions 2 and 3 are read",
            remedy="Make it again with llama.cpp, or use another variant of the model.",
        )
    return version


def _read_value(reader: "_Reader", key: str) -> Any:
    what = f"the value of `{_short(key)}`"
    kind = reader.number("I")
    if kind == _STRING:
        return reader.string(what)
    if kind != _ARRAY:
        return reader.number(_scalar(kind, key))
    kind, count = reader.number("I"), reader.number("Q")
    if kind == _STRING:
        if count > _MAX_STRINGS:
            raise _DamagedError(f"{what} has {count} strings, and {_MAX_STRINGS} are allowed")
        return tuple(reader.strings(count, what))
    if kind == _ARRAY:
        raise _DamagedError(f"`{_short(key)}` has arrays in an array", key=_short(key))
    code = _scalar(kind, key)
    data = reader.take(count * struct.calcsize(code), what)
    return tuple(map(bool, data)) if kind == _BOOL else array(code, data)


def _scalar(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise _DamagedError(
            f"`{_short(key)}` is of the type {kind}, which GGUF does not have", key=_short(key)
        )
    return _SCALARS[kind]


def _read_infos(reader: "_Reader", count: int) -> Iterator[tuple[str, Type, tuple[int, ...], int]]:
    for _ in range(count):
        name = reader.string("a tensor's name", _MAX_NAME)
        dimensions = reader.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _DamagedError(f"`{name}` has {dimensions} dimensions", tensor=name)
        sizes = [reader.number("Q") for _ in range(dimensions)]
        number, offset = reader.number("I"), reader.number("Q")
        kind = _TYPES.get(number)
        if kind is None:
            raise _DamagedError(
                f"`{name}` is of ggml's type {number}, which is not known",
                remedy="Use another variant of the model.",
                tensor=name,
                type=number,
            )
        if 0 in sizes:
            raise _DamagedError(f"`{name}` is empty: its shape is {sizes[::-1]}", tensor=name)
        if sizes[0] % kind.block:
            raise _DamagedError(
                f"a row of `{name}` has {sizes[0]} elements, which are no whole blocks of "
                f"{kind.block}, as {kind.name} has them",
                tensor=name,
            )
        yield name, kind, tuple(reversed(sizes)), offset


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(
            f"its `general.alignment` is {alignment!r:.64}, which is no power of two",
            key="general.alignment",
        )
    return alignment


def _check_overlap(tensors: Mapping[str, Tensor]) -> None:
    end, last = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _DamagedError(f"`{name}` begins before `{last}` ends", tensor=name)
        end, last = tensor.start + tensor.size, name


class _DamagedError(Exception):
    """A fault of the file whose path the one who catches it knows."""

    def __init__(self, what: str, **details: Any) -> None:
        super().__init__(what)
        self.details = details


def _damaged(
    path: str, what: str, remedy: str = "Download it again.", **details: Any
) -> BridgeError:
    return BridgeError(
        "invalid_checkpoint",
        f"`{path}` cannot be read as GGUF: {what}.",
        {"file": path, **details},
        remedy=remedy,
    )


def _short(key: str) -> str:
    return key if len(key) <= _MAX_NAME else f"{key[:_MAX_NAME]}…"


class _Reader:
    """Reads a header front to back. Nothing is made room for that the file does not hold."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.offset = 0
        self._file = file
        self._data = bytearray()

    def expect(self, count: int, what: str) -> None:
        """Raises where so many bytes more cannot be there."""
        end = self.offset + count
        if end > self.size:
            raise _DamagedError(
                f"{what} would take {count} bytes, {self.size - self.offset} are left"
            )
        if end > _MAX_HEADER:
            raise _DamagedError(f"its header is longer than {_MAX_HEADER} bytes, with {what}")

    def take(self, count: int, what: str) -> bytes:
        start = self._advance(count, what)
        return bytes(self._data[start : start + count])

    def number(self, code: str) -> Any:
        form = _NUMBERS[code]
        return form.unpack_from(self._data, self._advance(form.size, "its header"))[0]

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and not 1 <= length <= most:
            raise _DamagedError(f"{what} has {length} bytes, and 1 to {most} are allowed")
        return _text(self.take(length, what), what)

    def strings(self, count: int, what: str) -> Iterator[str]:
        self.expect(count * _LENGTH.size, what)
        data = self._data
        for _ in range(count):
            start = self.offset + _LENGTH.size
            # A vocabulary has hundreds of thousands: what was read already takes no calls.
            if start <= len(data):
                end = start + _LENGTH.unpack_from(data, self.offset)[0]
                if end <= len(data):
                    self.offset = end
                    yield _text(data[start:end], what)
                    continue
            yield self.string(what)

    def _advance(self, count: int, what: str) -> int:
        """Where the next bytes are in what was read."""
        start, end = self.offset, self.offset + count
        if end > len(self._data):
            self.expect(count, what)
            self._data += self._file.read(max(end - len(self._data), len(self._data), _READ))
            if end > len(self._data):
                raise _DamagedError(f"it has become shorter than {self.size} bytes")
        self.offset = end
        return start


def _text(data: bytes | bytearray, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _DamagedError(f"{what} is no text: {bytes(data[:_MAX_NAME])!r}") from None
