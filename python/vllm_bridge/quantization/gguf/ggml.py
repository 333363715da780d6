"""ggml, llama.cpp's kernels for CPUs, by ctypes on torch's memory. Imports torch, and ggml where it
is installed.

A call of ggml's is a graph of one operation, or of few. Making one takes longer than computing a
small one: those are kept, by their shapes, and pointed at the tensors of each call. ggml and torch
have one pool of threads, that of the OpenMP library which is loaded first.
"""

import ctypes
import functools
import importlib
import threading
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from vllm_bridge.quantization.gguf import operation

# What ggml calls its type of 32-bit floats and of 32-bit integers.
_F32, _I32 = 0, 26

# A layout of ggml's own, in which rows are interleaved, has the number of its type with this added.
REPACKED = 1 << 16

# Products of so many tokens have a graph, and room for their numbers, that are kept.
_FEW = 64

# Graphs that are kept: one has some kilobytes.
_GRAPHS = 1024

# It logs each tensor that it repacks.
_SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)

# A graph has pointers to what it computes, and a processor's thread computes one at a time.
_thread = threading.local()


@functools.cache
def library() -> Any:
    """The package ggml; None where it is not installed or does not load."""
    try:
        ggml = importlib.import_module("ggml")
    except (ImportError, OSError):
        return None
    ggml.ggml_log_set(_SILENCE, None)
    return ggml


def matmul(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    """``x`` [..., columns] times the transpose of a weight [rows, bytes], which may be repacked.
    As llama.cpp does: the numbers of ``x`` are rounded to 8 bits, with a scale for each block."""
    return _compute_products(operation.SINGLE, x, (weight, type))


def pair(
    x: torch.Tensor,
    first: tuple[torch.Tensor, int],
    second: tuple[torch.Tensor, int],
    is_gated: bool,
) -> torch.Tensor:
    """As ``kernels.pair``, in one call of ggml's."""
    return _compute_products(operation.GATED if is_gated else operation.BESIDE, x, first, second)


def dequantize(weight: torch.Tensor, type: int, columns: int) -> torch.Tensor:
    """The weights [rows, columns] of rows [rows, bytes], in 32-bit floats."""
    values = torch.empty((weight.shape[0], columns), dtype=torch.float32)
    order = torch.arange(weight.shape[0], dtype=torch.int32)
    graph = _graph(_Rows, type, weight.shape[0], columns, weight.shape[0])
    for tensor, numbers in zip(graph.tensors, (weight, order, values), strict=True):
        tensor.data = numbers.data_ptr()
    graph.compute()
    return values


def repack(weight: torch.Tensor, type: int, columns: int) -> int:
    """Interleaves the rows of a weight, in its place, where ggml has kernels for that here.

    Returns:
        the number of what it is then: ``type`` where it is left as it is
    """
    ggml, buffer = library(), _repack_buffer()
    if buffer is None or not weight.is_contiguous():
        return type
    graph = _Graph(ggml)
    tensor = graph.tensor(type, columns, weight.shape[0])
    if not _is_repacked(ggml, buffer, tensor):
        return type
    packed = weight.clone()
    tensor.contents.data = weight.data_ptr()
    ggml.ggml_backend_tensor_set(tensor, packed.data_ptr(), 0, packed.numel())
    return type + REPACKED


def forget() -> None:
    """Gives back what this thread keeps."""
    operation.forget()
    _graphs().clear()


class _Graph:
    """A graph of few operations."""

    def __init__(self, ggml: Any) -> None:
        size = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(8, False)
        parameters = ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True)
        self._ggml = ggml
        self._context = ggml.ggml_init(parameters)
        if not self._context:
            raise MemoryError("ggml has no memory for a graph")
        weakref.finalize(self, ggml.ggml_free, self._context).atexit = False

    def tensor(self, type: int, columns: int, rows: int) -> Any:
        return self._ggml.ggml_new_tensor_2d(self._context, type, columns, rows)

    def plan(self, *results: Any) -> None:
        """Plans to compute results, which are operations."""
        ggml = self._ggml
        graph = ggml.ggml_new_graph_custom(self._context, 8, False)
        for result in results:
            ggml.ggml_build_forward_expand(graph, result)
        # More threads than OpenMP gives are none.
        self._plan = ggml.ggml_graph_plan(graph, torch.get_num_threads(), None)
        self._work = torch.empty(max(1, self._plan.work_size), dtype=torch.uint8)
        work = ctypes.c_void_p(self._work.data_ptr())
        self._plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))
        self._addresses = (
            ctypes.cast(graph, ctypes.c_void_p),
            ctypes.c_void_p(ctypes.addressof(self._plan)),
        )
        self._compute = _compute(ggml)

    def keep(self) -> None:
        """Called where a thread keeps it."""

    def compute(self) -> None:
        if status := self._compute(*self._addresses):
            raise RuntimeError(f"ggml could not compute a product (status {status})")


