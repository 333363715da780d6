"""llama.cpp's quantizer: what it can make, and making it.

All that it knows is asked of it: the types of files are its enumeration, the options the fields of
its struct, and what comes of both is tried out on a model of a few kilobytes.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm_bridge.checkpoints import gguf as headers
from vllm_bridge.errors import BridgeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Of each matrix by its name in the file, how much the columns of it matter: their mean squared
    # activations, for the columns of each expert one after the other.
    Importance = Mapping[str, npt.NDArray[np.float32]]

# How far it is: a tensor, and of how many.
Told = Callable[[int, int], None]

_FILE_TYPE = re.compile(r"LLAMA_FTYPE_(?:ALL|MOSTLY)_(\w+)")
_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_FAILED = re.compile(r"failed to quantize: (.+)")
_FALLEN_BACK = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback quantization")

# What C++ says where a file takes no more.
_NOT_WRITTEN: Final = "iostream error"

# The fields whose values are numbers of ggml's types.
_TENSOR_TYPES: Final = ("output_tensor_type", "token_embedding_type")

# What is no choice here: files are made of plain models, whole, and of all their layers. The
# importance matrix comes of calibration texts.
_SETTLED: Final = (
    ("allow_requantize", "only_copy", "keep_split", "dry_run"),
    ("imatrix", "kv_overrides", "prune_layers"),
)

# Models of the size that a block of every type divides.
_WIDTH: Final = 256


class Field(NamedTuple):
    """An option of the quantizer.

    Args:
        type: of its values, as Python has them
        default: None where it has none
        doc: what the library says of it
    """

    type: type
    default: Any
    doc: str


class Tried(NamedTuple):
    """What came of trying.

    Args:
        types: how many tensors are of which type
        digest: of the weights
        error: what the quantizer said where it failed, else nothing
    """

    types: Mapping[str, int]
    digest: str
    error: str = ""


def version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


def file_types() -> dict[str, int]:
    """The types of files by the names that people use: ``Q4_K_M``."""
    import llama_cpp

    return {
        match[1]: number
        for name, number in vars(llama_cpp).items()
        if (match := _FILE_TYPE.fullmatch(name))
    }


def fields() -> dict[str, Field]:
    """The options of the quantizer: those of its struct that are a choice."""
    import llama_cpp

    struct = llama_cpp.llama_model_quantize_params
    defaults = llama_cpp.llama_model_quantize_default_params()
    documented = dict(re.findall(r"^\s*(\w+) \([^\n]*?\): (.+)$", struct.__doc__ or "", re.M))
    found = {}
    for name, kind in struct._fields_:
        if name in (*_SETTLED[0], *_SETTLED[1]):
            continue
        value, doc = getattr(defaults, name), documented.get(name, "")
        if name == "ftype":
            names = {number: one for one, number in file_types().items()}
            found[name] = Field(str, names.get(value), doc)
        elif name in _TENSOR_TYPES:
            found[name] = Field(str, None, doc)
        elif name == "tt_overrides":
            found[name] = Field(dict, None, doc)
        elif kind in (ctypes.c_bool, ctypes.c_int32, ctypes.c_size_t):
            found[name] = Field(bool if kind is ctypes.c_bool else int, value, doc)
    return found


def quantize(
    source: str,
    target: str,
    options: Mapping[str, Any],
    importance: "Importance | None" = None,
    told: Told = lambda _done, _total: None,
) -> list[str]:
    """Quantizes a GGUF file.

    Args:
        source: a file in F32, F16 or BF16
        target: the path of the file that is written
        options: by the names of ``fields``
        importance: what matters most, where that is known
        told: called for each tensor

    Returns:
        what users should know of it, in sentences

    Raises:
        QuantizerError: with what llama.cpp said
    """
    import llama_cpp

    params, _kept = _params(options, importance)
    with log(told) as lines:
        failed = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(params)
        )
    text = "\n".join(lines)
    if failed:
        if _NOT_WRITTEN in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        match = _FAILED.search(text)
        raise QuantizerError(match[1].strip() if match else "it does not say why", text)
    if match := _FALLEN_BACK.search(text):
        return [_fallen_back(target, int(match[1]))]
    return []


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Has a file that takes no more be a full disk: NumPy's ``tofile`` does not say which error."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error


class QuantizerError(Exception):
    """What llama.cpp said when it failed.

    Args:
        why: its last words
        text: all that it said
    """

    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.why = why
        self.text = text


def types(path: str) -> dict[str, int]:
    """How many tensors of a file are of which type, most first."""
    counted = Counter(tensor.dtype for tensor in headers.read(path).tensors.values())
    return dict(counted.most_common())


def _fallen_back(path: str, count: int) -> str:
    """What llama.cpp does with rows that the blocks of a type do not divide."""
    rows = [
        (tensor.shape[-1], tensor.dtype)
        for tensor in headers.read(path).tensors.values()
        if len(tensor.shape) > 1 and tensor.shape[-1] % _WIDTH
    ]
    lengths = ", ".join(str(length) for length in sorted({length for length, _ in rows}))
    instead = ", ".join(sorted({type for _, type in rows}))
    return (
        f"{count} matrices have rows of {lengths} numbers, which the blocks of its type do not "
        f"divide: llama.cpp has them in {instead}, so that the file is larger than its type says."
    )


@functools.lru_cache(maxsize=64)
def _try(options: tuple[tuple[str, Any], ...], is_weighted: bool) -> Tried:
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="ex_vllm-gguf-") as folder:
        source, target = (os.path.join(folder, name) for name in ("F32.gguf", "quantized.gguf"))
        names = _write_toy(source)
        ramp = np.linspace(0.1, 9, _WIDTH, dtype=np.float32)
        importance = dict.fromkeys(names, ramp) if is_weighted else None
        try:
            quantize(source, target, _thawed(options), importance)
            file = headers.read(target)
        except QuantizerError as error:
            return Tried({}, "", error.why)
        except BridgeError:
            return Tried({}, "", "its weights are of a type that this library does not know")
        with open(target, "rb") as opened:
            opened.seek(min(tensor.start for tensor in file.tensors.values()))
            digest = hashlib.sha256(opened.read()).hexdigest()
        return Tried(types(target), digest)


def tried(options: Mapping[str, Any], is_weighted: bool) -> Tried:
    """What comes of the options, tried on a toy.

    Args:
        is_weighted: whether there is an importance matrix
    """
    return _try(_frozen(options), is_weighted)


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, tuple(value.items()) if isinstance(value, Mapping) else value)
        for name, value in sorted(options.items())
    )


def _thawed(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in options}


def _write_toy(path: str) -> list[str]:
    """Writes a Llama of one layer, and returns the names of its layer's matrices."""
    import gguf
    import numpy as np

    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    named = [f"blk.0.{name}.weight" for name in matrices]
    rows = {"token_embd.weight": 32, "output.weight": 32} | dict.fromkeys(named, _WIDTH)
    for name, count in rows.items():
        writer.add_tensor(name, random.standard_normal((count, _WIDTH), dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return named


def _params(options: Mapping[str, Any], importance: "Importance | None") -> tuple[Any, list[Any]]:
    """The struct, and what must live as long as it is used."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    kept: list[Any] = []
    for name, value in options.items():
        if value is None:
            continue
        if name == "ftype":
            params.ftype = file_types()[value]
        elif name in _TENSOR_TYPES:
            setattr(params, name, _number(value))
        elif name == "tt_overrides":
            rows = [(pattern.encode(), _number(type)) for pattern, type in value.items()]
            array = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows)
            params.tt_overrides = array
            kept.append(array)
        else:
            setattr(params, name, value)
    params.nthread = params.nthread or threads()
    if importance is not None:
        matrix = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for row, (name, values) in zip(matrix, importance.items(), strict=False):
            row.name = name.encode()
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            row.size = values.size
        params.imatrix = matrix
        kept += [matrix, importance]
    return params, kept


def _number(type: str) -> int:
    return headers.TYPES[type.upper()].number


def threads() -> int:
    """As many as the job may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def log(told: Told = lambda _done, _total: None) -> Iterator[list[str]]:
    """Has what llama.cpp says go to standard error and into a list of lines.

    Args:
        told: called where it says how far it is
    """
    import llama_cpp
    from llama_cpp import _logger

    lines = [""]

    def heard(_level: int, text: bytes, _data: Any) -> None:
        said = text.decode("utf-8", "replace")
        sys.stderr.write(said)
        if match := _STEP.match(said.lstrip()):
            told(int(match[1]), int(match[2]))
        first, *others = said.split("\n")
        lines[-1] += first
        lines.extend(others)

    callback = llama_cpp.llama_log_callback(heard)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
