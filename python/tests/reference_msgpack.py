"""python-msgpack as the reference that the MessagePack codec of the Elixir side is compared with.

Values are kept in files, each value after its length in four big-endian bytes.

    reference_msgpack.py reencode SOURCE TARGET      decode every value and encode it again
    reference_msgpack.py generate SEED COUNT TARGET  write values made from a seed
    reference_msgpack.py judge SOURCE TARGET         the same for any bytes; no value becomes empty
    reference_msgpack.py compare EXPECTED ACTUAL     exit with 1 unless both hold the same values
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]

INTEGERS = [
    number
    for power in (2**exponent for exponent in range(65))
    for number in (power - 1, power, 1 - power, -power, -power - 1)
    if -(2**63) <= number < 2**64
]
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33]
LONG_LENGTHS = [255, 256, 257, 1024, 1025, 65_535, 65_536]
ALPHABET = "abc \n\0äß漢字🙂"


def read(path: str) -> Iterator[bytes]:
    data = memoryview(Path(path).read_bytes())
    while data:
        (length,) = struct.unpack_from(">I", data)
        yield bytes(data[4 : 4 + length])
        data = data[4 + length :]


def write(path: str, values: Iterable[bytes]) -> None:
    Path(path).write_bytes(b"".join(struct.pack(">I", len(value)) + value for value in values))


def decode(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def judge(data: bytes) -> bytes:
    try:
        # Text that is not UTF-8 is the reader's affair.
        value = msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogateescape")
    except Exception:
        return b""
    packed: bytes = msgpack.packb(value, unicode_errors="surrogateescape")
    return packed


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(ALPHABET, k=length))


def scalar(rng: random.Random) -> Any:
    match rng.randrange(8):
        case 0:
            return rng.choice([None, True, False])
        case 1 | 2:
            return rng.choice(INTEGERS)
        case 3:
            return rng.choice([rng.gauss(0, 1e9), 0.0, -0.0, 5e-324, float("inf"), float("nan")])
        case 4:
            return text(rng, rng.choice(LENGTHS))
        case 5:
            # The Elixir side does not tell bin from str, so that only text survives its encoder.
            return b"x" * rng.choice(LENGTHS)
        case 6:
            return msgpack.ExtType(rng.randrange(128), rng.randbytes(rng.choice(LENGTHS)))
        case _:
            seconds = rng.choice([0, 2**32 - 1, 2**32, 2**34 - 1, 2**34, -1, 2**62, -(2**63)])
            return msgpack.Timestamp(seconds, rng.choice([0, 1, 999_999_999]))


def value(rng: random.Random, depth: int) -> Any:
    size = rng.choice([0, 1, 2, 3, 15, 16, 17])
    match rng.randrange(4) if depth else 0:
        case 1:
            return [value(rng, depth - 1) for _ in range(size)]
        case 2:
            return {
                rng.choice([rng.choice(INTEGERS), text(rng, 5)]): value(rng, depth - 1)
                for _ in range(size)
            }
        case _:
            return scalar(rng)


def generate(seed: int, count: int) -> Iterator[bytes]:
    rng = random.Random(seed)  # noqa: S311
    for _ in range(count):
        yield msgpack.packb(value(rng, 3), use_single_float=rng.random() < 0.2)
    for length in LONG_LENGTHS:
        yield msgpack.packb([text(rng, length), b"x" * length, msgpack.ExtType(1, bytes(length))])
    yield msgpack.packb(list(range(65_536)))
    yield msgpack.packb({n: -n for n in range(65_536)})


def canonical(term: Any) -> str:
    """A text that tells 1, 1.0 and True apart and takes maps in any order, str and bin as one."""
    if isinstance(term, dict):
        pairs = sorted(f"{canonical(key)}: {canonical(item)}" for key, item in term.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(term, list):
        return "[" + ", ".join(map(canonical, term)) + "]"
    return repr(term.decode() if isinstance(term, bytes) else term)


def compare(expected_path: str, actual_path: str) -> int:
    pairs = zip_longest(read(expected_path), read(actual_path))
    for number, (expected, actual) in enumerate(pairs):
        if expected is None or actual is None:
            print(f"one of the files has only {number} values")
            return 1
        left, right = canonical(decode(expected)), canonical(decode(actual))
        if left != right:
            print(f"value {number} differs: {left[:200]} and {right[:200]}")
            return 1
    return 0


def main(arguments: list[str]) -> int:
    match arguments:
        case ["reencode", source, target]:
            write(target, (msgpack.packb(decode(data)) for data in read(source)))
            return 0
        case ["judge", source, target]:
            write(target, (judge(data) for data in read(source)))
            return 0
        case ["generate", seed, count, target]:
            write(target, generate(int(seed), int(count)))
            return 0
        case ["compare", expected, actual]:
            return compare(expected, actual)
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
