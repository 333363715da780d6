"""How much each column of a model's matrices matters: llama.cpp's importance matrix.

What ``llama-imatrix`` does: the model reads texts, and for each matrix the squares of what is
multiplied with it are added up, column by column; for experts, of what each of them gets. The mean
of them weights the error that the quantizer keeps small. llama.cpp computes it, and shows each
product to a callback (``cb_eval``).

There are files of it in llama.cpp's own format, so that outputs of one source can share one.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize.llama_cpp import quantizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vllm_bridge.jobs.quantize.llama_cpp.quantizer import Importance

# How many pieces of text have been read, and of how many.
Told = Callable[[int, int], None]

# Tokens that are read at once; llama-imatrix's default.
CHUNK: Final = 512

# Products of fewer rows are left out, as llama-imatrix does.
_LEAST_ROWS: Final = 16

_F32: Final = 0

# How the sums are called in files, and a key of our own in them.
_SUM: Final = ".in_sum2"
_TOKENS: Final = "ex_vllm.tokens"

# Which weights: those of layers. Devices put their name around that of a tensor.
_NAME = re.compile(r"(?:.*#)?(blk\.[^#]+)(?:#.*)?")


class Tensor(ctypes.Structure):
    """``ggml_tensor``, as far as it is read here."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Sums:
    """The squares, added up.

    Attributes:
        squares: by the matrix, of each of its experts and columns
        counts: by the matrix, how many rows each of its experts got
    """

    def __init__(self) -> None:
        self.squares: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, name: str, parts: int, part: int, rows: "npt.NDArray[np.float32]") -> None:
        """
        Args:
            parts: how many matrices there are in one: experts
            part: which one of them
            rows: what was multiplied with it
        """
        import numpy as np

        squares = self.squares.setdefault(name, np.zeros((parts, rows.shape[1])))
        counts = self.counts.setdefault(name, np.zeros(parts, np.int64))
        squares[part] += np.square(rows, dtype=np.float64).sum(0)
        counts[part] += len(rows)

    def matrix(self) -> "Importance":
        """What the quantizer takes. Experts that got nothing count alike in all columns."""
        import numpy as np

        found = {}
        for name, squares in self.squares.items():
            counts = self.counts[name][:, None]
            means = np.where(counts > 0, squares / np.maximum(counts, 1), 1.0)
            found[name] = np.ascontiguousarray(means.ravel(), np.float32)
        return found


def compute(file: str, texts: Sequence[str], most: int, told: Told) -> tuple["Importance", int]:
    """What matters when a model reads texts.

    Args:
        file: the model, a GGUF file
        most: as many pieces of ``CHUNK`` tokens are read, from all over the texts
        told: called for each piece

    Returns:
        the importance matrix, and how many tokens were read

    Raises:
        BridgeError: ``invalid_option`` where the texts are too short
    """
    sums = Sums()
    read = 0
    with quantizer.log(), _context(file, sums) as (llama, model, context):
        chunks = _chunks(llama, model, texts, most)
        for number, chunk in enumerate(chunks, 1):
            _read(llama, context, chunk)
            read += len(chunk)
            told(number, len(chunks))
    return sums.matrix(), read


def write(path: str, importance: "Importance", source: str, tokens: int) -> None:
    """Writes a file as ``llama-imatrix`` does, which is there when it is whole.

    Args:
        source: of the texts
        tokens: that were read
    """
    import gguf
    import numpy as np

    part = f"{path}.part"
    writer = gguf.GGUFWriter(part, "")
    # Such files have no architecture.
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", -(-tokens // CHUNK))
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    writer.add_uint32(_TOKENS, tokens)
    for name, values in importance.items():
        writer.add_tensor(f"{name}{_SUM}", values[None])
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    with quantizer.writing(path):
        writer.write_tensors_to_file()
        writer.close()
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, path)