class _Products(_Graph):
    """A product, or two, of numbers that are put into ``numbers``.

    Args:
        kind: as ``operation`` has them
        weights: type and rows of each
    """

    def __init__(
        self, ggml: Any, kind: int, tokens: int, columns: int, *weights: tuple[int, int]
    ) -> None:
        super().__init__(ggml)
        self._tokens = tokens
        self.weights: list[Any] = []
        absent = (operation.MOST - len(weights)) * [(0, 0)]
        self._key = operation.Key(
            *(kind, tokens, torch.get_num_threads(), columns), *chain(*weights, *absent)
        )
        x = self.tensor(_F32, columns, tokens)
        self.numbers = self._room("numbers", columns, x)
        first = self._product(x, columns, *weights[0])
        self.results = [self._room("product", weights[0][1], first)]
        outputs = [first]
        if kind != operation.SINGLE:
            if kind == operation.GATED:
                columns = weights[0][1] // 2
                x = ggml.ggml_swiglu(self._context, first)
                self._inner = self._room("inner", columns, x)
                outputs, self.results = [], []
            second = self._product(x, columns, *weights[1])
            self.results.append(self._room("second product", weights[1][1], second))
            outputs.append(second)
        self.plan(*outputs)

    def _product(self, x: Any, columns: int, type: int, rows: int) -> Any:
        weight = self.tensor(type % REPACKED, columns, rows)
        if type >= REPACKED:
            _is_repacked(self._ggml, _repack_buffer(), weight)
        self.weights.append(weight.contents)
        return self._ggml.ggml_mul_mat(self._context, weight, x)

    def _room(self, what: str, columns: int, tensor: Any) -> torch.Tensor:
        """Room for the numbers of a tensor."""
        if self._tokens > _FEW:
            room = torch.empty(self._tokens, columns, dtype=torch.float32)
        else:
            room = _room(what, self._tokens, columns)
        tensor.contents.data = room.data_ptr()
        return room

    def keep(self) -> None:
        """Has the compiled operations compute with it, for as long as this thread keeps it."""
        places = (
            ctypes.addressof(weight) + self._ggml.ggml_tensor.data.offset for weight in self.weights
        )
        addresses = ctypes.c_void_p * operation.MOST
        operation.keep(
            self._compute,
            self._key,
            operation.Product(
                *self._addresses,
                addresses(*places),
                self.numbers.data_ptr(),
                addresses(*(result.data_ptr() for result in self.results)),
            ),
        )


class _Rows(_Graph):
    """Rows of a weight, in an order."""

    def __init__(self, ggml: Any, type: int, rows: int, columns: int, count: int) -> None:
        super().__init__(ggml)
        weight = self.tensor(type, columns, rows)
        order = self.tensor(_I32, count, 1)
        result = ggml.ggml_get_rows(self._context, weight, order)
        self.plan(result)
        self.tensors = (weight.contents, order.contents, result.contents)


