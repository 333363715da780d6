"""The other side of the pipes, for tests: speaks the protocol with python-msgpack, not with the
code under test."""

import asyncio
import os
from typing import Any

import msgpack

from vllm_bridge import PROTOCOL_VERSION

HELLO: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "max_frame": 64 * 1024 * 1024}


def pack(message: Any) -> bytes:
    payload: bytes = msgpack.packb(message)
    return len(payload).to_bytes(4, "big") + payload


class Peer:
    """Elixir's place: writes to ``write_fd`` and reads from ``read_fd``."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._reader = asyncio.StreamReader(limit=2**30)
        self._transport: asyncio.ReadTransport | None = None
        self._id = 0
        self.notifications: list[list[Any]] = []

    async def start_reading(self) -> None:
        loop = asyncio.get_running_loop()
        # The transport closes what it reads from; the descriptor itself stays its owner's.
        file = os.fdopen(os.dup(self.read_fd), "rb", buffering=0)
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), file
        )

    def pause_reading(self) -> None:
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def close(self) -> None:
        self.close_input()
        if self._transport is not None:
            self._transport.close()

    def close_input(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def write(self, data: bytes) -> None:
        os.write(self.write_fd, data)

    def send(self, *message: Any) -> None:
        self.write(pack(list(message)))

    def request(self, method: str, params: Any = None) -> int:
        self._id += 1
        self.send(0, self._id, method, {} if params is None else params)
        return self._id

    def cancel(self, id: int) -> None:
        self.send(2, "cancel", {"id": id})

    async def receive(self) -> list[Any]:
        header = await self._reader.readexactly(4)
        payload = await self._reader.readexactly(int.from_bytes(header, "big"))
        message: list[Any] = msgpack.unpackb(payload)
        return message

    async def response(self) -> tuple[int, dict[str, Any] | None, Any]:
        """The next response; notifications before it are kept in ``notifications``."""
        while True:
            kind, *rest = await self.receive()
            if kind == 1:
                id, error, result = rest
                return id, error, result
            self.notifications.append(rest)

    async def call(self, method: str, params: Any = None) -> Any:
        """The result of one request, or its error map."""
        id = self.request(method, params)
        answered, error, result = await self.response()
        assert answered == id
        return result if error is None else error

    async def silent(self) -> bool:
        """Whether everything that was written until now has been received."""
        try:
            await asyncio.wait_for(self.receive(), 0.05)
        except TimeoutError:
            return True
        return False
