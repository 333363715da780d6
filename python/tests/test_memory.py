from pathlib import Path

import pytest

from vllm_bridge.memory import GIB, available_cpu


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="ascii")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    return tmp_path


def test_what_the_system_has_left(root: Path) -> None:
    assert available_cpu(str(root)) == 8 * GIB


def test_what_the_control_group_allows(root: Path) -> None:
    write(root, "sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.stat", f"anon {GIB}\nfile {2 * GIB}\n")
    assert available_cpu(str(root)) == 3 * GIB


def test_a_control_group_without_a_limit(root: Path) -> None:
    write(root, "sys/fs/cgroup/memory.max", "max\n")
    write(root, "sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.stat", "file 0\n")
    assert available_cpu(str(root)) == 8 * GIB


def test_the_first_version_of_control_groups(root: Path) -> None:
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", "total_cache 0\n")
    assert available_cpu(str(root)) == 0


@pytest.mark.parametrize(
    ("below", "limit", "usage"),
    [
        ("", "memory.max", "memory.current"),
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_each_group_from_the_first_to_the_own(
    root: Path, below: str, limit: str, usage: str
) -> None:
    write(root, "proc/self/cgroup", "9:pids:/\n4:memory:/a.slice/b\n0::/a.slice/b\n")
    for group, size in (("", 9), ("a.slice/", 5), ("a.slice/b/", 4)):
        write(root, f"sys/fs/cgroup/{below}{group}{limit}", f"{size * GIB}\n")
        write(root, f"sys/fs/cgroup/{below}{group}{usage}", f"{3 * GIB}\n")
        write(root, f"sys/fs/cgroup/{below}{group}memory.stat", "rss 0\n")
    assert available_cpu(str(root)) == GIB
    write(root, f"sys/fs/cgroup/{below}a.slice/{usage}", f"{5 * GIB}\n")
    assert available_cpu(str(root)) == 0


def test_this_machine() -> None:
    assert available_cpu() > 0
