"""A request with a seed may have its prompt read in parts.

Between two parts vLLM samples a token that it throws away, and turns the request's generator back
by what that took. A CPU's generator cannot be turned back: the engine ended with "CPU Generator
does not use offset", and all its requests with it. Here such a token has no generator.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {"vllm.v1.worker.gpu_model_runner": ("GPUModelRunner.sample_tokens",)}


def apply() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    replace(GPUModelRunner, "sample_tokens", without_unused_generators)


def without_unused_generators(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sample_tokens)
    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        is_thrown_away = runner.discard_request_mask.np
        unused = {row: generators.pop(row) for row in list(generators) if is_thrown_away[row]}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            generators.update(unused)

    return wrapped
