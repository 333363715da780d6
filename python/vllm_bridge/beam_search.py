"""Beam search by vLLM's own implementation for engines that serve many at once, which asks the
engine for one token of every beam at a time."""

import asyncio
import functools
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_bridge import finish
from vllm_bridge.errors import BridgeError, unknown_name
from vllm_bridge.lora import LoRA
from vllm_bridge.params import Field, invalid_value
from vllm_bridge.queueing import Submit, Watched

# Fields of BeamSearchParams that this search does not look at: only vLLM's offline one follows
# a structure, and no beam is ever marked.
_WITHOUT_EFFECT = {"structured_outputs", "watermarking"}


class SearchParams(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Any = None
    beam_search_params: dict[str, Any] = {}
    lora_request: LoRA | None = None
    timeout: float | None = None
    queue_timeout: float | None = None


class BeamSearch:
    """A beam search of an engine.

    Args:
        llm: the ``AsyncLLM``
        submit: told of each part of the search that vLLM is given
        stopped: set once something ended because the engine stopped
    """

    def __init__(self, llm: Any, submit: Submit, stopped: asyncio.Event) -> None:
        from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

        self._config = llm.model_config
        self._fields = beam_search_fields()
        self._mixin = BeamSearchOnlineMixin()
        self._watched = self._mixin.engine_client = Watched(llm, submit, stopped)
        self._mixin.renderer = llm.renderer

    async def search(
        self, request_id: str, prompt: Any, given: Mapping[str, Any], lora_request: Any
    ) -> tuple[Any, finish.Meaning | None]:
        """vLLM's ``RequestOutput``, with a completion for each beam, best first, and how the search
        ended if it did so early. Cancelling it aborts what is under way in vLLM.

        Args:
            prompt: rendered
            given: what came over the wire of vLLM's ``BeamSearchParams``

        Raises:
            BridgeError: ``invalid_option``, or ``unsupported`` for a prompt of embeddings
        """
        if prompt["type"] == "embeds":
            raise BridgeError("unsupported", "vLLM's beam search takes no prompts of embeddings.")
        tokens = prompt.get("decoder_prompt", prompt)["prompt_token_ids"]
        params = self._params(given, len(tokens))
        # There is one output, at the end.
        (output,) = [
            output
            async for output in self._mixin.beam_search(
                prompt, request_id, params, lora_request=lora_request
            )
        ]
        # Of a search that was cut off, the best beams may well be whole.
        return output, self._watched.ended_early

    def _params(self, given: Mapping[str, Any], prompt_tokens: int) -> Any:
        from vllm.sampling_params import BeamSearchParams

        values = {}
        for name, value in given.items():
            if name not in self._fields:
                raise unknown_name("beam search parameter", name, self._fields)
            values[name] = self._fields[name].check(value)
        for name, field in self._fields.items():
            if field.default is msgspec.NODEFAULT and name not in values:
                raise BridgeError("invalid_option", f"`{name}` must be given.", {"option": name})
        if values["max_tokens"] < 1:
            raise invalid_value("max_tokens", values["max_tokens"], ["It must be at least 1"])
        # vLLM refuses beams that have grown as long as the context; one token is asked for in any
        # case, so that a prompt without room for it is refused.
        room = max(self._config.max_model_len - prompt_tokens, 1)
        params = BeamSearchParams(**values | {"max_tokens": min(values["max_tokens"], room)})
        self._check_width(params.beam_width)
        return params

    def _check_width(self, beam_width: int) -> None:
        # Each step looks at twice as many tokens as there are beams.
        needed, limit = 2 * beam_width, self._config.max_logprobs
        if needed > limit != -1:
            raise BridgeError(
                "invalid_option",
                f"A `beam_width` of {beam_width} needs an engine with `max_logprobs: {needed}` "
                f"or more; this one has {limit}.",
                {"option": "beam_width", "max_logprobs": limit},
            )


@functools.cache
def beam_search_fields() -> dict[str, Field]:
    """The fields of the installed vLLM's ``BeamSearchParams`` that a request may have."""
    from vllm.sampling_params import BeamSearchParams

    hints = typing.get_type_hints(BeamSearchParams, include_extras=True)
    return {
        field.name: Field(field.name, hints[field.name], field.default)
        for field in msgspec.structs.fields(BeamSearchParams)
        if field.name not in _WITHOUT_EFFECT
    }
