"""Asks the kernel for AMX's registers before anything uses them.

Linux gives them to a process that asked (``arch_prctl(ARCH_REQ_XCOMP_PERM)``) and ends any other at
its first such instruction, with SIGILL. vLLM uses AMX wherever the processor has it, and leaves the
asking to torch's products: an engine whose first operator is one of vLLM's own, as with most of our
loaders and in forked processes, died without a word. Where the kernel refuses, AMX is not used.

oneDNN, which has most of the products, is limited by a variable: ``ONEDNN_MAX_CPU_ISA``. Here it
holds for vLLM's kernels, too, so that one can have the answers of a processor without AMX.

Sources: the kernel's Documentation/arch/x86/xstate.rst; "CPU Dispatcher Control" in oneDNN's guide.
"""

import os

import torch

SEEN = ("0.32.",)
TOUCHES: dict[str, tuple[str, ...]] = {}  # torch's names only


def apply() -> None:
    if torch.cpu._is_amx_tile_supported() and not (_is_wanted() and torch.cpu._init_amx()):
        torch.cpu._is_amx_tile_supported = torch.cpu._is_amx_fp16_supported = lambda: False


def _is_wanted() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit in ("", "ALL", "DEFAULT") or "AMX" in limit
