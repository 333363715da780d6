"""What files of ``torch.save`` hold, looked at without torch: the tensors as ``headers.Tensor``,
and what lies around them.

Such a file is an archive whose ``data.pkl`` is a program for pickle. It is not given to pickle: the
few steps that tensors in dicts take are followed here, and no others are.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError

# The program is a list of names: of a model of a hundred layers it is some hundred kilobytes.
_MAX_PROGRAM: Final = 64 * 2**20

# torch's dtypes as safetensors writes them, with their bytes.
_DTYPES: Final = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip

# The storages that torch has for each of them.
_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

# The header of an entry in a zip file: how it begins, and the lengths of its name and of what fills
# it up.
ENTRY: Final = struct.Struct("<4s22xHH")
ENTRY_MAGIC: Final = b"PK\x03\x04"


class Dtype(NamedTuple):
    """A dtype of torch's by its name, such as ``float16``."""

    name: str


class _Global(NamedTuple):
    """What a program names."""

    name: str


class _Storage(NamedTuple):
    """Where the numbers of tensors are."""

    dtype: str
    start: int
    size: int


def read(path: str) -> Any:
    """What the file holds: a dict, most likely. In it, tensors are ``headers.Tensor`` and dtypes
    ``Dtype``; sizes are tuples.

    Raises:
        BridgeError: ``invalid_checkpoint`` if the file is damaged, of the format before torch 1.6,
            or holds more than tensors, numbers and strings
    """
    try:
        return _File(path).contents()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = str(error) or type(error).__name__
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError) as error:
        said = f"it is no archive of torch's: {error}"
    raise BridgeError(
        "invalid_checkpoint",
        f"`{path}` cannot be read: {said}.",
        {"file": path},
        remedy=(
            "Download it again; or, if it can be loaded with `torch.load`, save its tensors anew "
            "with `torch.save`."
        ),
    )


class _File:
    def __init__(self, path: str) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = archive.infolist()
            (program,) = [one for one in entries if one.filename.endswith("/data.pkl")]
            if program.file_size > _MAX_PROGRAM:
                raise ValueError("its data.pkl is too long")
            folder = program.filename.removesuffix("data.pkl") + "data/"
            size = os.fstat(file.fileno()).st_size
            # The place and size of each storage, by its key.
            self._entries: dict[str, tuple[int, int]] = {}
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{entry.filename} is compressed")
                if not entry.filename.startswith(folder):
                    continue
                start = _start(file, entry.header_offset)
                if start + entry.file_size > size:
                    raise ValueError(f"it ends before {entry.filename} does")
                key = entry.filename.removeprefix(folder)
                self._entries[key] = (start, entry.file_size)
            self._program = archive.read(program)

    def contents(self) -> Any:
        """The result of the program."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def marked() -> list[Any]:
            mark = marks.pop()
            found = stack[mark:]
            del stack[mark:]
            return found

        argument: Any
        for step, argument, _ in pickletools.genops(self._program):
            match step.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(marked()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(step.name[-1])
                    if len(stack) < count:
                        raise ValueError("its data.pkl is damaged")
                    stack[-count:] = [tuple(stack[-count:])]
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(step.name == "NEWTRUE")
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE"
                    | "SHORT_BINUNICODE"
                ):  # fmt: skip
                    stack.append(argument)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    stack[-1][_key(key)] = value
                case "SETITEMS":
                    items = marked()
                    stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
                case "APPEND":
                    value = stack.pop()
                    stack[-1].append(value)
                case "APPENDS":
                    items = marked()
                    stack[-1].extend(items)
                case "GLOBAL":
                    stack.append(_named(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_named(f"{_key(module)}.{_key(name)}"))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self._result(function, arguments))
                case "BUILD":
                    stack.pop()  # what dicts of modules have beside their items
                case "STOP":
                    return stack.pop()
                case other:
                    raise ValueError(
                        f"it holds more than tensors: its data.pkl has the step {other}"
                    )
        raise ValueError("its data.pkl has no end")

    def _storage(self, identity: Sequence[Any]) -> _Storage:
        kind, storage, key, _location, _count = identity
        if kind != "storage":
            raise ValueError("its data.pkl names what is no storage")
        start, size = self._entries[_key(key)]
        # One without a type of its own holds bytes.
        return _Storage(_STORAGES.get(storage.name.rpartition(".")[2], "uint8"), start, size)

    def _result(self, function: Any, arguments: Sequence[Any]) -> Any:
        known: Mapping[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda *_: {},
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        if not isinstance(function, _Global) or function.name not in known:
            name = getattr(function, "name", type(function).__name__)
            raise ValueError(f"it holds more than tensors: {name}")
        return known[function.name](*arguments)

    def _tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
    ) -> Tensor:
        dtype, width = _DTYPES[storage.dtype]
        if any(number < 0 for number in (offset, *shape, *strides)):
            raise ValueError(f"it has a tensor of {list(shape)}")
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (offset + last + 1) * width > storage.size:
            raise ValueError(f"a tensor of {list(shape)} is said to be in {storage.size} bytes")
        if count * width > storage.size:
            raise ValueError(f"a tensor of {list(shape)} has numbers more than once")
        start = storage.start + offset * width
        return Tensor(dtype, tuple(shape), self._path, start, count * width)


def _key(value: Any) -> Any:
    """A name or a number. Programs of some bytes make tuples of tuples that nobody can hash, or
    write out, in a lifetime."""
    if not isinstance(value, str | int):
        raise ValueError(f"its data.pkl has a {type(value).__name__} in the place of a name")
    return value


def _named(name: str) -> _Global | Dtype:
    dtype = name.removeprefix("torch.")
    return Dtype(dtype) if dtype != name and dtype in _DTYPES else _Global(name)


def _start(file: Any, header: int) -> int:
    """Where an entry's bytes begin: behind a header of its own."""
    file.seek(header)
    magic, name, extra = ENTRY.unpack(file.read(ENTRY.size))
    if magic != ENTRY_MAGIC:
        raise ValueError("an entry of it is not where it should be")
    return int(header + ENTRY.size + name + extra)
