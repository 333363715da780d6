"""The weights of a model on CPUs lie in huge pages.

To decode a token is to read all weights once, and a processor looks up the place of each page that
it reads: with pages of 2 MiB instead of 4 KiB llama.cpp's products take a fifth less time. vLLM
leaves weights where memory was given out for them. Once a model is loaded, Linux is asked (6.1 and
later; ``MADV_COLLAPSE``) to copy what fills huge pages into such, whatever has it: parameters, or
what a kernel made of them. Of what is empty, or shared with the process that this one was forked
from, nothing is touched, so that no memory more is taken. A machine whose transparent huge pages
are set to ``never`` gets none.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {"vllm.v1.worker.cpu_model_runner": ("CPUModelRunner.load_model",)}

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")

# Of Linux, for a range of addresses: collapse it into huge pages now.
MADV_COLLAPSE = 25

# How many huge pages are looked at, and asked for, at a time.
_AT_ONCE = 64

# What /proc/self/pagemap says in the highest byte of a page that is there and nobody else's.
_OWN = 0x81


def apply() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    replace(CPUModelRunner, "load_model", collapsing)


def collapsing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_model(*args: Any, **named: Any) -> None:
        original(*args, **named)
        collapse()

    return load_model


def collapse() -> None:
    """Has what fills huge pages in this process moved there, where Linux can do that."""
    try:
        # Linux would collapse them nevertheless.
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, length in list(_full(size)):
            # Where it does not work, for want of memory in one piece, pages stay as they are.
            madvise(start, length, MADV_COLLAPSE)
    except OSError:
        return


def _full(size: int) -> Iterator[tuple[int, int]]:
    """Address and length of memory that is this process's own, in whole huge pages.

    Args:
        size: of a huge page, in bytes
    """
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        lines = [line.split() for line in maps]
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for between, permissions, _, _, inode, *_ in lines:
            if permissions != "rw-p" or inode != "0":
                continue
            start, end = (int(address, 16) for address in between.split("-"))
            first, last = -(-start // size) * size, end // size * size
            for address in range(first, last, _AT_ONCE * size):
                count = min(_AT_ONCE, (last - address) // size)
                said = os.pread(pages.fileno(), count * size // page * 8, address // page * 8)
                is_own = np.frombuffer(said, "<u8").reshape(-1, size // page) >> 56 & _OWN == _OWN
                place = 0
                for is_full, group in itertools.groupby(is_own.all(1)):
                    length = len(list(group))
                    if is_full:
                        yield address + place * size, length * size
                    place += length
