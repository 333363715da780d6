"""Hostile bytes: every outcome is a message or a protocol error, in bounded memory.

``bench/fuzz.exs`` runs the same for a million frames."""

import asyncio
import contextlib
import random
import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
from vllm_bridge.rpc.protocol import FrameParser, Message, ProtocolError, Request, decode, encode

TO_WORKER = fuzz.corpus(">")
seeds = st.integers(0, 2**64).map(random.Random)


def test_recorded_frames_are_messages() -> None:
    assert len(TO_WORKER) > 20
    for payload in TO_WORKER:
        assert msgpack.unpackb(encode(decode(payload))) == msgpack.unpackb(payload)


def test_every_strict_prefix_of_a_message_is_a_protocol_error() -> None:
    for payload in TO_WORKER:
        for length in range(len(payload)):
            with pytest.raises(ProtocolError):
                decode(payload[:length])


def is_message(value: Any) -> bool:
    """Whether the protocol has a message of this shape, said without the code under test."""

    def is_id(id: Any) -> bool:
        return type(id) is int and 0 <= id < 2**63

    def is_map(params: Any) -> bool:
        return isinstance(params, dict) and all(isinstance(key, str) for key in params)

    match value:
        case [kind, *_] if type(kind) is not int:
            return False
        case [0, id, str(), params] | [1, id, params, _] if is_id(id) and is_map(params):
            return True
        case [1, id, None, _]:
            return is_id(id)
        case [2, str(), params]:
            return is_map(params)
    return False


def is_plain(value: Any) -> bool:
    """Whether both decoders can hold the value: no extension, no key that only one can hash, and
    not as deep as only one goes."""
    level = [value]
    for _ in range(100):
        below: list[Any] = []
        for item in level:
            match item:
                case dict():
                    below += [*item.keys(), *item.values()]
                    if not all(isinstance(key, str) for key in item):
                        return False
                case list():
                    below += item
                case None | bool() | int() | float() | str() | bytes():
                    pass
                case _:
                    return False
        if not below:
            return True
        level = below
    return False


@settings(max_examples=1500, deadline=None)
@given(seeds)
def test_the_reference_decoder_is_of_the_same_opinion(rng: random.Random) -> None:
    payload = fuzz.payload(rng, TO_WORKER)
    theirs: Any = None
    ours: Message | None = None
    with contextlib.suppress(Exception):
        theirs = msgpack.unpackb(payload, strict_map_key=False)
    with contextlib.suppress(ProtocolError):
        ours = decode(payload)
    if is_message(theirs) and is_plain(theirs):
        assert ours is not None
        # As texts, for NaN is not equal to itself, and 1 is to True.
        assert repr(msgpack.unpackb(encode(ours))) == repr(theirs)
    elif ours is not None:
        assert not is_plain(list(msgspec.structs.astuple(ours)))


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 5))
def test_a_parser_keeps_no_more_than_a_frame(rng: random.Random, count: int) -> None:
    parser, limit = FrameParser(500), 500 + 4
    stream = b"".join(
        b"".join(fuzz.frame_in_pieces(rng, fuzz.payload(rng, TO_WORKER))) for _ in range(count)
    )
    try:
        while stream:
            size = rng.choice([1, 2, 5, 100, 10_000])
            for payload in parser.feed(stream[:size]):
                assert len(payload) <= 500
            assert len(parser._rest) <= limit
            stream = stream[size:]
    except ProtocolError as error:
        # The only thing that a parser refuses.
        if "longer than max_frame" not in str(error):
            raise


@pytest.mark.parametrize(
    "announced",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\x7f" + b"\xff" * 3,
        b"\xc9\xff\xff\xff\xff\x05",
        b"\xdd\x00\xff\xff\xff" * 200,
        b"\xdf\x00\xff\xff\xff\xa1k" * 200,
    ],
)
def test_what_a_payload_announces_takes_no_memory(announced: bytes) -> None:
    payload = b"\x93\x02\xa1m\x81\xa1k" + announced + b"\x00" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_a_server_answers_every_request_once_whatever_comes(seed: int) -> None:
    counts = asyncio.run(fuzz.run(100, seed))
    assert counts["accepted"] + counts["rejected"] > 50


def test_requests_that_are_in_flight_together_get_one_answer_each() -> None:
    """As above, with all at once: their answers come in any order."""

    async def scenario() -> None:
        rng = random.Random(7)  # noqa: S311
        target = fuzz.Target()
        await target.start()
        frames = []
        for id in range(1, 500):
            payload = fuzz.reshaped(rng, rng.choice(TO_WORKER), TO_WORKER)
            try:
                message = decode(payload)
            except ProtocolError:
                continue
            if isinstance(message, Request):
                payload = encode(Request(id, message.method, message.params))
                frames.append(len(payload).to_bytes(4) + payload)
        assert len(frames) > 50
        await target.feed(frames)
        target.close()

    asyncio.run(scenario())
