"""Making GGUF files: what is asked of llama.cpp and what it is told, without it. What it makes is
in ``test_quantize_gguf_made.py``."""

import ctypes
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import formats
from vllm_bridge.jobs.quantize.llama_cpp import converter, importance, pre_tokenizer, quantizer
from vllm_bridge.jobs.quantize.producer import Source
from vllm_bridge.quantization.gguf.pre_tokenizers import PRE_TOKENIZERS

DEMO = Path(__file__).resolve().parents[2] / "priv" / "models" / "demo"


class Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Params(ctypes.Structure):
    """Parameters

    Attributes:
        nthread (int): number of threads
        ftype (int): quantize to this llama_ftype
        output_tensor_type (int): output tensor type
        pure (bool): quantize all tensors to the default type
    """

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("pure", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(Entry)),
        ("tt_overrides", ctypes.POINTER(Override)),
        ("future", ctypes.c_void_p),
    )


class LlamaCpp(ModuleType):
    """A library that copies files, knows three types, and takes notes."""

    __version__ = "0.0.1"
    llama_model_quantize_params = Params
    llama_model_imatrix_data = Entry
    llama_model_tensor_override = Override

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.LLAMA_FTYPE_ALL_F32 = 0
        self.LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
        self.LLAMA_FTYPE_MOSTLY_IQ1_S = 24
        self.LLAMA_FTYPE_MOSTLY_NEW = 99
        self.LLAMA_FTYPE_GUESSED = 1024
        self._logger = self
        self.heard: Any = None
        self.llama_log_callback = lambda function: function

    def llama_model_quantize_default_params(self) -> Params:
        return Params(ftype=15)

    def llama_log_set(self, heard: Any, _data: Any) -> None:
        self.heard = heard

    def llama_model_quantize(self, source: bytes, target: bytes, reference: Any) -> int:
        params: Params = reference._obj
        says = {99: "invalid output file type 99", 24: "this quantization requires an imatrix!"}
        if params.ftype == 99 or (params.ftype == 24 and not params.imatrix):
            self.heard(4, b"main: failed to ", None)
            self.heard(4, f"quantize: {says[params.ftype]}\n".encode(), None)
            return 1
        self.heard(2, b"[   2/  57] blk.0.attn_k.weight - [256], ", None)
        self.heard(2, b"converting to q4_K .. size = 1\n", None)
        shutil.copy(source, target)
        return 0


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCpp]:
    library = LlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr(
        converter, "architectures", lambda: ("LlamaForCausalLM", "MambaForCausalLM")
    )
    quantizer._try.cache_clear()
    yield library
    quantizer._try.cache_clear()


def refused(given: Any, source: Source | None = None) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        formats.outputs([("gguf", given)], source)
    return caught.value


@pytest.mark.usefixtures("llama_cpp")
def test_options_are_the_fields_of_llama_cpp_s_struct_that_are_a_choice() -> None:
    options = formats.producer("gguf").options()
    assert list(options) == [
        "nthread", "ftype", "output_tensor_type", "pure", "tt_overrides", "outtype",
    ]  # fmt: skip
    assert options["ftype"].default == "Q4_K_M"
    assert options["ftype"].allowed == ("F32", "Q4_K_M", "IQ1_S", "NEW")
    assert options["pure"].doc == "quantize all tensors to the default type"
    assert "Q6_K" in options["output_tensor_type"].allowed


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("given", "label"),
    [
        ("q4_k_m", "Q4_K_M"),
        ({"ftype": "q4_k_m", "nthread": 3, "outtype": "f16"}, "Q4_K_M"),
        ({"pure": True, "output_tensor_type": "q8_0"}, "Q4_K_M-pure-output-Q8_0"),
        ({"tt_overrides": {"attn_v": "q8_0"}}, "Q4_K_M-mixed"),
    ],
)
def test_labels_say_what_is_not_as_usual(given: Any, label: str) -> None:
    (one,) = formats.outputs([("gguf", given)])
    assert one.label == label


