"""Requests without a LoRA adapter get none.

PyTorch's operations for LoRA, which the CPU uses, take index -1 ("no adapter") for the last one, so
that a request without an adapter gets one when it is computed with others that have theirs.
https://github.com/vllm-project/vllm/pull/48421
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm.lora.ops.torch_ops.lora_ops": ("bgmv_expand", "bgmv_expand_slice"),
    "vllm.lora.ops.torch_ops": ("bgmv_expand", "bgmv_expand_slice"),
    "vllm.lora.punica_wrapper.punica_cpu": ("bgmv_expand", "bgmv_expand_slice"),
}


def apply() -> None:
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    for module in (lora_ops, torch_ops, sys.modules.get("vllm.lora.punica_wrapper.punica_cpu")):
        if module is not None:
            replace(module, "bgmv_expand", without_adapterless)
            replace(module, "bgmv_expand_slice", without_adapterless)


@functools.cache
def without_adapterless(expand: Callable[..., None]) -> Callable[..., None]:
    # Every way through an adapter ends in this step, and nothing in gives nothing out.
    @functools.wraps(expand)
    def wrapped(
        inputs: Any, weights: Any, output: Any, lora_indices: Any, *args: Any, **kwargs: Any
    ) -> None:
        inputs = inputs.masked_fill((lora_indices < 0).unsqueeze(-1), 0)
        expand(inputs, weights, output, lora_indices, *args, **kwargs)

    return wrapped
