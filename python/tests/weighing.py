"""What the weights of a loaded model take of memory, exactly: the bytes of every tensor that can be
reached from the model, and of what kernels have prepared for themselves.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# Objects of these packages may hold tensors; a config leads to the whole engine.
PACKAGES = ("vllm.", "vllm_", "bitsandbytes.", "torchao.")
CONFIGS = ("vllm.config.", "vllm.model_executor.layers.quantization.base_config")


@dataclasses.dataclass
class Weight:
    """Sizes in bytes.

    Args:
        linear: of the linear layers
        others: of all else, such as embeddings
        heap: what the process had got more from its allocator when the model was loaded
        private: what it had got more from the system
        peak: the most of it while the model was loaded
    """

    linear: int
    others: int
    heap: int
    private: int
    peak: int


def install() -> None:
    """Has the workers of engines, as forks of this process, weigh what they load."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    _mark_handlers()
    load_model = CPUWorker.load_model

    def weighed(self: Any, *args: Any, **kwargs: Any) -> Any:
        gc.collect()  # what was inherited and is let go meanwhile
        private, heap = _private_bytes(), _heap_bytes()
        with _peak() as peak:
            result = load_model(self, *args, **kwargs)
        gc.collect()
        linear, others = weigh(self.get_model())
        self.weight = Weight(
            linear=linear,
            others=others,
            heap=_heap_bytes() - heap,
            private=_private_bytes() - private,
            peak=max(peak) - private,
        )
        return result

    CPUWorker.load_model = weighed
    CPUWorker.get_weight = lambda self: dataclasses.asdict(self.weight)


def weigh(model: torch.nn.Module) -> tuple[int, int]:
    """What the linear layers of a model take, and all else of it."""
    from vllm.model_executor.layers.linear import LinearBase

    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    linear = sum(_storages(layers).values())
    return linear, sum(_storages([model]).values()) - linear


def _storages(roots: Iterable[Any]) -> dict[int, int]:
    """The size of each piece of memory that can be reached, by its address."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    rest = list(roots)
    while rest:
        value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and _is_plain(value):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        if (size := getattr(value, "prepared_bytes", None)) is not None:
            found[id(value)] = size
        rest.extend(_parts(value))
    found.pop(0, None)
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has memory of its own: not one that consists of others, nor one of no device."""
    return tensor.device.type != "meta" and not hasattr(tensor, "__tensor_flatten__")


def _parts(value: Any) -> Iterator[Any]:
    """What an object holds that may hold tensors."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or ())
        yield from value.__defaults__ or ()
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, torch.nn.Module | torch.Tensor) or _is_ours(type(value)):
        yield from getattr(value, "__dict__", {}).values()


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(PACKAGES) and not any(
        base.__module__.startswith(CONFIGS) for base in kind.__mro__
    )


def _mark_handlers() -> None:
    """Has the handles of oneDNN, whose prepared weights are no tensors, tell their size."""
    from vllm import _custom_ops

    def marking(create: Any) -> Any:
        def wrapped(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            handler = create(weight, *args, **kwargs)
            handler.prepared_bytes = weight.numel() * weight.itemsize
            return handler

        return wrapped

    for name in ("create_onednn_mm", "create_onednn_scaled_mm"):
        setattr(_custom_ops, name, marking(getattr(_custom_ops, name)))


class _MallInfo(ctypes.Structure):
    _fields_ = [(f"field_{index}", ctypes.c_size_t) for index in range(10)]


def _heap_bytes() -> int:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    info = mallinfo()
    # What is in use, of the arenas and in maps of its own.
    return int(info.field_7 + info.field_4)


def _private_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return _kilobytes("smaps_rollup", "Anonymous:") * 1024


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """What the process has of the system, looked at all the time."""
    seen = [_kilobytes("status", "RssAnon:") * 1024]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            seen.append(_kilobytes("status", "RssAnon:") * 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _kilobytes(file: str, field: str) -> int:
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
