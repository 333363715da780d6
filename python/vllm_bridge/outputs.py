"""vLLM's outputs as the maps that travel; names are vLLM's own."""

import json
from collections.abc import Callable
from typing import Any

from vllm_bridge import finish
from vllm_bridge.rpc.protocol import pack_logprobs, pack_u32


class Growing:
    """The whole output of a request, of its only output or of all its deltas.

    Args:
        on_output: called with each that is not an early end

    Attributes:
        output: vLLM's ``RequestOutput``, whole once the last one was taken
        early: how the request ended before it was whole
    """

    def __init__(self, on_output: Callable[[Any], None] | None) -> None:
        self.output: Any = None
        self.early: finish.Meaning | None = None
        self._on_output = on_output
        # Of each completion: the texts and token ids that are not in the output yet.
        self._pieces: dict[int, tuple[list[str], list[int]]] = {}

    def take(self, output: Any) -> bool:
        """Adds one; true if it ends the request early. Several completions of one request end each
        for itself: the early end of one ends the others."""
        completions = output.outputs
        completion = completions[0]
        # Most deltas are no more than a text and its tokens.
        if (
            len(completions) == 1
            and completion.finish_reason is None
            and completion.logprobs is None
            and (pieces := self._pieces.get(completion.index)) is not None
        ):
            pieces[0].append(completion.text)
            pieces[1].extend(completion.token_ids)
            if self._on_output is not None:
                self._on_output(output)
            return False
        self.early = finish.early(output)
        if self.early is None and self._on_output is not None:
            self._on_output(output)
        self._join(output)
        return self.early is not None

    def _join(self, delta: Any) -> None:
        whole = self.output
        if whole is None:
            whole = self.output = delta
        else:
            self._put_together()
            whole.add(delta, aggregate=True)
            whole.num_cached_tokens = delta.num_cached_tokens
            whole.metrics = delta.metrics
            if delta.finished:
                whole.outputs.sort(key=lambda completion: completion.index)
        for completion in delta.outputs:
            self._pieces.setdefault(completion.index, ([], []))

    def _put_together(self) -> None:
        for completion in self.output.outputs:
            texts, token_ids = self._pieces[completion.index]
            if texts:
                completion.text += "".join(texts)
                completion.token_ids = [*completion.token_ids, *token_ids]
                self._pieces[completion.index] = ([], [])


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