@pytest.mark.usefixtures("llama_cpp")
def test_whether_texts_have_a_use_is_tried_out() -> None:
    texts = [one.texts for one in formats.outputs([("gguf", word) for word in ("F32", "IQ1_S")])]
    assert texts == ["unused", "required"]
    # The library of this test does not look at the importance matrix.
    assert formats.output("gguf", "Q4_K_M").texts == "unused"


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Q4_K_N", "Unknown kind of gguf `Q4_K_N`. Did you mean `Q4_K_M`? There are: F32, Q4_K_M,"),
        ("NEW", "llama.cpp does not make NEW with these options: invalid output file type 99. "),
        ({"purr": True}, "Unknown option of gguf `purr`. Did you mean `pure`?"),
        ({"ftype": "F32", "pure": True}, "`pure` has no effect on F32, which is not quantized."),
        ({"tt_overrides": {"attn_v": "Q6K"}}, "Unknown type of `attn_v` `Q6K`."),
        ({"output_tensor_type": "Q9"}, "`output_tensor_type` is 'Q9', not one of "),
    ],
)
def test_what_cannot_be_made_is_refused(given: Any, message: str) -> None:
    error = refused(given)
    assert error.reason == "invalid_option"
    assert error.message.startswith(message)


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("architecture", "model_type", "message"),
    [
        ("FooForCausalLM", "foo", "llama.cpp's converter does not know the architecture Foo"),
        ("MambaForCausalLM", "mamba", "Models of the type mamba are not read from GGUF files"),
    ],
)
def test_a_model_that_converter_or_engine_lacks_is_refused(
    architecture: str, model_type: str, message: str, tmp_path: Path
) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": [architecture], "model_type": model_type}
    (model / "config.json").write_text(json.dumps(config))
    error = refused("Q4_K_M", Source(str(model)))
    assert error.reason == "unsupported"
    assert error.message.startswith(message)
    assert formats.outputs([("gguf", "Q4_K_M")], Source(str(DEMO)))[0].label == "Q4_K_M"


