import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bridge.rpc.protocol import (
    LONG,
    NO_LOGPROBS,
    FrameParser,
    Notification,
    ProtocolError,
    Request,
    Response,
    decode,
    encode,
    encode_result,
    frame,
    pack_f32,
    pack_logprobs,
    pack_u32,
    unpack_u32,
)

GUIDE = Path(__file__).resolve().parents[2] / "guides" / "protocol.md"


def examples() -> list[tuple[bytes, str]]:
    rows = re.findall(r"^\| `((?:[0-9a-f]{2} ?)+)` \| `(.+)` \|$", GUIDE.read_text("utf-8"), re.M)
    return [(bytes.fromhex(payload), says) for payload, says in rows]


def literal(text: str) -> Any:
    """A value as the guide writes it: JSON, with nil for null."""
    return json.loads(re.sub(r"\bnil\b", "null", text))


def test_the_guide_has_examples() -> None:
    assert len(examples()) >= 3


@pytest.mark.parametrize(("payload", "says"), examples())
def test_examples_of_the_guide(payload: bytes, says: str) -> None:
    kind, *rest = literal(says)
    message = {0: Request, 1: Response, 2: Notification}[kind](*rest)
    assert decode(payload) == message
    assert encode(message) == payload


# -- frames


def frames(*payloads: bytes) -> bytes:
    return b"".join(b"".join(frame(payload)) for payload in payloads)


def parse(parser: FrameParser, *pieces: bytes) -> list[bytes]:
    return [bytes(payload) for piece in pieces for payload in parser.feed(piece)]


def test_payloads_come_out_wherever_the_stream_is_cut() -> None:
    payloads = [b"", b"a", b"bc" * 300]
    stream = frames(*payloads)
    for first in range(len(stream) + 1):
        for second in range(first, min(first + 8, len(stream)) + 1):
            pieces = stream[:first], stream[first:second], stream[second:]
            assert parse(FrameParser(), *pieces) == payloads


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 20)))
def test_payloads_survive_any_chunking(payloads: list[bytes], sizes: list[int]) -> None:
    stream, pieces = frames(*payloads), []
    for size in sizes:
        pieces.append(stream[:size])
        stream = stream[size:]
    assert parse(FrameParser(), *pieces, stream) == payloads


def test_a_whole_payload_is_not_copied() -> None:
    data = frames(b"abc")
    (payload,) = FrameParser().feed(data)
    assert isinstance(payload, memoryview)
    assert payload.obj is data


def test_a_frame_of_max_frame_bytes_passes_and_one_more_does_not() -> None:
    assert parse(FrameParser(4), frames(b"1234")) == [b"1234"]
    with pytest.raises(ProtocolError, match="5 bytes is longer than max_frame \\(4 bytes\\)"):
        parse(FrameParser(4), frames(b"12345"))


def test_a_length_is_refused_before_its_payload_comes() -> None:
    with pytest.raises(ProtocolError):
        parse(FrameParser(100), b"\xff\xff", b"\xff\xff")


def test_frames_before_a_bad_one_are_delivered() -> None:
    parser = FrameParser(4)
    stream = parser.feed(frames(b"ok", b"too long"))
    assert bytes(next(stream)) == b"ok"
    with pytest.raises(ProtocolError):
        next(stream)


# -- messages

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
ids = st.integers(0, 2**63 - 1)
maps = st.dictionaries(st.text(), plain, max_size=4)


@given(ids, st.text(), maps)
def test_requests_from_another_encoder_are_understood(id: int, method: str, params: Any) -> None:
    payload = msgpack.packb([0, id, method, params])
    assert decode(payload) == Request(id, method, params)
    assert decode(memoryview(payload)) == Request(id, method, params)


@given(ids, st.none() | maps, plain)
def test_responses_are_understood_by_another_decoder(id: int, error: Any, result: Any) -> None:
    payload = encode(Response(id, error, result))
    assert msgpack.unpackb(payload) == [1, id, error, result]


