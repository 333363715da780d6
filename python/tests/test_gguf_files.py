"""Headers of GGUF files: what they say, and what is no such."""

import runpy
import struct
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import pytest

import gguf_files as raw
from conftest import ROOT
from gguf_files import Info, Raw, write
from vllm_bridge.checkpoints import gguf
from vllm_bridge.errors import BridgeError

NAMED = {"general.architecture": "llama"}


def refused(path: Path) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        gguf.read(str(path))
    assert caught.value.reason == "invalid_checkpoint"
    assert caught.value.details["file"]
    return caught.value


def test_the_types_are_ggmls() -> None:
    known = {kind.name: (int(kind), *sizes) for kind, sizes in reference.GGML_QUANT_SIZES.items()}
    assert {
        name: (kind.number, kind.block, kind.size) for name, kind in gguf.TYPES.items()
    } == known


def test_what_a_file_of_ggufs_own_writer_says(tmp_path: Path) -> None:
    import numpy

    path = tmp_path / "model.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_token_list(["a", "é", "漢字"])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_token_types([1, 2, 3])
    writer.add_add_bos_token(True)
    writer.add_array("llama.flags", [True, False])
    writer.add_key_value("llama.big", 2**40, reference.GGUFValueType.UINT64)
    writer.add_tensor("a.weight", numpy.arange(6, dtype="<f4").reshape(2, 3))
    packed = numpy.arange(3 * 2 * 34, dtype="u1").reshape(3, 68)
    writer.add_tensor("b.weight", packed, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = gguf.read(str(path))
    assert file.path == str(path)
    assert file.parts == (str(path),)
    assert file.version == 3
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 0.5,
        "tokenizer.ggml.tokens": ("a", "é", "漢字"),
        "tokenizer.ggml.scores": array("f", [0.5, -1.0, 0.0]),
        "tokenizer.ggml.token_type": array("i", [1, 2, 3]),
        "tokenizer.ggml.add_bos_token": True,
        "llama.flags": (True, False),
        "llama.big": 2**40,
    }
    first, second = file.tensors["a.weight"], file.tensors["b.weight"]
    assert (first.dtype, first.shape, first.size) == ("F32", (2, 3), 24)
    assert (second.dtype, second.shape, second.size) == ("Q8_0", (3, 64), 204)
    data = path.read_bytes()
    assert struct.unpack("<6f", data[first.start :][: first.size]) == (0, 1, 2, 3, 4, 5)
    assert data[second.start :][: second.size] == packed.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_a_small_file(tmp_path: Path, version: int) -> None:
    path = write(
        tmp_path / "m.gguf", NAMED, {"a": Info((3, 2), "F16"), "b": Info((1,))}, version=version
    )
    file = gguf.read(str(path))
    assert file.version == version
    assert [tensor.size for tensor in file.tensors.values()] == [12, 4]
    starts = [tensor.start for tensor in file.tensors.values()]
    assert starts == [starts[0], starts[0] + 32]
    assert starts[0] % 32 == 0


def test_an_alignment_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", NAMED | {"general.alignment": 8}, [("a", Info((1,)))])
    assert gguf.read(str(path)).tensors["a"].start % 8 == 0


def test_a_long_vocabulary_is_read_beyond_what_is_read_at_a_time(tmp_path: Path) -> None:
    words = [f"word{number}" * (number % 7) for number in range(200_000)]
    path = write(tmp_path / "m.gguf", {"tokens": words, "after": 7})
    assert path.stat().st_size > 3 * gguf._READ
    file = gguf.read(str(path))
    assert file.metadata["tokens"] == tuple(words)
    assert file.metadata["after"] == 7


MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "another format": (lambda: b"PK\x03\x04" + bytes(60), "not with `GGUF`"),
    "an old format": (lambda: b"tjgg" + bytes(60), "older formats"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "big-endian": (lambda: raw.header(NAMED, version=3 << 24), "big-endian"),
    "version 1": (lambda: raw.header(NAMED, version=1), "version 1"),
    "a later version": (lambda: raw.header(NAMED, version=4), "version 4"),
    "version 0": (lambda: raw.header(NAMED, version=0), "version 0"),
    "many values": (lambda: raw.header(NAMED, counts=(None, 2**60)), "its counts"),
    "many tensors": (lambda: raw.header(NAMED, counts=(2**63, None)), "its counts"),
    "a value too many": (lambda: raw.header(NAMED, counts=(None, 2)), "a key has"),
    "a long string": (
        lambda: raw.header([("x", Raw(raw.STRING, struct.pack("<Q", 2**62)))]),
        f"the value of `x` would take {2**62} bytes",
    ),
    "a long array": (
        lambda: raw.header([("x", raw.array(raw.F32, [1.0], count=2**61))]),
        "the value of `x` would take",
    ),
    "a long array of strings": (
        lambda: raw.header([("x", raw.array(raw.STRING, ["a"], count=2**22))]),
        "the value of `x` would take",
    ),
    "more strings than there are": (
        lambda: raw.header([("x", raw.array(raw.STRING, ["a"], count=2**40))]),
        f"{2**40} strings, and {2**22} are allowed",
    ),
    "an array of arrays": (lambda: raw.header([("x", raw.array(raw.ARRAY, []))]), "arrays in"),
    "a type of values": (lambda: raw.header([("x", Raw(13, bytes(8)))]), "type 13"),
    "a type of items": (lambda: raw.header([("x", raw.array(77, []))]), "type 77"),
    "no text": (lambda: raw.header([("x", Raw(8, raw.string(b"\xff\xfe")))]), "is no text"),
    "a key that is no text": (lambda: raw.header([(b"\xff", 1)]), "a key is no text"),
    "a key twice": (lambda: raw.header([("x", 1), ("x", 2)]), "the key `x` twice"),
    "a long key twice": (lambda: raw.header([("x" * 60_000, 1)] * 2), "…` twice"),
    "a long key": (lambda: raw.header([("x" * 70_000, 1)]), "1 to 65535 are allowed"),
    "a tensor twice": (lambda: raw.header({}, [("a", Info((1,)))] * 2) + bytes(64), "`a` twice"),
    "a long name": (lambda: raw.header({}, {"a" * 65: Info((1,))}), "1 to 64 are allowed"),
    "no name": (lambda: raw.header({}, {"": Info((1,))}), "name has 0 bytes"),
    "parts in words": (lambda: raw.header({"split.count": "x"}), "its `split.count` is 'x'"),
    "no dimensions": (lambda: raw.header({}, {"a": Info(())}), "`a` has 0 dimensions"),
    "five dimensions": (lambda: raw.header({}, {"a": Info((1,) * 5)}), "`a` has 5 dimensions"),
    "nothing in it": (lambda: raw.header({}, {"a": Info((4, 0))}), "`a` is empty"),
    "a type": (lambda: raw.header({}, {"a": Info((4,), 36)}), "`a` is of ggml's type 36"),
    "half a block": (lambda: raw.header({}, {"a": Info((2, 48), "Q8_0")}), "blocks of 32"),
    "larger than the file": (
        lambda: raw.header({}, {"a": Info((2**20, 2**20))}),
        "`a` ends at byte",
    ),
    "larger than numbers": (lambda: raw.header({}, {"a": Info((2**63,) * 4)}), "`a` ends at byte"),
    "beyond the end": (
        lambda: raw.header({}, {"a": Info((1,), offset=2**40)}),
        "`a` ends at byte",
    ),
    "one byte short": (
        lambda: raw.header({}, {"a": Info((8,))}) + bytes(31),
        "`a` ends at byte 96, the file at 95",
    ),
    "unaligned": (
        lambda: raw.header({}, {"a": Info((1,), offset=4)}) + bytes(64),
        "multiple of 32",
    ),
    "one over the other": (
        lambda: (
            raw.header({}, {"a": Info((16,), offset=0), "b": Info((1,), offset=32)}) + bytes(64)
        ),
        "`b` begins before `a` ends",
    ),
    "an alignment": (lambda: raw.header({"general.alignment": 24}), "no power of two"),
    "an alignment of 0": (lambda: raw.header({"general.alignment": 0}), "no power of two"),
    "an alignment in words": (lambda: raw.header({"general.alignment": "x"}), "no power of two"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_gguf_file_is_told(tmp_path: Path, name: str) -> None:
    make, words = MALFORMED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    error = refused(path)
    assert words in error.message
    assert str(path) in error.message
    assert len(f"{error.message}{error.details}") < 700


def test_what_a_header_announces_takes_no_memory(tmp_path: Path) -> None:
    """Files with room for it: they have holes."""
    path = tmp_path / "model.gguf"
    announced = {
        "longer than": [
            raw.header([("x", Raw(raw.STRING, struct.pack("<Q", 2**38)))]),
            raw.header([("x", raw.array(raw.F32, [], count=2**36))]),
            raw.header(NAMED, counts=(2**34, None)),
        ],
        "ends at byte": [raw.header({}, {"a": Info((2**40, 2**20))})],
    }
    tracemalloc.start()
    try:
        for words, headers in announced.items():
            for header in headers:
                with path.open("wb") as file:
                    file.write(header)
                    file.truncate(2**40)
                tracemalloc.reset_peak()
                assert words in refused(path).message
                assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_hostile_headers_are_told(tmp_path: Path) -> None:
    """A sample of what the script makes of real models."""
    paths = [
        raw.write_llama(tmp_path / "a.gguf", "Q8_0"),
        raw.write_llama(tmp_path / "b.gguf", "F32", llama__rope__scaling__type="yarn"),
    ]
    found = runpy.run_path(str(ROOT / "scripts" / "fuzz_gguf.py"))["run"](1000, 7, paths, tmp_path)
    assert found["invalid_checkpoint"] > 500
    assert set(found) <= {
        "invalid_checkpoint",
        "unsupported_model",
        "unsupported_quantization",
        "not_a_model",
        "a model",
    }


def test_a_file_that_ends_anywhere_is_told(tmp_path: Path) -> None:
    metadata = NAMED | {"tokens": ["a", "bc"], "scores": [0.5], "n": 3, "flag": True}
    whole = raw.header(metadata, {"a": Info((2, 32), "Q8_0")}) + bytes(68)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert gguf.read(str(path)).tensors["a"].size == 68
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert str(path) in refused(path).message


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.gguf").message


# -- files in parts


def part(folder: Path, number: int, of: int, tensors: Any, **said: Any) -> Path:
    """A part as llama.cpp's gguf-split writes it: only the first tells of the model."""
    metadata: dict[str, Any] = {} if number else dict(NAMED)
    metadata |= {
        "split.no": raw.number(raw.U16, number),
        "split.count": raw.number(raw.U16, of),
        "split.tensors.count": raw.number(raw.I32, of),
    } | said
    return write(folder / f"m-{number + 1:05}-of-{of:05}.gguf", metadata, tensors)


def three(folder: Path, **said: Any) -> list[Path]:
    return [part(folder, n, 3, {f"t{n}": Info((n + 1,))}, **said) for n in range(3)]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_parts_of_a_file_are_one(tmp_path: Path, given: int) -> None:
    paths = three(tmp_path)
    file = gguf.read(str(paths[given]))
    assert file.path == str(paths[given])
    assert file.parts == tuple(map(str, paths))
    assert file.metadata["general.architecture"] == "llama"
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        "t0": (1,),
        "t1": (2,),
        "t2": (3,),
    }
    assert [tensor.file for tensor in file.tensors.values()] == list(map(str, paths))


def test_a_part_that_is_missing_is_told(tmp_path: Path) -> None:
    _, second, third = three(tmp_path)
    second.unlink()
    error = refused(third)
    assert error.details["missing"] == [second.name]
    assert second.name in error.message
    assert "download" in error.message


def test_many_parts_that_are_missing_are_not_all_named(tmp_path: Path) -> None:
    with pytest.raises(BridgeError) as caught:
        gguf.parts(str(tmp_path / "m-00001-of-99999.gguf"))
    assert "99999 of 99999 parts" in caught.value.message
    assert caught.value.details["missing"] == [f"m-{n:05}-of-99999.gguf" for n in range(1, 11)]


def test_parts_under_other_names_are_told(tmp_path: Path) -> None:
    first, *_ = three(tmp_path)
    error = refused(first.rename(tmp_path / "model.gguf"))
    assert "one of 3 parts" in error.message
    assert "Give the files the names that they had" in error.message


def test_parts_in_another_order_are_told(tmp_path: Path) -> None:
    first, second, third = three(tmp_path)
    second.rename(tmp_path / "x")
    third.rename(second)
    (tmp_path / "x").rename(third)
    assert "part 2 (from 0) of 3, its name not" in refused(first).message


def test_parts_that_lack_tensors_are_told(tmp_path: Path) -> None:
    first, *_ = three(tmp_path, **{"split.tensors.count": raw.number(raw.I32, 4)})
    assert "hold 3 tensors, it says 4" in refused(first).message


def test_a_tensor_in_two_parts_is_told(tmp_path: Path) -> None:
    first, second, _ = three(tmp_path)
    part(tmp_path, 1, 3, {"t0": Info((1,))})
    error = refused(first)
    assert error.details == {"file": str(second), "tensor": "t0"}


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    first, second, _ = three(tmp_path)
    second.write_bytes(second.read_bytes()[:-32])
    assert refused(first).details["file"] == str(second)


def test_a_file_whose_name_only_looks_like_a_part_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "m-00001-of-00002.gguf", NAMED, {"a": Info((1,))})
    assert gguf.read(str(path)).parts == (str(path),)
