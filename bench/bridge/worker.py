"""A worker whose engine computes nothing: what remains is the bridge. Server, methods, params,
streams, frames and credit are the real ones.

``tokenize`` is answered with 1 KiB, ``pool`` with a tensor of the shape that the prompt says, and
``generate`` at once, or never where the prompt is ``wait``. A stream gets its deltas as fast as its
reader takes them, or one each ``EX_VLLM_BENCH_STEP`` seconds.
"""

import asyncio
import functools
import math
import os
from types import SimpleNamespace
from typing import Any

from vllm_bridge import __main__ as worker
from vllm_bridge import engine_methods
from vllm_bridge.stream import DeltaStream

STEP_SECONDS = float(os.environ.get("EX_VLLM_BENCH_STEP", "0"))
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


def step(finish: str | None) -> Any:
    completion = SimpleNamespace(
        index=0,
        text=" token",
        token_ids=[1234],
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=finish,
        stop_reason=None,
    )
    return SimpleNamespace(outputs=[completion], finished=finish is not None)


ONE, LAST = step(None), step("length")
WHOLE = ANSWER | {"outputs": []}


class Stream(DeltaStream):
    """One that tells of its credit. Without any nothing is put, so that no two deltas are merged,
    and each that is counted is one."""

    granted = asyncio.Event()

    @property
    def has_credit(self) -> bool:
        return self._credit > 0

    def grant(self, count: int) -> None:
        super().grant(count)
        self.granted.set()


@functools.cache
def pooled(shape: tuple[int, ...]) -> dict[str, Any]:
    """Which an engine has made before the bridge gets it."""
    return {"shape": shape, "data": bytes(4 * math.prod(shape))}


class Engine:
    """What ``engine_methods`` asks of an engine, for the methods above."""

    def __init__(self) -> None:
        # Of each stream: it, what is left of its deltas, and its end.
        self._under_way: list[list[Any]] = []
        self._steps: asyncio.Task[None] | None = None

    def on_death(self, died: Any) -> None: ...

    def info(self) -> dict[str, Any]:
        return INFO

    def prepare_http(self, settings: Any) -> None: ...

    def progress(self) -> dict[str, int]:
        return {"steps": 0, "beats": 0, "unfinished": 0}

    async def waits(self, request_id: str) -> bool:
        return False

    async def asked(self, serve: Any, params: Any) -> dict[str, Any]:
        return TOKENS

    async def pool(self, request_id: str, params: Any) -> dict[str, Any]:
        tensor = pooled(tuple(int(side) for side in params.prompt.split("x")))
        return {"request_id": "0", "prompt_token_ids": b"", "num_cached_tokens": 0} | tensor

    async def generate(self, request_id: str, params: Any, put: Any) -> dict[str, Any]:
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if params.prompt == "wait":
            await end
        if put is None:
            return ANSWER
        self._under_way.append([put.__self__, params.sampling_params["max_tokens"], end])
        if self._steps is None:
            self._steps = asyncio.create_task(self._run())
        await end
        return WHOLE

    async def _run(self) -> None:
        while self._under_way:
            Stream.granted.clear()
            idle, ended = True, []
            for one in self._under_way:
                stream, left, _ = one
                if stream.has_credit:
                    idle = False
                    one[1] = left - 1
                    if left > 1:
                        stream.put(ONE)
                    else:
                        stream.put(LAST)
                        ended.append(one)
            for one in ended:
                self._under_way.remove(one)
                one[2].set_result(None)
            await (Stream.granted.wait() if idle else asyncio.sleep(STEP_SECONDS))
        self._steps = None


async def load(*_given: Any) -> Any:
    return Engine()


engine_methods.DeltaStream = Stream
worker.KINDS["engine"] = lambda: engine_methods.table(engine_methods.Slot(load))
worker.work()
