"""The wire of guides/protocol.md for workers that start in a moment; standard library only."""

import os
import struct
import sys


def encode(value: object) -> bytes:
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        data = value.encode()
        return struct.pack(">BI", 0xDB, len(data)) + data
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, list):
        if len(value) < 16:
            return bytes([0x90 + len(value)]) + b"".join(map(encode, value))
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        items = b"".join(encode(key) + encode(item) for key, item in value.items())
        return struct.pack(">BI", 0xDF, len(value)) + items
    raise TypeError(type(value))


def decode(data: bytes, at: int = 0) -> tuple[object, int]:
    kind = data[at]
    at += 1
    if kind <= 0x7F:
        return kind, at
    if kind >= 0xE0:
        return kind - 256, at
    if 0x80 <= kind <= 0x8F:
        return decode_map(data, at, kind & 0x0F)
    if 0x90 <= kind <= 0x9F:
        return decode_array(data, at, kind & 0x0F)
    if 0xA0 <= kind <= 0xBF:
        return data[at : at + (kind & 0x1F)].decode(), at + (kind & 0x1F)
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
    numbers = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
    numbers |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    if kind in numbers:
        (number,) = struct.unpack_from(numbers[kind], data, at)
        return number, at + struct.calcsize(numbers[kind])
    lengths = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4}
    lengths |= {0xDE: 2, 0xDF: 4}
    size = lengths[kind]
    length = int.from_bytes(data[at : at + size], "big")
    at += size
    if kind in (0xDC, 0xDD):
        return decode_array(data, at, length)
    if kind in (0xDE, 0xDF):
        return decode_map(data, at, length)
    raw = data[at : at + length]
    return (raw if kind in (0xC4, 0xC5, 0xC6) else raw.decode()), at + length


def decode_array(data: bytes, at: int, length: int) -> tuple[list[object], int]:
    items = []
    for _ in range(length):
        item, at = decode(data, at)
        items.append(item)
    return items, at


def decode_map(data: bytes, at: int, length: int) -> tuple[dict[object, object], int]:
    items, at = decode_array(data, at, 2 * length)
    return dict(zip(items[::2], items[1::2], strict=True)), at


def read_exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(3, count - len(data))
        if not part:
            sys.exit(0)
        data += part
    return data


def write(data: bytes) -> None:
    while data:
        data = data[os.write(4, data) :]


def send(message: object) -> None:
    payload = encode(message)
    write(struct.pack(">I", len(payload)) + payload)


def receive() -> object:
    (length,) = struct.unpack(">I", read_exactly(4))
    message, _ = decode(read_exactly(length))
    return message
