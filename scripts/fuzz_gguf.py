"""Hostile GGUF files: the headers of real ones, changed at random, through all that looks at a
model before an engine starts.

    PYTHON scripts/fuzz_gguf.py INPUTS SEED [FILE ...]

with the Python of the library's environment. Without files, the demo model, a mixture of experts
and a Qwen2 with biases are made (``python/tests/gguf_models.py``). Exits with 1 at the first input
that is neither a model nor an error of ours, takes longer than ``SECONDS``, or for which more
memory is asked than ``MEMORY``; the input is kept, and named.

What came of it is in guides/quantization.md.
"""

import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "python" / "tests")]

from vllm_bridge.checkpoints import gguf_model  # noqa: E402
from vllm_bridge.errors import BridgeError  # noqa: E402

# What one input may take: processor time, and address space beside what is there before.
SECONDS = 5.0
MEMORY = 512 * 2**20

# Of a file that has room for whatever its header says; it has holes.
LARGE = 2**40

# Messages are for people.
LONGEST_MESSAGE = 2000

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
HOSTILE = (0, 1, 2, 3, 7, 31, 32, 33, 64, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31)
HOSTILE += (2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)


class Sample(NamedTuple):
    """A real file.

    Args:
        header: its bytes
        fields: where its numbers are, and how many bytes each has: counts, lengths, types, sizes,
            offsets and values
        size: of the file
    """

    header: bytes
    fields: list[tuple[int, int]]
    size: int


def sample(path: Path) -> Sample:
    data = path.read_bytes()
    fields = list(_fields(data))
    end, width = fields[-1]
    return Sample(data[: end + width], fields, len(data))


def _fields(data: bytes) -> Iterator[tuple[int, int]]:
    """Walks a header that is sound, by the description of the format."""

    def number(offset: int, width: int) -> int:
        return int.from_bytes(data[offset : offset + width], "little")

    def string(offset: int) -> int:
        return offset + 8 + number(offset, 8)

    yield from ((0, 4), (4, 4), (8, 8), (16, 8))
    offset = 24
    for _ in range(number(16, 8)):
        yield offset, 8
        offset = string(offset)
        yield offset, 4
        kind, offset = number(offset, 4), offset + 4
        count = 1
        if kind == ARRAY:
            yield from ((offset, 4), (offset + 4, 8))
            kind, count, offset = number(offset, 4), number(offset + 4, 8), offset + 12
        for index in range(count):
            width = 8 if kind == STRING else WIDTHS[kind]
            if index < 8:  # enough of a vocabulary
                yield offset, width
            offset = string(offset) if kind == STRING else offset + width
    for _ in range(number(8, 8)):
        yield offset, 8
        offset = string(offset)
        yield offset, 4
        dimensions, offset = number(offset, 4), offset + 4
        for width in (*(8 for _ in range(dimensions)), 4, 8):
            yield offset, width
            offset += width


def hostile(rng: random.Random, samples: list[Sample]) -> tuple[bytes, int]:
    """A header, and the size of the file that has it."""
    chosen = rng.choice(samples)
    data, size = bytearray(chosen.header), chosen.size
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        place = rng.randrange(len(data)) if data else 0
        match rng.randrange(10):
            case 0 | 1 if data:
                data[place] ^= 1 << rng.randrange(8)
            case 2 if data:
                data[place] = rng.randrange(256)
            case 3 | 4 | 5 | 6:
                _change_field(rng, data, chosen)
            case 7:
                size = rng.choice((place, rng.randrange(size + 1), size - 1, size + 1, LARGE))
            case 8:
                other = rng.choice(samples).header
                start = rng.randrange(len(other))
                data[place : place + rng.randrange(64)] = other[start : start + rng.randrange(64)]
            case 9:
                data[place : place + rng.randrange(16)] = rng.randbytes(rng.randrange(16))
    return bytes(data), max(size, 0)


def _change_field(rng: random.Random, data: bytearray, chosen: Sample) -> None:
    offset, width = rng.choice(chosen.fields)
    before = int.from_bytes(data[offset : offset + width], "little")
    value = rng.choice(
        (
            *(rng.choice(HOSTILE) for _ in range(4)),
            *(before + step for step in (-1, 1, 32)),
            *(before * 2, before // 2, rng.getrandbits(8 * width)),
        )
    )
    data[offset : offset + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")


def outcome(path: Path) -> str:
    """What becomes of a file: ``"a model"`` or the reason of its error.

    Raises:
        Exception: whatever else happens
    """
    start = time.process_time()
    try:
        gguf_model.check(gguf_model.look_at(str(path), {}))
        found = "a model"
    except BridgeError as error:
        found = error.reason
        said = f"{error.message}{error.details}".encode()
        if len(said) > LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(said)} bytes") from error
    if (seconds := time.process_time() - start) > SECONDS:
        raise AssertionError(f"it took {seconds:.1f} s")
    return found


def run(inputs: int, seed: int, paths: list[Path], folder: Path) -> Counter[str]:
    """How many inputs came to which end.

    Raises:
        Exception: of the first that came to none, with the path of its file as a note
    """
    rng = random.Random(seed)  # noqa: S311
    samples = [sample(path) for path in paths]
    found: Counter[str] = Counter()
    path = folder / "hostile.gguf"
    for number in range(inputs):
        data, size = hostile(rng, samples)
        with path.open("wb") as file:
            file.write(data[:size])
            file.truncate(size)
        try:
            found[outcome(path)] += 1
        except BaseException as error:
            error.add_note(f"input {number} of seed {seed}: {path}")
            raise
    return found


def limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        there = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + MEMORY, there + MEMORY))


def main() -> None:
    inputs, seed, *given = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-gguf-"))
    paths = [Path(path) for path in given] or made(folder)
    limit_memory()
    start = time.monotonic()
    found = run(int(inputs), int(seed), paths, folder)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{inputs} inputs of seed {seed} in {seconds:.0f} s, at most {peak:.0f} MiB:")
    for reason, count in found.most_common():
        print(f"  {count:7} {reason}")


def made(folder: Path) -> list[Path]:
    """Made in a process of its own, because it takes torch and its memory."""
    import subprocess

    script = (
        "import sys, gguf_models as g; from pathlib import Path; folder = Path(sys.argv[1]);"
        "print(g.make('Q4_K_M', folder / 'a'));"
        "print(g.write(g.mixture(), 'Q8_0', folder / 'b'));"
        "print(g.write(g.qwen2(), 'Q4_0', folder / 'c'))"
    )
    for name in "abc":
        (folder / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Path(line) for line in done.stdout.split("\n") if line.endswith(".gguf")]


if __name__ == "__main__":
    main()
