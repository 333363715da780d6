"""The kernels of ``kernels.cpp``, compiled once for the CPU and kept in the user's cache folder.

Where there is no C++ compiler, or the weights are not on a CPU, torch computes the same.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-exceptions", "-fopenmp", "-fPIC", "-w")

# OpenMP's library is left out: torch has loaded one, and two would take each other's cores.
LINKED = ("-shared", "-nodefaultlibs", "-lgcc", "-lc")

TIMEOUT_SECONDS = 300

# Up to so many tokens are multiplied with weights as they are unpacked. For more of them a strip of
# plain weights and oneDNN's product are faster, as measured.
FEW_TOKENS = 16

# What computes where there are no kernels, for people to read.
TORCH = "torch (dequantized for each product)"

# The numbers of ``Type`` in the source.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

logger = logging.getLogger(__name__)


class Weights:
    """A layer, as the kernels take it.

    Args:
        kind: ``grouped`` or ``tables``
        packed: rows of bits
        bits: of a number
        columns: of a row
        values: what numbers become values with, of one dtype
        sizes: what else the structure of the kind has
    """

    def __init__(
        self,
        kind: str,
        packed: torch.Tensor,
        bits: int,
        columns: int,
        values: tuple[torch.Tensor, ...],
        *sizes: int,
    ) -> None:
        self._kind, self._bits, self._columns = kind, bits, columns
        # They must live as long as their addresses are used.
        self._tensors = [tensor.contiguous() for tensor in (packed, *values)]
        numbers = (
            self._tensors[0].data_ptr(),
            packed.shape[1],
            packed.shape[0],
            columns,
            *(tensor.data_ptr() for tensor in self._tensors[1:]),
            _TYPES[values[0].dtype],
            *sizes,
        )
        # Pointers and `int64_t` alike take 8 bytes.
        self._fields = (ctypes.c_int64 * len(numbers))(*numbers)

    def matmul(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """The product, and something that is added to it, in float32, before it is rounded."""
        x = x.contiguous()
        if added is not None:
            added = added.contiguous()
        product = x.new_empty((*x.shape[:-1], self._tensors[0].shape[0]))
        tokens = x.numel() // self._columns
        sums = None if added is None else added.data_ptr()
        self._call("matmul", x.data_ptr(), tokens, _TYPES[x.dtype], product.data_ptr(), sums)
        return product

    def rows(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some of the weights as plain numbers."""
        plain = torch.empty((rows.stop - rows.start, self._columns), dtype=dtype)
        self._call("dequantize", rows.start, rows.stop, _TYPES[dtype], plain.data_ptr())
        return plain

    def _call(self, name: str, *arguments: int | None) -> None:
        function = getattr(library(), f"{self._kind}_{name}")
        function(self._fields, self._bits, *arguments, torch.get_num_threads())


def takes(packed: torch.Tensor, values: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether there are kernels for these weights, and for numbers of this dtype."""
    return (
        packed.device.type == "cpu"
        and dtype in _TYPES
        and values[0].dtype in _TYPES
        and all(tensor.dtype == values[0].dtype for tensor in values)
        and library() is not None
    )


def kernel(is_cpu: bool = True) -> str:
    """What computes products with packed weights, for people to read."""
    if not is_cpu:
        return "torch (layer by layer)"
    if library() is None:
        return TORCH
    return "C++ compiled for this CPU" + (" (AVX-512 bfloat16)" if has_vectors() else "")


def note(is_cpu: bool) -> str | None:
    """What users should know of an engine whose layers the kernels compute, or would."""
    if not is_cpu:
        return "Weights stay packed; torch dequantizes them layer by layer for each product."
    if library() is not None:
        return None
    said = "Weights stay packed, and torch dequantizes them for each product. "
    if _compiler() is None:
        return (
            f"{said}With a C++ compiler (`g++`) products are computed several times as fast: "
            "install one, and start the engine again."
        )
    return (
        f"{said}The kernels that compute products several times as fast could not be made here: "
        "the log of the engine says why."
    )


def has_vectors() -> bool:
    """Whether the kernels have what makes them several times as fast as bfloat16."""
    loaded = library()
    return loaded is not None and bool(loaded.has_vectors())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, which is logged. The first process on a
    machine to call this takes the seconds that compiling takes."""
    try:
        return _load(build(_cache()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        logger.warning(
            "Packed weights are computed by torch, many times slower than they could be: %s. %s",
            error,
            output.decode("utf-8", "replace")[-2000:],
        )
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> Path:
    """The library for this source, compiler and CPU, compiled if it is not there yet.

    Raises:
        OSError: without a compiler, or where the folder cannot be written to, or others can
        subprocess.SubprocessError: if it does not compile
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError(
            "there is no C++ compiler. Install one (Debian and Ubuntu: apt install g++), or name "
            "one in CXX"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    path = folder / f"packed-{_digest(Path(compiler))}.so"
    if path.exists():
        return path
    # Other processes may be at the same: the last one to be done replaces the same by the same.
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        made = Path(parts, path.name)
        subprocess.run(  # noqa: S603
            [compiler, *FLAGS, str(SOURCE), *LINKED, "-o", str(made)],
            check=True,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
        )
        made.replace(path)
    return path


def _check_owner(folder: Path) -> None:
    """Whoever can write to the folder can have this process run what they like."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"the folder of compiled kernels, {folder}, can be written to by others. Make it yours "
            "(chown), and yours alone (chmod 700), or name another cache folder in XDG_CACHE_HOME"
        )


def _cache() -> Path:
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(
            "this user has no home for compiled kernels. Name a cache folder in XDG_CACHE_HOME"
        ) from error
    return Path(cache, "ex_vllm", "kernels")


def _digest(compiler: Path) -> str:
    compiler = compiler.resolve()
    parts = (SOURCE.read_bytes(), FLAGS, LINKED, str(compiler), compiler.stat().st_mtime_ns, _cpu())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What the CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    features = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(features)}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    for kind in ("grouped", "tables"):
        matmul: Any = getattr(loaded, f"{kind}_matmul")
        numbers = (pointer, integer, pointer, integer, integer)
        matmul.argtypes = (*numbers, pointer, pointer, integer)
        dequantize: Any = getattr(loaded, f"{kind}_dequantize")
        dequantize.argtypes = (pointer, integer, integer, integer, integer, pointer, integer)
        matmul.restype = dequantize.restype = None
    loaded.has_vectors.restype = integer
    return loaded
