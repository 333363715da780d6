"""How much memory there is."""

import contextlib
import os

GIB = 1024**3

_CGROUP_V2 = "/sys/fs/cgroup"
_CGROUP_V1 = "/sys/fs/cgroup/memory"


def gib(size: float) -> str:
    """A size in memory as people read it."""
    return f"{size / GIB:.1f} GiB"


def available_cpu(root: str = "/") -> int:
    """Bytes that a process can still get without swapping: what the system has left, or what
    the control group allows, whichever is less.

    Args:
        root: the folder that stands for ``/``, for tests
    """
    available = _meminfo(os.path.join(root, "proc/meminfo"))
    limits = [
        _cgroup(root + _CGROUP_V2, "memory.max", "memory.current", "file"),
        _cgroup(root + _CGROUP_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
    ]
    return min([available, *(limit for limit in limits if limit is not None)])


def _meminfo(path: str) -> int:
    with open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no MemAvailable in {path}")


def _cgroup(folder: str, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        limit = int(_read(folder, limit_name))  # "max" is no number: no limit
        usage = int(_read(folder, usage_name))
        # The page cache counts as used and is given back under pressure.
        for line in _read(folder, "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == cache_name:
                usage -= int(value)
        return max(limit - usage, 0)
    return None


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding="ascii") as file:
        return file.read().strip()
