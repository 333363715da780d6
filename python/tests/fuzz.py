"""Hostile frames for the worker: those of a real session, changed at random, through the parser,
the decoder and the server.

    fuzz.py INPUTS SEED

(``bench/fuzz.exs`` runs it.) Exits with 1 at the first frame that is neither served nor refused as
the protocol says, or for which memory is asked that its size does not warrant.
"""

import asyncio
import logging
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import msgpack

from vllm_bridge import PROTOCOL_VERSION
from vllm_bridge.engine.engine import Engine
from vllm_bridge.engine_methods import Slot, table
from vllm_bridge.rpc.protocol import HEADER, FrameParser, ProtocolError, Request, decode
from vllm_bridge.rpc.server import Server

FRAMES = Path(__file__).resolve().parents[2] / "test" / "support" / "frames.txt"

# Bytes that begin something, or announce a length.
HEADS = bytes.fromhex(
    "80 8f 90 9f a1 bf c0 c1 c4 c6 c7 c9 ca cb cf d3 d4 d6 d7 d8 d9 db dc dd de df ff"
)
LENGTHS = [0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WIDE = bytes.fromhex("c6 c9 db dd df")
NESTING = [b"\x91", b"\x81", b"\x81\xa1k", b"\xdc\x00\x01"]

VALUES: list[Any] = [
    *([], {}, [None], [[]], [{}], {"": None}, {1: 2}, [1, "a", None], None, True, 0, -1, 2**63),
    *(2**64 - 1, 0.5, float("nan"), float("inf"), "", "x", b"", b"\xff", msgpack.ExtType(5, b"x")),
    *(msgpack.Timestamp(0), "hello", "generate", "shutdown", "cancel", "credit"),
]

MAX_FRAME = 64 * 1024


def corpus(direction: str) -> list[bytes]:
    """The payloads that workers got (``>``) or sent (``<``)."""
    lines = (line.split() for line in FRAMES.read_text("ascii").splitlines())
    return [bytes.fromhex(payload) for mark, payload in lines if mark == direction]


def payload(rng: random.Random, frames: list[bytes]) -> bytes:
    """A hostile one."""
    match rng.randrange(20):
        case 0:
            return rng.randbytes(rng.randrange(64))
        case 1:
            return b"\x94\x00" + rng.randbytes(rng.randrange(64))
        case 2:
            return b"\x93\x02" + rng.randbytes(rng.randrange(64))
    data = rng.choice(frames)
    if rng.random() < 0.5:
        return reshaped(rng, data, frames)
    for _ in range(rng.randint(1, 4)):
        if data:
            data = changed(rng, data, frames)
    return data[:MAX_FRAME]


def reshaped(rng: random.Random, data: bytes, frames: list[bytes]) -> bytes:
    """The message with a value in the place of another: well-formed, and wrong."""
    other = msgpack.unpackb(rng.choice(frames))
    while isinstance(other, dict | list) and other and rng.random() < 0.7:
        other = rng.choice(list(other.values()) if isinstance(other, dict) else other)
    value = rng.choice([other, other, other, *VALUES])
    packed: bytes = msgpack.packb(replaced(rng, msgpack.unpackb(data), value))
    return packed


def replaced(rng: random.Random, old: Any, new: Any) -> Any:
    if not (isinstance(old, dict | list) and old) or rng.random() < 0.1:
        return new
    # Mostly what comes last, which in a message is all but its head.
    last = max(rng.randrange(len(old)) for _ in range(4))
    key = rng.choice(list(old)) if isinstance(old, dict) else last
    old[key] = replaced(rng, old[key], new)
    return old


def changed(rng: random.Random, data: bytes, frames: list[bytes]) -> bytes:
    at = rng.randrange(len(data))
    before, byte, rest = data[:at], data[at : at + 1], data[at + 1 :]
    match rng.randrange(10):
        case 0:
            return before + bytes([byte[0] ^ 1 << rng.randrange(8)]) + rest
        case 1:
            return before + rng.randbytes(1) + rest
        case 2:
            return before + bytes([rng.choice(HEADS)]) + rest
        # A part less, the end less, a part twice, a part of another frame.
        case 3:
            return before + rest[rng.randrange(8) :]
        case 4:
            return before
        case 5:
            return before + byte + rest[: rng.randrange(64)] + rest
        case 6:
            return before + rng.choice(frames)[rng.randrange(len(data)) :]
        # A length that nothing stands behind, and one that something does.
        case 7:
            return before + bytes([rng.choice(WIDE)]) + rng.choice(LENGTHS).to_bytes(4) + rest
        case 8:
            return before + bytes([rng.choice(HEADS), rng.randrange(16)]) + rest
        case _:
            deep = rng.choice(NESTING) * rng.choice([1, 30, 511, 512, 600, 2000])
            return before + deep + byte + rest


def frame_in_pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """The payload as a frame, now and then with another length, in pieces of any size."""
    length = len(data)
    if rng.random() < 0.02:
        length = rng.choice([0, length + 1, length // 2, MAX_FRAME + 1, 2**32 - 1])
    frame = length.to_bytes(4) + data
    size = rng.choice([1, 3, 100, 100, 5000, 5000]) if len(frame) < 500 else 5000
    return (frame[at : at + size] for at in range(0, len(frame), size))


class FakeEngine:
    """Serves everything at once."""

    async def start(self, *_asked: Any) -> Engine:
        return cast(Engine, self)

    def on_death(self, died: Callable[[], None]) -> None:
        pass

    def info(self) -> dict[str, Any]:
        return {}

    def progress(self) -> dict[str, int]:
        return {}

    def __getattr__(self, name: str) -> Any:
        async def serve(*_args: Any, **_kwargs: Any) -> Any:
            return {}

        return serve


class Target:
    """A server that is fed with frames, and what it says to them."""

    def __init__(self) -> None:
        self._output, write_fd = os.pipe()
        read_fd, self._input = os.pipe()
        self._fds = (self._output, write_fd, read_fd, self._input)
        os.set_blocking(self._output, False)
        engine = FakeEngine()
        slot = Slot(engine.start)
        slot.engine = cast(Engine, engine)
        self.server = Server(read_fd, write_fd, table(slot), lambda _status: None)
        self.counts = Counter[str]()

    async def start(self) -> None:
        hello = msgpack.packb([0, 0, "hello", {"protocol": PROTOCOL_VERSION}])
        await self.feed([len(hello).to_bytes(4) + hello])

    async def feed(self, pieces: Iterable[bytes]) -> None:
        """Sends frames in pieces; every request among them must be answered once."""
        requests: list[int] = []
        parser = FrameParser(MAX_FRAME)
        try:
            for piece in pieces:
                for data in parser.feed(piece):
                    self._on_frame(bytes(data), requests)
                kept = len(parser._rest)
                assert kept <= MAX_FRAME + HEADER, f"the parser keeps {kept} bytes"
        except ProtocolError:
            self.counts["rejected"] += 1
        answers: list[int] = []
        deadline = time.monotonic() + 60
        while len(answers) < len(requests):
            assert time.monotonic() < deadline, f"unanswered: {set(requests) - set(answers)}"
            await asyncio.sleep(0)
            answers += self._answers()
        assert sorted(answers) == sorted(requests)

    def _on_frame(self, data: bytes, requests: list[int]) -> None:
        try:
            message = decode(data)
            self.server._on_frame(data)
        except ProtocolError:
            self.counts["rejected"] += 1
        except BaseException:
            print(f"this frame was neither served nor refused: {data.hex()}", flush=True)
            raise
        else:
            self.counts["accepted"] += 1
            if isinstance(message, Request):
                requests.append(message.id)

    def _answers(self) -> list[int]:
        data = b""
        try:
            while piece := os.read(self._output, 2**20):
                data += piece
        except BlockingIOError:
            pass
        found = []
        while data:
            # A frame is written whole, or its rest follows at once: the pipe is large.
            length = int.from_bytes(data[:4])
            kind, id, error, _result = msgpack.unpackb(data[4 : 4 + length])
            assert kind == 1
            assert error is None or {"reason", "message", "details"} == error.keys()
            found.append(id)
            data = data[4 + length :]
        return found

    def close(self) -> None:
        self.server.close()
        for fd in self._fds:
            os.close(fd)


async def run(inputs: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)  # noqa: S311
    frames = corpus(">")
    target = Target()
    await target.start()
    target.counts.clear()
    for _ in range(inputs):
        await target.feed(frame_in_pieces(rng, payload(rng, frames)))
    target.close()
    return target.counts


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(inputs: int, seed: int) -> None:
    logging.disable()
    # A length that a frame announces must never be asked of the system.
    asyncio.run(run(1000, seed))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 256 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = peak_mib()
    started = time.monotonic()
    counts = asyncio.run(run(inputs, seed))
    print(f"Python: seed {seed}, {len(corpus('>'))} recorded frames")
    print(f"inputs {inputs}: accepted {counts['accepted']}, rejected {counts['rejected']}")
    print(f"time {time.monotonic() - started:.1f} s")
    print(f"peak memory of the process {peak_mib()} MiB ({before} MiB before)")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
