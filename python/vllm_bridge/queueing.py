"""What of the requests under way vLLM's scheduler has begun with.

Only the scheduler knows: a long prompt is computed in chunks, and nothing comes of it before
the last one. It lives in vLLM's engine process, where a patch adds ``scheduled`` to what that
process can be asked. The question queues up behind the requests that were sent before, and is
answered between two steps.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from vllm_bridge import finish

# Takes the name that vLLM is given for a request, or for a part of one.
Submit = Callable[[str], None]

# The name that vLLM's engine process knows ``scheduled`` by.
METHOD = "ex_vllm_scheduled"


def scheduled(core: Any, request_ids: list[str]) -> dict[str, bool]:
    """Of those of the requests that the scheduler holds, whether it has ever scheduled them.

    Args:
        core: vLLM's ``EngineCore``, as whose method this runs
    """
    from vllm.v1.request import RequestStatus

    never = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)
    requests = core.scheduler.requests
    return {id: requests[id].status not in never for id in request_ids if id in requests}


class Queue:
    """Tells which requests wait.

    Args:
        llm: the ``AsyncLLM``
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        # Of each request, by what names vLLM was given it, or its parts.
        self._submitted: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def request(self, request_id: str) -> Iterator[Submit]:
        """While a request is served; gives what is to be called just before vLLM gets it, or a
        part of it, with the name that this has there."""
        names = self._submitted[request_id] = []
        try:
            yield names.append
        finally:
            del self._submitted[request_id]

    async def waits(self, request_id: str) -> bool:
        """Whether nothing of a request has been scheduled yet."""
        inside = self._llm.output_processor.external_req_ids
        ids: list[str] = []
        for name in self._submitted.get(request_id, ()):
            if name not in inside:
                return False  # computed already
            ids += inside[name]
        if not ids:
            return True  # on its way to vLLM
        held: dict[str, bool] = {}
        for answer in await self._llm.engine_core.call_utility_all_async(METHOD, ids):
            held |= answer
        # Those that it does not hold have been computed meanwhile.
        return set(held) == set(ids) and not any(held.values())


class Watched:
    """An ``AsyncLLM`` that tells what it is given, and whether any of it ended early.

    An engine that stops ends what it has, and says nothing of what comes after. That ends here as
    the rest did, so that a search which is between two of its steps keeps what it has.

    Args:
        stopped: set once something ended because the engine stopped
    """

    def __init__(self, llm: Any, submit: Submit, stopped: asyncio.Event) -> None:
        self.ended_early: finish.Meaning | None = None
        self._llm = llm
        self._submit = submit
        self._stopped = stopped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As ``AsyncLLM.generate``, for requests that have one output."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._submit(request_id)
        stream = self._llm.generate(prompt, params, request_id, **kwargs)
        output = asyncio.ensure_future(anext(stream))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((output, stopped), return_when=asyncio.FIRST_COMPLETED)
            result = output.result() if output.done() else _cut_off(request_id)
        except EngineDeadError:
            result = _cut_off(request_id)
        finally:
            for task in (output, stopped):
                task.cancel()
            await asyncio.wait((output, stopped))
            await stream.aclose()
        self.ended_early = self.ended_early or finish.early(result)
        yield result


def _cut_off(request_id: str) -> Any:
    """What an engine that stops says of a request that it has nothing of."""
    from vllm.outputs import CompletionOutput, RequestOutput

    nothing = CompletionOutput(0, "", [], None, None, finish_reason="abort")
    return RequestOutput(request_id, None, None, None, [nothing], finished=True)
