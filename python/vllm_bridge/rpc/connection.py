"""The two pipes under asyncio: frames in, frames out, and what happens when one side is slow."""

import asyncio
import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable

from vllm_bridge.rpc.protocol import HEADER, FrameParser, frame

# What one read asks for, and the size that both pipes are given where the system allows it.
PIPE_SIZE = 1024 * 1024

# Above this many bytes of unsent output the connection is congested; below the half of it,
# it is not any more.
HIGH_WATER = 8 * 1024 * 1024

# writev takes at most IOV_MAX pieces.
MAX_PIECES = 1024


class Connection:
    """A reader on one file descriptor and a writer on another, neither of which ever blocks.

    All frames that are sent within one turn of the event loop leave in one system call.

    When the peer does not read, output piles up. From ``HIGH_WATER`` on the connection is
    *congested*: ``writable()`` waits, and the server starts no request before it returns.
    Reading goes on, so that ``cancel`` and ``shutdown`` are still heard, but only for one more
    ``max_frame`` of input; then reading stops too, the pipe fills, and the peer notices. Memory
    is therefore bounded by what is in flight, twice ``max_frame``, and the high water.

    Args:
        read_fd: where frames come from
        write_fd: where frames go
        max_frame: the longest payload that is accepted, in bytes
        on_frame: called with each payload
        on_close: called once, with None at the end of input or with the error that ended it
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        max_frame: int,
        on_frame: Callable[[bytes | memoryview], None],
        on_close: Callable[[BaseException | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._on_frame = on_frame
        self._on_close = on_close
        self._parser = FrameParser(max_frame)
        # One for all reads: of a new one the system maps, and unmaps, every time.
        self._input = memoryview(bytearray(PIPE_SIZE))
        self._pending: deque[bytes | memoryview] = deque()
        self._pending_bytes = 0
        self._flush_scheduled = False
        self._writer_added = False
        self._congested_input = 0
        self._reading = False
        self._closed = False
        self._writable: asyncio.Future[None] | None = None
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
            # Not a pipe, or above the user's limit: only slower.
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self._resume_reading()

    @property
    def max_frame(self) -> int:
        return self._parser.max_frame

    @max_frame.setter
    def max_frame(self, value: int) -> None:
        self._parser.max_frame = value

    @property
    def congested(self) -> bool:
        return self._writable is not None

    async def writable(self) -> None:
        """Returns at once unless the connection is congested, and else when it is not."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    def send(self, *payload: bytes | memoryview) -> None:
        """Queues one frame, whose payload may be in pieces, none of them empty; it leaves at the
        end of this turn of the loop."""
        if self._closed:
            return
        self._pending.extend(frame(*payload))
        self._pending_bytes += HEADER + sum(map(len, payload))
        if self._pending_bytes > HIGH_WATER and self._writable is None:
            self._writable = self._loop.create_future()
        if not (self._flush_scheduled or self._writer_added):
            self._flush_scheduled = True
            self._loop.call_soon(self._flush_turn)

    def flush(self) -> None:
        """Writes what the pipe takes now. For what must leave before the loop blocks."""
        pending = self._pending
        try:
            while pending:
                pieces = [pending[i] for i in range(min(len(pending), MAX_PIECES))]
                self._sent(os.writev(self._write_fd, pieces))
        except BlockingIOError:
            if not self._writer_added:
                self._loop.add_writer(self._write_fd, self.flush)
                self._writer_added = True
        except OSError as error:
            self._close(error)
        else:
            if self._writer_added:
                self._loop.remove_writer(self._write_fd)
                self._writer_added = False

    def close(self) -> None:
        """Stops reading and writing; the file descriptors stay the caller's."""
        if not self._closed:
            self._closed = True
            if self._reading:
                self._loop.remove_reader(self._read_fd)
            if self._writer_added:
                self._loop.remove_writer(self._write_fd)

    def _flush_turn(self) -> None:
        self._flush_scheduled = False
        if not (self._closed or self._writer_added):
            self.flush()

    def _sent(self, count: int) -> None:
        pending = self._pending
        while count:
            piece = pending[0]
            if len(piece) > count:
                pending[0] = memoryview(piece)[count:]
                self._pending_bytes -= count
                break
            count -= len(piece)
            pending.popleft()
            self._pending_bytes -= len(piece)
        if self._writable is not None and self._pending_bytes < HIGH_WATER // 2:
            self._writable.set_result(None)
            self._writable = None
            self._congested_input = 0
            self._resume_reading()

    def _resume_reading(self) -> None:
        if not (self._reading or self._closed):
            self._reading = True
            self._loop.add_reader(self._read_fd, self._readable)

    def _readable(self) -> None:
        try:
            data = bytes(self._input[: os.readv(self._read_fd, [self._input])])
        except BlockingIOError:
            return
        except OSError as error:
            self._close(error)
            return
        if not data:
            self._close(None)
            return
        if self.congested:
            self._congested_input += len(data)
            if self._congested_input > self.max_frame:
                self._loop.remove_reader(self._read_fd)
                self._reading = False
        try:
            for payload in self._parser.feed(data):
                self._on_frame(payload)
                if self._closed:
                    return
        except Exception as error:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        if not self._closed:
            self.close()
            self._on_close(error)
