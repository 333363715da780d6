"""vLLM's outputs as the maps that travel; names are vLLM's own."""

import json
from typing import Any

from vllm_bridge.rpc.protocol import pack_logprobs, pack_u32


def request_output(output: Any) -> dict[str, Any]:
    """A *request output* of the protocol from vLLM's ``RequestOutput``."""
    prompt_token_ids = output.prompt_token_ids
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": pack_u32(prompt_token_ids) if prompt_token_ids else b"",
        "prompt_logprobs": pack_logprobs(output.prompt_logprobs),
        "outputs": [_completion_output(completion) for completion in output.outputs],
        "finished": output.finished,
        "num_cached_tokens": output.num_cached_tokens,
        "metrics": _metrics(output.metrics),
    }


def add_parsed(output: dict[str, Any]) -> dict[str, Any]:
    """Adds to each completion of a *request output* what its text says as JSON: ``parsed``, and
    None where it is none, a text that ``max_tokens`` has cut off, say."""
    for completion in output["outputs"]:
        message = completion.get("message")
        text = message["content"] if message else completion["text"]
        try:
            completion["parsed"] = json.loads(text or "", parse_int=_integer)
        except (ValueError, RecursionError):
            completion["parsed"] = None
    return output


def _integer(digits: str) -> int | float:
    # MessagePack has no larger ones.
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


def _completion_output(output: Any) -> dict[str, Any]:
    return {
        "index": output.index,
        "text": output.text,
        "token_ids": pack_u32(output.token_ids),
        "cumulative_logprob": output.cumulative_logprob,
        "logprobs": pack_logprobs(output.logprobs),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _metrics(stats: Any) -> dict[str, float | int] | None:
    # A dataclass of numbers, a few of them flags; vLLM has it only while it keeps statistics.
    if stats is None:
        return None
    return {
        name: value
        for name, value in vars(stats).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
