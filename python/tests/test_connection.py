import asyncio
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from vllm_bridge.rpc.connection import HIGH_WATER, PIPE_SIZE, Connection
from vllm_bridge.rpc.protocol import ProtocolError, frame

Pipes = tuple[int, int, int, int]

PATIENCE = 20.0


class Ends:
    """A connection, what came in on it, and the peer's ends of its pipes."""

    def __init__(self, pipes: Pipes, max_frame: int = 1024) -> None:
        self.output, write_fd, read_fd, self.input = pipes
        self.received: list[bytes] = []
        self.closed: list[BaseException | None] = []
        self.connection = Connection(
            read_fd,
            write_fd,
            max_frame=max_frame,
            on_frame=lambda payload: self.received.append(bytes(payload)),
            on_close=self.closed.append,
        )

    def write(self, *payloads: bytes) -> None:
        os.write(self.input, b"".join(b"".join(frame(payload)) for payload in payloads))

    async def until(self, condition: Callable[[], Any]) -> None:
        async def turn() -> None:
            while not condition():
                await asyncio.sleep(0)

        await asyncio.wait_for(turn(), PATIENCE)


def read_all(fd: int) -> bytes:
    """What is in a pipe now."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while piece := os.read(fd, PIPE_SIZE):
            data += piece
    except BlockingIOError:
        pass
    return data


def test_frames_come_in(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        ends.write(b"one", b"two")
        await ends.until(lambda: ends.received == [b"one", b"two"])
        ends.write(b"three")
        await ends.until(lambda: ends.received[2:] == [b"three"])
        ends.connection.close()

    asyncio.run(scenario())


def test_a_read_takes_memory_for_what_came_and_not_for_what_might_have(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        kept: list[bytes | memoryview] = []
        ends.connection._on_frame = kept.append
        tracemalloc.start()
        try:
            ends.write(b"first")
            await ends.until(lambda: len(kept) == 1)
            assert tracemalloc.get_traced_memory()[1] < PIPE_SIZE // 2
        finally:
            tracemalloc.stop()
        # What was read before stays what it is.
        ends.write(b"other")
        await ends.until(lambda: len(kept) == 2)
        assert [bytes(payload) for payload in kept] == [b"first", b"other"]
        ends.connection.close()

    asyncio.run(scenario())


def test_frames_of_one_turn_leave_in_one_call(
    pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    writev = os.writev

    def spy(fd: int, pieces: list[Any]) -> int:
        calls.append(len(pieces))
        return writev(fd, pieces)

    monkeypatch.setattr(os, "writev", spy)

    async def scenario() -> None:
        ends = Ends(pipes)
        for payload in (b"a", b"bb", b"ccc"):
            ends.connection.send(payload)
        assert calls == []
        await asyncio.sleep(0)
        assert calls == [6]
        expected = b"".join(b"".join(frame(payload)) for payload in (b"a", b"bb", b"ccc"))
        assert read_all(ends.output) == expected
        ends.connection.close()

    asyncio.run(scenario())


def test_more_frames_than_one_call_takes(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        for number in range(3000):
            ends.connection.send(number.to_bytes(2, "big"))
        await asyncio.sleep(0)
        data = read_all(ends.output)
        numbers = [int.from_bytes(data[at + 4 : at + 6], "big") for at in range(0, len(data), 6)]
        assert numbers == list(range(3000))
        ends.connection.close()

    asyncio.run(scenario())


def test_flush_writes_at_once(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        ends.connection.send(b"now")
        ends.connection.flush()
        assert read_all(ends.output) == b"\x00\x00\x00\x03now"
        ends.connection.close()

    asyncio.run(scenario())


def test_a_slow_reader_gets_everything_in_order(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        payloads = [bytes([number]) * 1_000_000 for number in range(5)]
        for payload in payloads:
            ends.connection.send(payload[:7], memoryview(payload)[7:])
        expected = b"".join(b"".join(frame(payload)) for payload in payloads)
        data = b""

        def read() -> bool:
            nonlocal data
            data += read_all(ends.output)
            return len(data) >= len(expected)

        await ends.until(read)
        assert data == expected
        ends.connection.close()

    asyncio.run(scenario())


def test_a_peer_that_does_not_read_holds_up_new_work_but_not_what_it_says(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        for _ in range(HIGH_WATER // 2**20 + 3):
            ends.connection.send(bytes(1), bytes(2**20 - 1))
        await asyncio.sleep(0)
        assert ends.connection.congested
        waiting = asyncio.ensure_future(ends.connection.writable())

        ends.write(b"cancel")
        await ends.until(lambda: ends.received == [b"cancel"])
        assert not waiting.done()

        # One more max_frame of input is heard, then reading stops as well.
        ends.write(bytes(1020))
        await ends.until(lambda: len(ends.received) == 2)
        ends.write(b"later")
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(ends.received) == 2

        await ends.until(lambda: read_all(ends.output) == b"" and waiting.done())
        assert not ends.connection.congested
        await ends.until(lambda: ends.received[2:] == [b"later"])
        ends.connection.close()

    asyncio.run(scenario())


def test_the_end_of_input_closes(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        ends.write(b"last")
        os.close(ends.input)
        await ends.until(lambda: ends.closed == [None])
        assert ends.received == [b"last"]
        ends.connection.send(b"nobody is there")

    asyncio.run(scenario())


def test_a_broken_output_closes(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        os.close(ends.output)
        ends.connection.send(b"lost")
        await ends.until(lambda: ends.closed)
        assert isinstance(ends.closed[0], BrokenPipeError)
        assert len(ends.closed) == 1

    asyncio.run(scenario())


def test_an_oversized_frame_closes(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes, max_frame=8)
        ends.write(b"fits", b"does not fit")
        await ends.until(lambda: ends.closed)
        assert ends.received == [b"fits"]
        assert isinstance(ends.closed[0], ProtocolError)

    asyncio.run(scenario())


def test_nothing_comes_after_close(pipes: Pipes) -> None:
    async def scenario() -> None:
        ends = Ends(pipes)
        ends.connection.close()
        ends.write(b"late")
        for _ in range(10):
            await asyncio.sleep(0)
        assert ends.received == []
        assert ends.closed == []

    asyncio.run(scenario())