def test_llama_cpp_says_how_far_it_is_and_why_it_stopped(
    llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(b"GGUF")
    told: list[tuple[int, int]] = []
    target = str(tmp_path / "target.gguf")
    options = {"ftype": "Q4_K_M"}
    assert (
        quantizer.quantize(str(source), target, options, told=lambda *far: told.append(far)) == []
    )
    assert told == [(2, 57)]
    assert llama_cpp.heard is llama_cpp.llama_log_callback
    with pytest.raises(quantizer.QuantizerError, match="requires an imatrix"):
        quantizer.quantize(str(source), target, {"ftype": "IQ1_S"})


def test_a_file_that_takes_no_more_is_a_full_disk(
    llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        llama_cpp.heard(4, b"failed to quantize: basic_ios::clear: iostream error\n", None)
        return 1

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", full)
    with pytest.raises(OSError, match="No space left"):
        quantizer.quantize("a", str(tmp_path / "b"), {"ftype": "Q4_K_M"})
    # NumPy has no number for it.
    with pytest.raises(OSError, match="No space left"), quantizer.writing("a"):
        raise OSError("524288 requested and 122880 written")
    with pytest.raises(PermissionError), quantizer.writing("a"):
        raise PermissionError(13, "Permission denied")


# Tokenizers


def test_the_ways_to_cut_texts_are_told_apart() -> None:
    content = json.loads((DEMO / "tokenizer.json").read_text())
    assert pre_tokenizer.name(content) == "gpt-2"
    found = {}
    for name, known in PRE_TOKENIZERS.items():
        model = {"ignore_merges": known.ignores_merges}
        described = pre_tokenizer._described(known)
        found[name] = pre_tokenizer.name({"pre_tokenizer": described, "model": model})
    for name, other in found.items():
        same = PRE_TOKENIZERS[name], PRE_TOKENIZERS[other]
        assert same[0].patterns == same[1].patterns, (name, other)
    assert len(set(found.values())) == len({
        (known.patterns, known.ignores_merges) for known in PRE_TOKENIZERS.values()
    })  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "it changes texts before it cuts them"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "as none does that llama.cpp knows"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    content = json.loads((DEMO / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BridgeError, match=words) as caught:
        pre_tokenizer.find(tmp_path)
    assert caught.value.reason == "unsupported"


# The importance matrix


def tensor(values: Any, name: str = "") -> tuple[importance.Tensor, Any]:
    """With the numbers that it has, which must live as long."""
    array = np.ascontiguousarray(values)
    shape = (*reversed(array.shape), 1, 1, 1, 1)[:4]
    steps = (*reversed(array.strides), *[array.nbytes] * 4)[:4]
    made = importance.Tensor(name=name.encode(), data=array.ctypes.data)
    made.ne[:], made.nb[:] = shape, steps
    return made, array


def product(*sources: Any) -> importance.Tensor:
    made = importance.Tensor()
    for place, source in enumerate(sources):
        made.src[place] = ctypes.pointer(source)
    return made


def test_squares_are_added_up_by_column() -> None:
    weights, _kept = tensor(np.zeros((4, 3), np.float32), "CUDA0#blk.0.attn_q.weight#0")
    rows, _kept2 = tensor(np.tile(np.array([1, 2, 3], np.float32), (16, 1)))
    sums = importance.Sums()
    step = product(weights, rows)
    assert importance._wanted(step, b"MUL_MAT") == "blk.0.attn_q.weight"
    for _ in range(2):
        importance._add(sums, "blk.0.attn_q.weight", step, b"MUL_MAT")
    assert sums.counts["blk.0.attn_q.weight"].tolist() == [32]
    assert sums.matrix()["blk.0.attn_q.weight"].tolist() == [1, 4, 9]


def test_products_of_few_rows_and_of_other_weights_do_not_count() -> None:
    rows, _kept = tensor(np.ones((15, 3), np.float32))
    layer, _kept2 = tensor(np.ones((4, 3), np.float32), "blk.0.attn_q.weight")
    output, _kept3 = tensor(np.ones((4, 3), np.float32), "output.weight")
    assert importance._wanted(product(layer, rows), b"MUL_MAT") is None
    assert importance._wanted(product(output, rows), b"MUL_MAT_ID") is None
    assert importance._wanted(product(layer, rows), b"ADD") is None


@pytest.mark.parametrize("is_shared", [True, False])
def test_each_expert_has_what_goes_to_it(is_shared: bool) -> None:
    """Two of three experts for each of two tokens: they get the token itself, or each its own."""
    weights, _kept = tensor(np.zeros((3, 4, 2), np.float32), "blk.1.ffn_up_exps.weight")
    tokens = np.array([[[1, 2]], [[3, 4]]] if is_shared else
                      [[[1, 2], [5, 6]], [[3, 4], [7, 8]]], np.float32)  # fmt: skip
    given, _kept2 = tensor(tokens)
    chosen, _kept3 = tensor(np.array([[0, 2], [2, 0]], np.int32))
    sums = importance.Sums()
    step = product(weights, given, chosen)
    assert importance._wanted(step, b"MUL_MAT_ID") == "blk.1.ffn_up_exps.weight"
    importance._add(sums, "w", step, b"MUL_MAT_ID")
    first, last = ([5, 10], [5, 10]) if is_shared else ([25, 34], [17, 26])
    # The one in the middle got nothing.
    assert sums.matrix()["w"].tolist() == [*first, 1, 1, *last]


def test_files_of_it_say_the_same(tmp_path: Path) -> None:
    matrix = {"blk.0.attn_q.weight": np.array([1, 4, 9], np.float32)}
    path = str(tmp_path / "matrix.gguf")
    importance.write(path, matrix, "default", 1234)
    read, tokens = importance.read(path)
    assert tokens == 1234
    assert {name: values.tolist() for name, values in read.items()} == {
        "blk.0.attn_q.weight": [1, 4, 9]
    }
    assert [one.name for one in tmp_path.iterdir()] == ["matrix.gguf"]
