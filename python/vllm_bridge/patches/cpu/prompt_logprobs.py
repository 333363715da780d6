"""Each prompt is scored with its own LoRA adapter.

Log probabilities of prompts are computed prompt by prompt, with logits for each of its tokens, and
PyTorch's operations for LoRA get the adapters of the whole batch with them: one for each request,
in any case not those of these rows. Other numbers of rows end the engine.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {"vllm.v1.worker.cpu_model_runner": ("CPUModelRunner._get_prompt_logprobs_dict",)}


def apply() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    replace(CPUModelRunner, "_get_prompt_logprobs_dict", prompt_by_prompt)


def prompt_by_prompt(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def wrapped(self: Any, hidden_states: Any, scheduled: dict[str, int]) -> dict[str, Any]:
        if self.lora_config is None or not self.num_prompt_logprobs:
            return original(self, hidden_states, scheduled)
        # Models with towers have more of them; the language model's is the first.
        wrappers = self.lora_manager._adapter_manager.punica_wrapper_mapping
        wrapper = next(iter(wrappers.values()))
        asked = self.num_prompt_logprobs
        found: dict[str, Any] = {}
        try:
            for request_id in [name for name in asked if name in scheduled]:
                self.num_prompt_logprobs = {request_id: asked[request_id]}
                row = self.input_batch.req_id_to_index[request_id]
                with _adapter_of_token(wrapper, int(self.query_start_loc.np[row])):
                    found |= original(self, hidden_states, scheduled)
                if not self.num_prompt_logprobs:  # the prompt is done
                    del asked[request_id]
        finally:
            self.num_prompt_logprobs = asked
        return found

    return wrapped


@contextlib.contextmanager
def _adapter_of_token(wrapper: Any, token: int) -> Iterator[None]:
    # A single index is for all rows.
    before = wrapper._sampler_indices, wrapper.indices_len
    wrapper._sampler_indices = wrapper.token_lora_indices[token : token + 1]
    wrapper.indices_len = [before[1][0], 1, *before[1][2:]]
    try:
        yield
    finally:
        wrapper._sampler_indices, wrapper.indices_len = before
