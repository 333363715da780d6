"""What an engine is asked when it is measured: prompts from a file, as training data has them."""

import asyncio
from typing import Any

import msgspec

from vllm_bridge.rpc.call import Call


class PromptsParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``prompts``; see guides/protocol.md.

    Args:
        limit: how many are returned at most, the first ones
    """

    path: str
    limit: int


async def prompts(_call: Call, params: PromptsParams) -> list[dict[str, Any]]:
    """The prompts and conversations of a file or a folder."""
    return await asyncio.to_thread(_read, params.path, params.limit)


def _read(path: str, limit: int) -> list[dict[str, Any]]:
    from vllm_bridge.jobs.finetune import data

    records = data.read(path, option="prompts", needs_answer=False)
    return [
        {"prompt": asked}
        if isinstance(asked := record.asked, str)
        else {"messages": asked, "tools": record.fields.get("tools")}
        for record in (records.train + records.held_out)[:limit]
    ]


METHODS: dict[str, Any] = {"prompts": (PromptsParams, prompts)}
