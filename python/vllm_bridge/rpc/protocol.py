"""The wire: frames, messages and numbers in bulk. Pure; ``guides/protocol.md`` is its text."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import msgspec

DEFAULT_MAX_FRAME = 64 * 1024 * 1024
HEADER = 4

# Bytes of an answer that are sent from where they lie: for shorter ones a copy costs less.
LONG = 64 * 1024

# The count of a position for which vLLM has no logprobs at all.
NO_LOGPROBS = 0xFFFFFFFF

Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class ProtocolError(Exception):
    """The peer broke the protocol; the connection cannot go on."""


class Request(msgspec.Struct, array_like=True, tag=0, forbid_unknown_fields=True):
    id: Id
    method: str
    params: dict[str, Any]


class Response(msgspec.Struct, array_like=True, tag=1, forbid_unknown_fields=True):
    id: Id
    error: dict[str, Any] | None
    result: Any


class Notification(msgspec.Struct, array_like=True, tag=2, forbid_unknown_fields=True):
    method: str
    params: dict[str, Any]


Message = Request | Response | Notification

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The payload that says ``message``."""
    return _encoder.encode(message)


def encode_result(id: int, result: Any) -> tuple[bytes | memoryview, ...]:
    """The payload that answers request ``id``, in pieces: long bytes that are the last of
    ``result``, or a view of such, are not copied."""
    if isinstance(result, dict) and result:
        name, last = next(reversed(result.items()))
        if isinstance(last, bytes | memoryview):
            data = memoryview(last).cast("B")
            if LONG <= len(data) < 2**32:
                head = encode(Response(id, None, result | {name: b""}))
                # It ends with a bin 8 of no bytes, in whose place comes a bin 32.
                return head[:-2] + b"\xc6" + len(data).to_bytes(4, "big"), data
    return (encode(Response(id, None, result)),)


def decode(payload: bytes | memoryview) -> Message:
    """The message in ``payload``.

    Raises:
        ProtocolError: it is not one MessagePack value, or not of a message's shape.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ProtocolError(f"a frame is not a message: {error}") from error


def frame(*payload: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """The header and the pieces of the payload of one frame, apart, so that none is copied."""
    return sum(map(len, payload)).to_bytes(HEADER, "big"), *payload


class FrameParser:
    """Cuts a stream of bytes into payloads, however the stream was split.

    A payload that lies whole in one piece comes out as a view of that piece; only what
    crosses the border of two pieces is copied. A header that announces more than
    ``max_frame`` bytes is refused before anything of its payload is kept, so no more than
    one frame and one piece are ever in memory.
    """

    def __init__(self, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        self.max_frame = max_frame
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes | memoryview]:
        """The payloads that ``data`` completes, one by one.

        Raises:
            ProtocolError: a length is above ``max_frame``.
        """
        view = memoryview(data)
        rest = self._rest
        while rest and len(view):
            if len(rest) < HEADER:
                missing = HEADER - len(rest)
                rest += view[:missing]
                view = view[missing:]
                if len(rest) < HEADER:
                    return
            end = HEADER + self._length(rest)
            missing = end - len(rest)
            rest += view[:missing]
            view = view[missing:]
            if len(rest) < end:
                return
            payload = bytes(memoryview(rest)[HEADER:])
            rest.clear()
            yield payload
        while len(view) >= HEADER:
            end = HEADER + self._length(view)
            if len(view) < end:
                break
            payload_view = view[HEADER:end]
            view = view[end:]
            yield payload_view
        rest += view

    def _length(self, header: bytearray | memoryview) -> int:
        length = int.from_bytes(header[:HEADER], "big")
        if length > self.max_frame:
            raise ProtocolError(
                f"a frame of {length} bytes is longer than max_frame ({self.max_frame} bytes)"
            )
        return length


def pack_u32(numbers: Iterable[int]) -> bytes:
    """``u32[]``: little-endian, 4 bytes each."""
    return _little_endian(array("I", numbers))


def unpack_u32(data: bytes) -> list[int]:
    """The numbers of a ``u32[]``.

    Raises:
        ValueError: the length is not a multiple of 4.
    """
    numbers = array("I")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def pack_f32(numbers: Iterable[float]) -> bytes:
    """``f32[]``: little-endian, 4 bytes each."""
    return _little_endian(array("f", numbers))


def _little_endian(numbers: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


class Columns:
    """Deltas that are no more than a text and its tokens: ``packed_deltas``."""

    __slots__ = ("counts", "ids", "texts", "token_ids")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.counts: list[int] = []
        self.token_ids: list[int] = []

    def to_message(self) -> Notification:
        columns = {
            "ids": _little_endian(array("Q", self.ids)),
            "counts": pack_u32(self.counts),
            "token_ids": pack_u32(self.token_ids),
            "texts": self.texts,
        }
        return Notification("packed_deltas", columns)

    def halves(self) -> "tuple[Columns, Columns]":
        middle = len(self.ids) // 2
        tokens = sum(self.counts[:middle])
        cuts = (slice(middle), slice(tokens)), (slice(middle, None), slice(tokens, None))
        return self._part(*cuts[0]), self._part(*cuts[1])

    def _part(self, deltas: slice, tokens: slice) -> "Columns":
        part = Columns()
        part.ids, part.texts = self.ids[deltas], self.texts[deltas]
        part.counts, part.token_ids = self.counts[deltas], self.token_ids[tokens]
        return part


class Rows:
    """Any deltas, each with the id of its request first: ``deltas``."""

    __slots__ = ("rows",)

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows = rows

    @property
    def ids(self) -> list[int]:
        return [row[0] for row in self.rows]

    def to_message(self) -> Notification:
        return Notification("deltas", {"deltas": self.rows})

    def halves(self) -> "tuple[Rows, Rows]":
        middle = len(self.rows) // 2
        return Rows(self.rows[:middle]), Rows(self.rows[middle:])


def pack_logprobs(positions: Any) -> dict[str, Any] | None:
    """vLLM's logprobs of a sequence of positions (``FlatLogprobs``, or a list of one map of
    token ids to ``Logprob`` per position) as the columns that the protocol describes."""
    if positions is None:
        return None
    counts: list[int] = []
    token_ids: list[int] = []
    logprobs: list[float] = []
    ranks: list[int] = []
    tokens: list[str | None] = []
    if hasattr(positions, "start_indices"):
        counts = [
            end - start or NO_LOGPROBS
            for start, end in zip(positions.start_indices, positions.end_indices, strict=True)
        ]
        token_ids = positions.token_ids
        logprobs = positions.logprobs
        ranks = [rank or 0 for rank in positions.ranks]
        tokens = positions.decoded_tokens
    else:
        entry: Mapping[int, Any] | None
        for entry in positions:
            counts.append(len(entry) if entry is not None else NO_LOGPROBS)
            for token_id, logprob in (entry or {}).items():
                token_ids.append(token_id)
                logprobs.append(logprob.logprob)
                ranks.append(logprob.rank or 0)
                tokens.append(logprob.decoded_token)
    return {
        "counts": pack_u32(counts),
        "token_ids": pack_u32(token_ids),
        "logprobs": pack_f32(logprobs),
        "ranks": pack_u32(ranks),
        "tokens": tokens,
    }
