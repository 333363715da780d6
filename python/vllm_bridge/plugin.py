"""Runs in every process that vLLM starts, through the entry point ``vllm.general_plugins``."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_bridge import completeness, heartbeat, queueing, ranks
from vllm_bridge.machine import few_cores
from vllm_bridge.quantization import registry

# How long a reader of shared memory sleeps before it looks again.
NAP_SECONDS = 20e-6


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    heartbeat.start()
    if few_cores():
        _nap_instead_of_spinning()
    _tell_what_is_scheduled()
    ranks.install()
    _leave_out_adapters_that_are_not_asked_for()
    _score_each_prompt_with_its_own_adapter()
    _compute_without_kernels()
    completeness.install()
    for method in registry.every():
        method.install()


def _nap_instead_of_spinning() -> None:
    # A reader that has had a message within the last second yields in a tight loop until the
    # next one. On few cores that starves the other ranks and the event loop for tens of
    # milliseconds at a time, and a nap of microseconds cures it. What happens after the busy
    # second (sleeping on a socket until there is a notification) stays vLLM's.
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.wait
    if original.__module__ == __name__:
        return

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() <= self.last_read + self.busy_loop_s:
            time.sleep(NAP_SECONDS)
        else:
            original(self, timeout_ms)

    SpinCondition.wait = wait


def _tell_what_is_scheduled() -> None:
    # Where vLLM's engine lives, it is imported by now.
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        setattr(core.EngineCore, queueing.METHOD, queueing.scheduled)


def _leave_out_adapters_that_are_not_asked_for() -> None:
    # PyTorch's operations for LoRA, which the CPU uses, take index -1 ("no adapter") for the last
    # one, so that a request without an adapter gets one when it is computed with others that
    # have theirs. https://github.com/vllm-project/vllm/pull/48421
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    for name in ("bgmv_expand", "bgmv_expand_slice"):
        original = getattr(lora_ops, name)
        if hasattr(original, "__wrapped__"):
            continue
        expand = _without_adapterless(original)
        for module in (lora_ops, torch_ops, sys.modules.get("vllm.lora.punica_wrapper.punica_cpu")):
            if module is not None:
                setattr(module, name, expand)


def _compute_without_kernels() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_bridge.quantization import experts, fp8, kv_cache

        fp8.install()
        experts.install()
        kv_cache.install()


def _score_each_prompt_with_its_own_adapter() -> None:
    # Log probabilities of prompts are computed prompt by prompt, with logits for each of its
    # tokens, and PyTorch's operations for LoRA get the adapters of the whole batch with them: one
    # for each request, in any case not those of these rows. Other numbers of rows end the engine.
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner._get_prompt_logprobs_dict
    if not hasattr(original, "__wrapped__"):
        CPUModelRunner._get_prompt_logprobs_dict = _prompt_by_prompt(original)


def _prompt_by_prompt(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
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


def _without_adapterless(expand: Callable[..., None]) -> Callable[..., None]:
    # Every way through an adapter ends in this step, and nothing in gives nothing out.
    @functools.wraps(expand)
    def wrapped(
        inputs: Any, weights: Any, output: Any, lora_indices: Any, *args: Any, **kwargs: Any
    ) -> None:
        inputs = inputs.masked_fill((lora_indices < 0).unsqueeze(-1), 0)
        expand(inputs, weights, output, lora_indices, *args, **kwargs)

    return wrapped
