"""Prompts given as embeddings: what goes into the model's first layer, in place of tokens."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError


def embeds_prompt(prompt: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The prompt as vLLM takes it.

    Args:
        prompt: as it came: ``prompt_embeds`` (f32[]) and ``shape`` (tokens, hidden size)
        config: vLLM's ``ModelConfig``

    Raises:
        BridgeError: ``unsupported`` for an engine without such prompts, ``invalid_prompt``
    """
    import torch

    if not config.enable_prompt_embeds:
        raise BridgeError(
            "unsupported",
            "For prompts of embeddings, an engine must be started with "
            "`enable_prompt_embeds: true`.",
            {"option": "enable_prompt_embeds"},
        )
    match prompt:
        case {"prompt_embeds": bytes(data), "shape": [int(tokens), int(hidden)]} if (
            len(prompt) == 2 and tokens > 0
        ):
            pass
        case _:
            raise BridgeError(
                "invalid_prompt",
                "A prompt of embeddings is a map with `prompt_embeds` (f32[]) and `shape` (the "
                "number of tokens, which is at least 1, and the hidden size).",
            )
    size = config.get_inputs_embeds_size()
    if hidden != size:
        raise BridgeError(
            "invalid_prompt",
            f"The embeddings have {hidden} numbers for each token; the model takes {size}.",
            {"hidden_size": size},
        )
    if len(data) != 4 * tokens * hidden:
        raise BridgeError(
            "invalid_prompt",
            f"`prompt_embeds` has {len(data)} bytes; {tokens} times {hidden} numbers of 4 bytes "
            f"have {4 * tokens * hidden}.",
        )
    # A copy: PyTorch wants memory that it may write to.
    flat = torch.frombuffer(bytearray(data), dtype=torch.float32)
    embeds = flat.reshape(tokens, hidden).to(config.dtype)
    # Once in the KV cache, such numbers spoil what others compute with the same blocks.
    if not bool(embeds.isfinite().all()):
        raise BridgeError(
            "invalid_prompt", f"`prompt_embeds` has numbers that are not finite in {config.dtype}."
        )
    return {"prompt_embeds": embeds}
