"""C++ of this library, compiled once for the CPU that it runs on, and kept in the user's cache."""

import ctypes
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

logger = logging.getLogger(__name__)

# What all sources are compiled with.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-w")

# What they include of this library's.
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))

TIMEOUT_SECONDS = 300


def load(source: Path, *flags: str, otherwise: str) -> ctypes.CDLL | None:
    """The library of a source; None where it cannot be had, which is logged. The first process on a
    machine to call this takes the seconds that compiling takes.

    Args:
        flags: more to compile it with, and after it what it is linked with
        otherwise: what it is like without it, as a sentence
    """
    try:
        return ctypes.CDLL(str(build(_cache(), source, *flags)))
    except (OSError, subprocess.SubprocessError) as error:
        output: Any = getattr(error, "stderr", None) or b""
        said = output.decode("utf-8", "replace")[-2000:]
        logger.warning("%s: %s. %s", otherwise, error, said)
        return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path, source: Path, *flags: str) -> Path:
    """The library of a source for this compiler and CPU, compiled if it is not there yet.

    Args:
        flags: as ``load`` has them

    Raises:
        OSError: without a compiler, or where the folder cannot be written to, or others can
        subprocess.SubprocessError: if it does not compile
    """
    with_what = compiler()
    if with_what is None:
        raise FileNotFoundError(
            "there is no C++ compiler. Install one (Debian and Ubuntu: apt install g++), or name "
            "one in CXX"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    digest = _digest(Path(with_what), source, flags)
    path = folder / f"{source.parent.name}-{source.stem}-{digest}.so"
    if path.exists():
        return path
    # Other processes may be at the same: the last one to be done replaces the same by the same.
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        made = Path(parts, path.name)
        subprocess.run(  # noqa: S603
            [with_what, *FLAGS, "-shared", str(source), *flags, "-o", str(made)],
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


def _digest(compiler: Path, source: Path, flags: tuple[str, ...]) -> str:
    compiler = compiler.resolve()
    sources = [path.read_bytes() for path in (source, *HEADERS)]
    parts = (sources, FLAGS, flags, str(compiler), compiler.stat().st_mtime_ns, _cpu())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What the CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    features = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(features)}))