def read(path: str) -> tuple["Importance", int]:
    """What ``write`` wrote, and how many tokens were read for it."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    matrix = {
        tensor.name.removesuffix(_SUM): np.array(tensor.data, np.float32).ravel()
        for tensor in reader.tensors
        if tensor.name.endswith(_SUM)
    }
    return matrix, int(reader.fields[_TOKENS].contents())


@contextlib.contextmanager
def _context(file: str, sums: Sums) -> Iterator[tuple[Any, Any, Any]]:
    """llama.cpp with the model loaded, which adds up what it multiplies."""
    import llama_cpp
    from llama_cpp._ggml import libggml

    check = _Check(libggml)

    def evaluated(address: int, is_asked: bool, _data: Any) -> bool:
        tensor = Tensor.from_address(address)
        operation = check(address, tensor)
        name = _wanted(tensor, operation)
        if name is not None and not is_asked:
            _add(sums, name, tensor, operation)
        return name is not None or not is_asked

    callback = llama_cpp.ggml_backend_sched_eval_callback(evaluated)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    # Weights stay in the layout of the file.
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), params)
    if not model:
        raise BridgeError(
            "unsupported",
            "llama.cpp does not load the model, so that no importance matrix can be computed.",
            {"file": file},
            remedy="Leave the calibration texts out; the log has what llama.cpp says.",
        )
    try:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CHUNK
        options.n_threads = options.n_threads_batch = quantizer.threads()
        options.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, options)
        try:
            yield llama_cpp, model, context
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    if check.error is not None:
        raise check.error


class _Check:
    """Looks, once, whether a tensor is laid out as it is read here, and tells its operation."""

    def __init__(self, ggml: Any) -> None:
        ggml.ggml_op_name.restype = ctypes.c_char_p
        ggml.ggml_op_name.argtypes = [ctypes.c_int]
        ggml.ggml_get_name.restype = ctypes.c_void_p
        ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_data.restype = ctypes.c_void_p
        ggml.ggml_get_data.argtypes = [ctypes.c_void_p]
        self._ggml = ggml
        self._is_done = False
        self._names: dict[int, bytes] = {}
        self.error: BridgeError | None = None

    def __call__(self, address: int, tensor: Tensor) -> bytes:
        if not self._is_done:
            self._is_done = True
            if (
                self._ggml.ggml_get_name(address) != address + Tensor.name.offset
                or self._ggml.ggml_get_data(address) != tensor.data
            ):
                self.error = BridgeError(
                    "unsupported",
                    "This version of llama.cpp lays tensors out in another way, so that no "
                    "importance matrix can be computed.",
                    {"version": quantizer.version()},
                    remedy="Run `mix vllm.setup --with quantize`, or leave the texts out.",
                )
        if self.error is not None:
            return b""
        if (name := self._names.get(tensor.op)) is None:
            name = self._names[tensor.op] = self._ggml.ggml_op_name(tensor.op)
        return name


def _wanted(tensor: Tensor, operation: bytes) -> str | None:
    """The name of the weights, where this is a product with them that counts."""
    if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
        return None
    weights, given = (tensor.src[index].contents for index in (0, 1))
    match = _NAME.fullmatch(weights.name.decode("utf-8", "replace"))
    if match is None or given.type != _F32:
        return None
    if operation == b"MUL_MAT" and given.ne[1] < _LEAST_ROWS:
        return None
    return match[1]


def _add(sums: Sums, name: str, tensor: Tensor, operation: bytes) -> None:
    import numpy as np

    weights, given = (tensor.src[index].contents for index in (0, 1))
    values = _array(given, np.float32)
    if operation == b"MUL_MAT":
        parts = weights.ne[2] * weights.ne[3]
        matrices = values.reshape(-1, *values.shape[2:])
        for number, rows in enumerate(matrices):
            # Several of them may share one matrix.
            sums.add(name, parts, number * parts // len(matrices), rows)
        return
    # Of each token, the experts that it goes to; what each of them gets is in the row of the same
    # place, or all get the same.
    chosen = _array(tensor.src[2].contents, np.int32)[0, 0]
    (tokens,) = values[:1]
    for expert in np.unique(chosen):
        token, place = np.nonzero(chosen == expert)
        sums.add(name, weights.ne[2], int(expert), tokens[token, place % tokens.shape[1]])


def _array(tensor: Tensor, type: Any) -> "npt.NDArray[Any]":
    """A tensor's numbers, outer dimensions first. They are its own memory."""
    import numpy as np

    shape = tuple(reversed(tensor.ne[:]))
    strides = tuple(reversed(tensor.nb[:]))
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    size += np.dtype(type).itemsize
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, type, memory, 0, strides)


def _chunks(llama: Any, model: Any, texts: Sequence[str], most: int) -> list[list[int]]:
    """The texts one after the other, in pieces that begin as texts do."""
    vocabulary = llama.llama_model_get_vocab(model)
    starts = llama.llama_vocab_get_add_bos(vocabulary)
    first = [llama.llama_vocab_bos(vocabulary)] if starts else []
    tokens = [token for text in texts for token in _tokens(llama, vocabulary, f"{text}\n\n")]
    size = CHUNK - len(first)
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    chunks = [first + piece for piece in pieces if len(first + piece) >= _LEAST_ROWS]
    if not chunks:
        raise BridgeError(
            "invalid_option",
            f"The calibration texts have {len(tokens)} tokens, too few for an importance matrix.",
            {"option": "calibration", "tokens": len(tokens)},
            remedy="Give some thousands of tokens, or leave `calibration` out.",
        )
    step = max(1, len(chunks) / most)
    return [chunks[int(index * step)] for index in range(min(most, len(chunks)))]


def _tokens(llama: Any, vocabulary: Any, text: str) -> list[int]:
    encoded = text.encode()
    room = len(encoded) + 8
    tokens = (ctypes.c_int32 * room)()
    count = llama.llama_tokenize(vocabulary, encoded, len(encoded), tokens, room, False, True)
    return list(tokens[:count])


def _read(llama: Any, context: Any, tokens: list[int]) -> None:
    """Has the model read tokens, and say something to each: the last layer else sees one only."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = True
        if status := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
    finally:
        llama.llama_batch_free(batch)