@pytest.mark.parametrize("size", [0, LONG - 4, LONG, LONG + 4, 70_000])
@pytest.mark.parametrize("kind", [bytes, memoryview, lambda data: memoryview(data).cast("f")])
def test_long_bytes_at_the_end_of_a_result_are_not_copied(size: int, kind: Any) -> None:
    data = bytes(size)
    pieces = encode_result(7, {"shape": [size], "data": kind(data)})
    answer = [1, 7, None, {"shape": [size], "data": data}]
    assert msgpack.unpackb(b"".join(pieces)) == answer
    assert [getattr(piece, "obj", None) is data for piece in pieces[1:]] == [True] * (size >= LONG)


@pytest.mark.parametrize(
    "result", [{}, {"data": bytes(LONG), "shape": [1]}, [bytes(LONG)], bytes(LONG), "long" * LONG]
)
def test_long_bytes_elsewhere_are_encoded_with_the_rest(result: Any) -> None:
    (payload,) = encode_result(7, result)
    assert msgpack.unpackb(payload) == [1, 7, None, result]


@given(st.text(), maps)
def test_notifications_go_both_ways(method: str, params: Any) -> None:
    assert decode(encode(Notification(method, params))) == Notification(method, params)
    assert msgpack.unpackb(encode(Notification(method, params))) == [2, method, params]


@given(st.binary(max_size=60))
def test_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert type(decode(encode(message))) is type(message)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {},
        [],
        [0],
        [3, 1, "m", {}],
        [0, 1, "m"],
        [0, 1, "m", []],
        [0, 1, "m", {}, 1],
        [0, -1, "m", {}],
        [0, 2**63, "m", {}],
        [0, 1.0, "m", {}],
        [0, 1, b"m", {}],
        [0, 1, "m", {1: 2}],
        [2, "m", None],
        ["0", 1, "m", {}],
    ],
)
def test_values_of_another_shape_are_protocol_errors(value: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(value))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        msgpack.packb([2, "m", {}]) + b"\x00",
        msgpack.packb([2, "m", {}])[:-1],
        b"\xc1",
        b"\x94\x00\x01\xa2\xff\xfe\x80",
        b"\x91" * 100_000,
        b"\x93\x02\xa1m\x81\xa1k" + b"\x91" * 100_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=["empty", "trailing", "cut", "reserved", "utf-8", "deep", "deep inside", "huge array"],
)
def test_damaged_payloads_are_protocol_errors(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(payload)


# -- numbers in bulk


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_u32(numbers: list[int]) -> None:
    packed = pack_u32(numbers)
    assert packed == struct.pack(f"<{len(numbers)}I", *numbers)
    assert unpack_u32(packed) == numbers


@given(st.lists(st.floats(width=32)))
def test_f32(numbers: list[float]) -> None:
    assert pack_f32(numbers) == struct.pack(f"<{len(numbers)}f", *numbers)


def test_a_u32_list_has_a_multiple_of_four_bytes() -> None:
    with pytest.raises(ValueError, match="multiple of item size"):
        unpack_u32(b"12345")


def logprob(value: float, rank: int | None, token: str | None) -> Any:
    return SimpleNamespace(logprob=value, rank=rank, decoded_token=token)


PACKED = {
    "counts": pack_u32([NO_LOGPROBS, 2, 1]),
    "token_ids": pack_u32([7, 8, 9]),
    "logprobs": pack_f32([-0.5, -1.5, float("-inf")]),
    "ranks": pack_u32([1, 2, 0]),
    "tokens": ["a", "b", None],
}


def test_logprobs_of_maps_are_packed_in_columns() -> None:
    positions = [
        None,
        {7: logprob(-0.5, 1, "a"), 8: logprob(-1.5, 2, "b")},
        {9: logprob(float("-inf"), None, None)},
    ]
    assert pack_logprobs(positions) == PACKED


def test_flat_logprobs_are_packed_alike() -> None:
    flat = SimpleNamespace(
        start_indices=[0, 0, 2],
        end_indices=[0, 2, 3],
        token_ids=[7, 8, 9],
        logprobs=[-0.5, -1.5, float("-inf")],
        ranks=[1, 2, None],
        decoded_tokens=["a", "b", None],
    )
    assert pack_logprobs(flat) == PACKED


def test_no_logprobs_are_nil() -> None:
    assert pack_logprobs(None) is None
