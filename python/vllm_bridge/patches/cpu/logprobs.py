"""Ranks of log probabilities are counted as they are, without a kernel compiled for it.

vLLM has PyTorch compile the one comparison that a rank takes, which on a CPU spares no time worth
the name, needs a C++ compiler, and takes the first request that asks for log probabilities 3 to 15
seconds.
"""

from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {"vllm.v1.sample.sampler": ("batched_count_greater_than",)}


def apply() -> None:
    from vllm.v1.sample import sampler

    replace(sampler, "batched_count_greater_than", uncompiled)


def uncompiled(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` was given."""
    function: Callable[..., Any] = compiled.__wrapped__  # type: ignore[attr-defined]
    return function
