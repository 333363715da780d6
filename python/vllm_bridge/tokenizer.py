"""The engine's tokenizer: the tokens of a text, and the text of tokens."""

from typing import Any

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.protocol import pack_u32, unpack_u32


class TokenizeParams(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    add_special_tokens: bool = True


class DetokenizeParams(msgspec.Struct, forbid_unknown_fields=True):
    token_ids: bytes
    skip_special_tokens: bool = True


async def tokenize(llm: Any, params: TokenizeParams) -> dict[str, Any]:
    tokens = llm.get_tokenizer().encode(params.text, add_special_tokens=params.add_special_tokens)
    return {"token_ids": pack_u32(tokens)}


async def detokenize(llm: Any, params: DetokenizeParams) -> dict[str, Any]:
    tokenizer = llm.get_tokenizer()
    if len(params.token_ids) % 4:
        raise BridgeError("invalid_prompt", "`token_ids` is u32[].")
    token_ids = unpack_u32(params.token_ids)
    unknown = next((token for token in token_ids if token >= len(tokenizer)), None)
    if unknown is not None:
        raise BridgeError(
            "invalid_prompt",
            f"The tokenizer has {len(tokenizer)} tokens; there is no token {unknown}.",
            {"token_id": unknown},
        )
    text = tokenizer.decode(list(token_ids), skip_special_tokens=params.skip_special_tokens)
    return {"text": text}


# Each is given the ``AsyncLLM``.
METHODS = {
    "tokenize": (TokenizeParams, tokenize),
    "detokenize": (DetokenizeParams, detokenize),
}
