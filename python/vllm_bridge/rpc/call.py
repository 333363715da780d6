"""A request that is being served: what its method may ask of the server."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

from vllm_bridge.errors import BridgeError

# One delta of a stream: the id of its request, and what came.
Row = list[Any]


class Limits(Protocol):
    """The times of a request, in seconds."""

    timeout: float | None
    queue_timeout: float | None


class Channel(Protocol):
    """The server, as far as a call uses it."""

    def notify(self, method: str, params: dict[str, Any]) -> None: ...

    def emit(self, row: Row) -> None: ...

    def pack(self, id: int, text: str, token_ids: Sequence[int]) -> None: ...

    def engine_died(self) -> None: ...


class Call:
    """One request.

    Attributes:
        id: the request's id
        name: what the request is called where a name is needed, in vLLM
        notify: tells Elixir something at once, before anything that may block the loop
        emit: has a delta leave with those that come in the same turn of the loop
        pack: the same of one that is no more than a text and its tokens, of the first completion
        engine_died: ends the worker, because the engine that it was for is dead
        on_credit: told how many more deltas may come; set by methods that stream
    """

    def __init__(self, id: int, channel: Channel) -> None:
        self.id = id
        self.name = str(id)
        self.notify = channel.notify
        self.emit = channel.emit
        self.pack = channel.pack
        self.engine_died = channel.engine_died
        self.on_credit: Callable[[int], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.ended_by: BridgeError | None = None

    def end(self, error: BridgeError) -> None:
        """Has the request answered with ``error``; the first one counts."""
        if self.ended_by is None:
            self.ended_by = error
            # A task that is cancelled before its first step never takes it, and the request
            # would get no answer.
            if self.started and self.task is not None:
                self.task.cancel()

    @contextlib.contextmanager
    def limited(self, limits: Limits, waits: Callable[[], Awaitable[bool]]) -> Iterator[None]:
        """Ends the request when its time is over.

        Args:
            waits: whether nothing has been done for the request yet, asked when its
                ``queue_timeout`` is over
        """
        loop = asyncio.get_running_loop()
        timers = []
        looks: list[asyncio.Task[None]] = []
        if limits.timeout is not None:
            error = BridgeError(
                "timeout",
                f"The request was not done after {limits.timeout} seconds.",
                {"option": "timeout", "timeout": limits.timeout},
            )
            timers.append(loop.call_later(limits.timeout, self.end, error))
        if limits.queue_timeout is not None:
            timers.append(
                loop.call_later(
                    limits.queue_timeout,
                    lambda: looks.append(loop.create_task(self._end_if(waits))),
                )
            )
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            for look in looks:
                look.cancel()

    async def _end_if(self, waits: Callable[[], Awaitable[bool]]) -> None:
        # Should vLLM be dead, the request itself gets to know.
        with contextlib.suppress(Exception):
            if await waits():
                self.end(
                    BridgeError(
                        "queue_timeout",
                        "vLLM had not begun with the request when its `queue_timeout` was "
                        "over. Try again later, give it more, or start the engine with more "
                        "`replicas:` or `max_num_seqs:`.",
                        {"option": "queue_timeout"},
                    )
                )
