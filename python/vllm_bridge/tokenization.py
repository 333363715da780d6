"""What a request may say of how its prompt becomes tokens, in vLLM's names."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from vllm_bridge.params import Field, checked

# Fields of TokenizeParams that are a request's to say; the others follow from the model.
_GENERATING = ("truncate_prompt_tokens", "truncation_side", "add_special_tokens")
_POOLING = (*_GENERATING, "pad_prompt_tokens", "do_lower_case")


def for_pooling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a request that pools, as vLLM wants them.

    Raises:
        BridgeError: ``invalid_option``
    """
    return checked("tokenization argument", given, _fields(_POOLING))


def for_generating(given: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """The arguments of a request that generates, as vLLM wants them.

    Raises:
        BridgeError: ``invalid_option``
    """
    values = checked("tokenization argument", given, _fields(_GENERATING))
    kept = values.get("truncate_prompt_tokens")
    if kept is not None and kept < 0:
        # All that the model takes; by itself, vLLM leaves no room for an answer.
        values["truncate_prompt_tokens"] = max_model_len - 1
    return values


@functools.cache
def _fields(names: tuple[str, ...]) -> dict[str, Field]:
    from vllm.renderers import TokenizeParams

    hints = typing.get_type_hints(TokenizeParams)
    return {
        field.name: Field(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(TokenizeParams)
        if field.name in names
    }
