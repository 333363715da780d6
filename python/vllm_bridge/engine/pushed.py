"""The outputs of a request as vLLM makes them, without a task that wakes for each.

``AsyncLLM.generate`` hands every output to the task of its request: an event is set, the task
wakes, takes the output and waits again, which costs more than a delta does. Here vLLM's handler
of outputs calls what takes them, and the task wakes once, for the end. That the handler does so
through the ``put`` of a collector is an internal of vLLM's; where it is not found, requests go
by ``generate``.
"""

import asyncio
from collections.abc import Callable
from typing import Any


def is_possible() -> bool:
    """Whether the installed vLLM hands its outputs over as is known here."""
    try:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.output_processor import RequestOutputCollector as Collector
    except ImportError:
        return False
    parts = (Collector, ("put", "get_nowait", "close")), (AsyncLLM, ("add_request", "abort"))
    return all(hasattr(of, name) for of, names in parts for name in names)


async def generate(
    llm: Any,
    prompt: Any,
    params: Any,
    request_id: str,
    take: Callable[[Any], bool],
    **arguments: Any,
) -> None:
    """As ``AsyncLLM.generate``, but for who gets the outputs; returns after the last of them.
    Cancelling it aborts the request.

    Args:
        take: called with each output; true ends the request before its time
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def put(output: Any) -> None:
        if over.done():
            return
        if isinstance(output, Exception):
            over.set_exception(output)
            return
        try:
            is_over = take(output)
        except Exception as fault:  # vLLM's handler would end by it, and the engine too
            over.set_exception(fault)
        else:
            if is_over or output.finished:
                over.set_result(output.finished)

    collector = await llm.add_request(request_id, prompt, params, **arguments)
    is_vllms = True
    try:
        collector.put = put
        if (first := collector.get_nowait()) is not None:
            put(first)
        is_vllms = not await over
    except EngineDeadError:
        is_vllms = False
        raise
    finally:
        if is_vllms:
            await llm.abort(collector.request_id, internal=True)
        collector.close()
