"""Memory that is moved into huge pages."""

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest

from vllm_bridge.patches.cpu import huge_pages

HUGE = 2**21
COUNT = 4

# Of Linux: whether this process gets huge pages.
PR_SET_THP_DISABLE = 41


def is_possible() -> bool:
    """Whether Linux gives huge pages when asked for them here."""
    try:
        size = int((huge_pages._SETTINGS / "hpage_pmd_size").read_text())
    except OSError:
        return False
    with private(2 * HUGE) as room:
        room.write(b"x" * 2 * HUGE)
        whole = -(-address(room) // HUGE) * HUGE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return size == HUGE and madvise(whole, HUGE, huge_pages.MADV_COLLAPSE) == 0


def address(room: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(room))


def private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def filled(content: bytes) -> mmap.mmap:
    """Memory in small pages, also where Linux gives huge ones unasked."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    try:
        room = private(len(content))
        room.write(content)
    finally:
        prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)
    return room


def figures(room: mmap.mmap) -> dict[str, int]:
    """What Linux says of the mapping that memory is in, in bytes."""
    place, found, is_there = address(room), {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if between := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in between.groups())
            is_there = start <= place < end
        elif is_there and (figure := re.match(r"(\w+): +(\d+) kB", line)):
            found[figure[1]] = 1024 * int(figure[2])
    return found


# Where none can be moved there is nothing to see. What must stay as it is is tested anywhere.
NEEDS_HUGE_PAGES = pytest.mark.skipif(
    not is_possible(),
    reason="Linux has no MADV_COLLAPSE before 6.1, or no 2 MiB of memory in one piece now",
)


@NEEDS_HUGE_PAGES
def test_what_fills_huge_pages_is_moved_there_and_stays_what_it_is() -> None:
    content = os.urandom((COUNT + 1) * HUGE)
    room = filled(content)
    before = figures(room)["AnonHugePages"]
    huge_pages.collapse()
    assert figures(room)["AnonHugePages"] >= before + COUNT * HUGE
    assert room[:] == content


@NEEDS_HUGE_PAGES
def test_a_machine_that_is_set_to_never_gets_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hpage_pmd_size").write_text(f"{HUGE}\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    room = filled(b"x" * (COUNT + 1) * HUGE)
    before = figures(room)["AnonHugePages"]
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    huge_pages.collapse()
    assert figures(room)["AnonHugePages"] == before
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    huge_pages.collapse()
    assert figures(room)["AnonHugePages"] > before


def test_what_is_empty_takes_no_memory() -> None:
    room = private((COUNT + 1) * HUGE)
    # One page of each huge one is left out, and all of the last.
    for place in range(0, COUNT * HUGE, HUGE):
        room[place : place + HUGE - mmap.PAGESIZE] = b"x" * (HUGE - mmap.PAGESIZE)
    start = address(room)
    huge_pages.collapse()
    # A huge page begins at its own places, which are not those of the mapping.
    last = start + (COUNT - 1) * HUGE
    assert not [place for place, _ in huge_pages._full(HUGE) if start <= place <= last]


def test_what_a_fork_shares_stays_shared() -> None:
    room = filled(b"x" * (COUNT + 1) * HUGE)
    start, last = address(room), address(room) + COUNT * HUGE
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            touching = [place for place, _ in huge_pages._full(HUGE) if start <= place <= last]
            os.write(ready[1], b"shared" if not touching else b"moved")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 10) == b"shared"
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


def test_a_system_without_huge_pages_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path / "none")
    loaded: list[str] = []
    huge_pages.collapsing(loaded.append)("model")
    assert loaded == ["model"]
