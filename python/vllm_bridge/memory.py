"""How much memory there is."""

import contextlib
import os
from pathlib import PurePosixPath

GIB = 1024**3

# What the two versions of control groups call the memory's hierarchy, below the folder that they
# are mounted in and in /proc/self/cgroup, the limit, what is used, and what of that is page cache.
_CGROUPS = (
    ("", "memory.max", "memory.current", "file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def gib(size: float) -> str:
    """A size in memory as people read it."""
    return f"{size / GIB:.1f} GiB"


def available_cpu(root: str = "/") -> int:
    """Bytes that a process can still get without swapping: what the system has left, or what
    its control group or one above it allows, whichever is least.

    Args:
        root: the folder that stands for ``/``, for tests
    """
    available = _meminfo(os.path.join(root, "proc/meminfo"))
    limits = [
        _allowed(os.path.join(root, "sys/fs/cgroup", hierarchy, group), *names)
        for hierarchy, *names in _CGROUPS
        for group in _groups(os.path.join(root, "proc/self/cgroup"), hierarchy)
    ]
    return min([available, *(limit for limit in limits if limit is not None)])


def _groups(path: str, hierarchy: str) -> list[str]:
    """The own group and all above it, relative to the first. A container may see its own as the
    first, and be told of a path that is not there."""
    own = PurePosixPath()
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            if controllers == hierarchy:
                own = PurePosixPath(group.lstrip("/"))
    return [str(group) for group in (own, *own.parents)]


def _meminfo(path: str) -> int:
    with open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no MemAvailable in {path}")


def _allowed(folder: str, limit_name: str, usage_name: str, cache_name: str) -> int | None:
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
