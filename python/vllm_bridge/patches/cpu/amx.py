"""Asks the kernel for AMX's registers before anything uses them.

Linux gives them to a process that asked (``arch_prctl(ARCH_REQ_XCOMP_PERM)``) and ends any other at
its first such instruction, with SIGILL. vLLM uses AMX wherever the processor has it, and leaves the
asking to torch's products: an engine whose first operator is one of vLLM's own, as with most of our
loaders and in forked processes, died without a word. Where the kernel refuses, AMX is not used.

Source: the kernel's Documentation/arch/x86/xstate.rst.
"""

import torch

SEEN = ("0.32.",)
TOUCHES: dict[str, tuple[str, ...]] = {}  # torch's names only


def apply() -> None:
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        torch.cpu._is_amx_tile_supported = torch.cpu._is_amx_fp16_supported = lambda: False
