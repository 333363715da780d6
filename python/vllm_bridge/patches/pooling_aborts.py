"""A request that pools ends in peace where the engine core itself has aborted it.

The core aborts what is under way when it is put to sleep or asked to stop, and says so without a
tensor; vLLM's handler of outputs takes that for an output of text, and falls over it together with
the engine. Where its caller aborts a request, vLLM puts an empty tensor there.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {"vllm.v1.engine.output_processor": ("OutputProcessor.process_outputs",)}


def apply() -> None:
    # Where outputs are handled, it is imported by now.
    module = sys.modules.get("vllm.v1.engine.output_processor")
    if module is not None:
        replace(module.OutputProcessor, "process_outputs", _with_empty_tensors)


def _with_empty_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import EMPTY_CPU_TENSOR

    @functools.wraps(original)
    def wrapped(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if output.finish_reason == FinishReason.ABORT and output.pooling_output is None:
                state = self.request_states.get(output.request_id)
                if state is not None and state.detokenizer is None:
                    output.pooling_output = EMPTY_CPU_TENSOR
        return original(self, outputs, *args, **kwargs)

    return wrapped
