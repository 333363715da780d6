"""Pipeline parallelism on CPUs without compilation.

What a stage gets from the one before it is copied to where the model reads it. vLLM makes that
place when it tries the model out, which on CPUs it does only in order to compile; with
``enforce_eager`` every later stage died at its first request ("assert self.intermediate_tensors is
not None"). Here it is made when the model is loaded.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {"vllm.v1.worker.cpu_model_runner": ("CPUModelRunner.load_model",)}


def apply() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    replace(CPUModelRunner, "load_model", making_room)


def making_room(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_model(runner: Any, *args: Any, **named: Any) -> None:
        from vllm.distributed import get_pp_group

        original(runner, *args, **named)
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    return load_model
