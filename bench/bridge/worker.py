"""A worker whose engine computes nothing: what remains is the bridge. Server, methods, params and
frames are the real ones.

``tokenize`` is answered with 1 KiB, ``pool`` with a tensor of the shape that the prompt says, and
``generate`` at once, or never where the prompt is ``wait``.
"""

import asyncio
from typing import Any

from vllm_bridge import __main__ as worker
from vllm_bridge import engine_methods

INFO = {"model": "nothing", "max_num_seqs": 20_000, "max_model_len": 2**20, "device": "none"}
TOKENS = {"token_ids": bytes(1024)}
ANSWER: dict[str, Any] = {
    "request_id": "0",
    "prompt": None,
    "prompt_token_ids": bytes(40),
    "prompt_logprobs": None,
    "outputs": [
        {
            "index": 0,
            "text": "An answer of some words.",
            "token_ids": bytes(64),
            "cumulative_logprob": None,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ],
    "finished": True,
    "num_cached_tokens": 0,
    "metrics": None,
}


class Engine:
    """What ``engine_methods`` asks of an engine, for the methods above."""

    def on_death(self, died: Any) -> None: ...

    def info(self) -> dict[str, Any]:
        return INFO

    def progress(self) -> dict[str, int]:
        return {"steps": 0, "beats": 0, "unfinished": 0}

    async def waits(self, request_id: str) -> bool:
        return False

    async def asked(self, serve: Any, params: Any) -> dict[str, Any]:
        return TOKENS

    async def pool(self, request_id: str, params: Any) -> dict[str, Any]:
        shape = [int(side) for side in params.prompt.split("x")]
        size = 4
        for side in shape:
            size *= side
        tensor = {"shape": shape, "data": bytes(size)}
        return {"request_id": "0", "prompt_token_ids": b"", "num_cached_tokens": 0} | tensor

    async def generate(self, request_id: str, params: Any, put: Any) -> dict[str, Any]:
        if params.prompt == "wait":
            await asyncio.get_running_loop().create_future()
        return ANSWER


async def load(*_given: Any) -> Any:
    return Engine()


worker.KINDS["engine"] = lambda: engine_methods.table(engine_methods.Slot(load))
worker.work()
