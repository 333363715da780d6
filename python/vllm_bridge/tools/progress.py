"""How far a transfer is, told to whoever asked for it."""

import asyncio
from typing import TYPE_CHECKING, Protocol

from vllm_bridge.rpc.call import Call

if TYPE_CHECKING:
    from vllm_bridge.hub.download import Progress


class Told(Protocol):
    """Told how far a transfer is, and how much was done beside it."""

    def __call__(self, progress: "Progress", beside: int = 0, /) -> None: ...


def telling(call: Call) -> Told:
    """What sends a ``progress`` notification when a transfer has come further; to be called from a
    thread."""
    loop = asyncio.get_running_loop()
    last: tuple[int, int, int] | None = None

    def told(progress: "Progress", beside: int = 0, /) -> None:
        nonlocal last
        if (now := (progress.bytes, progress.files, beside)) != last:
            last = now
            figures = {"id": call.id, **progress.to_wire()}
            loop.call_soon_threadsafe(call.notify, "progress", figures)

    return told