def _compute_products(
    kind: int, x: torch.Tensor, *weights: tuple[torch.Tensor, int]
) -> torch.Tensor:
    """
    Args:
        weights: each with its type
    """
    columns, shapes = x.shape[-1], [(type, len(weight)) for weight, type in weights]
    tokens = x.numel() // columns
    rows = shapes[-1][1] if kind == operation.GATED else sum(rows for _, rows in shapes)
    if not tokens:
        return x.new_empty((*x.shape[:-1], rows))
    if tokens > _FEW:
        # Not kept: there may be one for each length of a prompt, with room for all of its numbers.
        graph = _Products(library(), kind, tokens, columns, *shapes)
    else:
        graph = _graph(_Products, kind, tokens, columns, *shapes)
    # Each call of torch's counts here: a token goes through a hundred products and more.
    graph.numbers.copy_(x if x.dim() == 2 else x.reshape(tokens, columns))
    for tensor, (weight, _) in zip(graph.weights, weights, strict=True):
        tensor.data = weight.data_ptr()
    graph.compute()
    results = [result.to(x.dtype, copy=True) for result in graph.results]
    product = results[0] if len(results) == 1 else torch.cat(results, -1)
    return product if x.dim() == 2 else product.view(*x.shape[:-1], rows)


def _room(what: str, tokens: int, size: int) -> torch.Tensor:
    """Floats [tokens, size] of this thread's, which all of its graphs use one after the other.

    There is room for the most tokens from the start, since each graph keeps the room that it was
    made with: one that grew with the number of tokens would be kept in all of its sizes.
    """
    room: torch.Tensor | None = getattr(_thread, what, None)
    if room is None or room.numel() < _FEW * size:
        room = torch.empty(_FEW * size, dtype=torch.float32)
        setattr(_thread, what, room)
    return room[: tokens * size].view(tokens, size)


def _graph(kind: Callable[..., Any], *shape: Any) -> Any:
    graphs = _graphs()
    key = (kind, torch.get_num_threads(), shape)
    graph = graphs.get(key)
    if graph is None:
        if len(graphs) == _GRAPHS:
            forget()
        graph = graphs[key] = kind(library(), *shape)
        graph.keep()
    return graph


def _graphs() -> dict[Any, Any]:
    """Those that this thread keeps."""
    try:
        graphs: dict[Any, Any] = _thread.graphs
    except AttributeError:
        graphs = _thread.graphs = {}
    return graphs


@functools.cache
def _compute(ggml: Any) -> Any:
    """The function that every call ends in, without the checks of its wrapper."""
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    return function(("ggml_graph_compute", _shared(ggml, "ggml-cpu")))


@functools.cache
def _shared(ggml: Any, name: str) -> ctypes.CDLL:
    folder = next(iter(ggml.__path__))
    return ctypes.CDLL(f"{folder}/lib/lib{name}.so")


@functools.cache
def _repack_buffer() -> Any:
    """What tells ggml that a tensor is repacked; None where this processor has no such kernels."""
    ggml = library()
    base = _shared(ggml, "ggml-base")
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    address = base.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    if not address:
        return None
    types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(None)
    index = 0
    while types[index]:
        if ggml.ggml_backend_buft_name(types[index]) == b"CPU_REPACK":
            return ggml.ggml_backend_buft_alloc_buffer(types[index], 1)
        index += 1
    return None


def _is_repacked(ggml: Any, buffer: Any, tensor: Any) -> bool:
    """Marks a tensor as repacked, where ggml has kernels for its type and shape."""
    base = _shared(ggml, "ggml-base")
    tensor.contents.buffer = buffer
    base.ggml_backend_buffer_init_tensor(
        ctypes.c_void_p(buffer), ctypes.c_void_p(ctypes.addressof(tensor.contents))
    )
    return bool(tensor.contents.extra)
