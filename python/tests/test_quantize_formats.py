"""What models can be made in, and what is refused before anything is made. Producers are made up:
those of the libraries are looked at where their environment is (``test_quantize_made.py``)."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import quantize
from vllm_bridge.jobs.quantize import formats
from vllm_bridge.jobs.quantize.calibration import Calibration, Texts
from vllm_bridge.jobs.quantize.producer import (
    Made,
    Option,
    Source,
    all_options,
    declared,
)
from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import NoParams

DEMO = Path(__file__).resolve().parents[2] / "priv" / "models" / "demo"


class MadeUp:
    """A producer that writes down what it was given."""

    NAME = "made-up"

    def options(self) -> dict[str, Option]:
        return {
            "bits": Option("bits", (int,), 4, (2, 4, 8)),
            "group_size": Option("group_size", (int,), 128),
            "sym": Option("sym", (bool,), True),
            "damp_percent": Option("damp_percent", (float,), 0.05),
            "kind": Option("kind", (str,), "Q4_K"),
        }

    def presets(self) -> dict[str, dict[str, Any]]:
        return {"Q8_0": {"bits": 8, "kind": "Q8_0"}}

    def texts(self, options: dict[str, Any]) -> str:
        return {2: "required", 4: "optional", 8: "unused"}[options["bits"]]

    def check(self, source: Source | None, options: dict[str, Any]) -> None:
        if source is not None and options["group_size"] == 7:
            raise BridgeError("unsupported", "Sevens do not divide.")

    def label(self, options: dict[str, Any]) -> str:
        return f"{options['kind']}-{options['bits']}bit"

    def make(
        self, source: Source, options: dict[str, Any], texts: Texts | None, out: str, tell: Any
    ) -> Made:
        if options["kind"] == "full":
            raise OSError(28, "No space left on device", out)
        if options["kind"] == "broken":
            raise RuntimeError("a kernel of this library is not here")
        tell("layers", 1, 2)
        Path(out, "weights").write_bytes(b"1234")
        source.copy_rest(out)
        tell("layers", 2, 2)
        rows = [] if texts is None else texts.ids(lambda text: {"input_ids": text.split()})
        return Made({"made-up": "1.0"}, {**options, "rows": len(rows)}, ("It was easy.",))


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.MODULES, "made-up", "made_up")
    monkeypatch.setitem(sys.modules, f"{quantize.__name__}.made_up", cast(Any, MadeUp()))


def refused(*outputs: Any, **others: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        formats.outputs(outputs, **others)
    return caught.value


def test_options_have_the_defaults_of_their_library_and_the_label_says_them() -> None:
    (one,) = formats.outputs([("made-up", {"bits": 8})])
    assert one.label == "Q4_K-8bit"
    assert one.options == {
        "bits": 8,
        "group_size": 128,
        "sym": True,
        "damp_percent": 0.05,
        "kind": "Q4_K",
    }
    assert one.to_wire()["texts"] == "unused"


def test_a_word_among_options_is_one_that_the_others_go_over() -> None:
    options = formats.output("made-up", {"preset": "q8_0", "sym": False}).options
    assert options == {**formats.output("made-up", "Q8_0").options, "sym": False}
    assert formats.output("made-up", {"preset": "Q8_0", "bits": 4}).options["bits"] == 4
    with pytest.raises(BridgeError, match="Did you mean `Q8_0`"):
        formats.output("made-up", {"preset": "Q8_1"})
    with pytest.raises(BridgeError, match="kind of"):
        formats.output("made-up", {"preset": 8})


def test_all_that_can_be_made_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'unheard_of'", name="unheard_of")

    monkeypatch.setattr(formats, "MODULES", {"made-up": "made_up", "lacking": "lacking"})
    made_up, other = MadeUp(), MadeUp()
    other.options = lacking  # type: ignore[method-assign, assignment]
    producers = {"made-up": made_up, "lacking": other}
    monkeypatch.setattr(formats, "producer", producers.__getitem__)
    described, refused = asyncio.run(quantize.quantize_options(cast(Call, None), NoParams()))
    assert (described["format"], described["types"]) == ("made-up", ["Q8_0"])
    bits = {"name": "bits", "types": ["int"], "default": 4, "allowed": [2, 4, 8], "doc": ""}
    assert described["options"][0] == bits
    assert described["refused"] is None
    assert (refused["options"], refused["types"]) == ([], [])
    assert "lacks `unheard_of`" in refused["refused"]


def test_a_word_stands_for_options() -> None:
    (one,) = formats.outputs([("made-up", "q8_0")])
    assert one.options["bits"] == 8
    assert one.label == "Q8_0-8bit"
    error = refused(("made-up", "Q8_1"))
    assert error.reason == "invalid_option"
    assert error.message == "Unknown kind of made-up `Q8_1`. Did you mean `Q8_0`? There are: Q8_0."


def test_an_output_may_be_called_otherwise() -> None:
    (one,) = formats.outputs([("made-up", {"as": "mine"})])
    assert one.label == "mine"
    for name in ("../up", "", ".hidden", "a/b", 7):
        error = refused(("made-up", {"as": name}))
        assert error.details == {"option": "as", "value": name}


def test_formats_are_found_in_any_spelling_and_unknown_ones_get_the_nearest() -> None:
    assert formats.producer("Made_Up").NAME == "made-up"
    assert formats.producer("BNB").NAME == "bitsandbytes"
    error = refused(("hgq", {}))
    assert error.message.startswith("Unknown format `hgq`. Did you mean `hqq`? Models are made in:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, "Unknown option of made-up `bit`. Did you mean `bits`?"),
        ({"bits": 5}, "`bits` is 5, not one of 2, 4, 8."),
        ({"bits": True}, "`bits` is True, not one of 2, 4, 8."),
        ({"group_size": "128"}, "`group_size` is '128', not an integer."),
        ({"sym": 1}, "`sym` is 1, not true or false."),
        ({"damp_percent": None}, "`damp_percent` is None, not a number."),
    ],
)
def test_an_option_that_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    error = refused(("made-up", options))
    assert error.reason == "invalid_option"
    assert error.message == message


def test_whole_numbers_are_numbers() -> None:
    assert all_options(MadeUp(), {"damp_percent": 1})["damp_percent"] == 1.0  # type: ignore[arg-type]


def test_two_outputs_cannot_have_one_label() -> None:
    error = refused(("made-up", {}), ("made-up", {"as": "q4_k-4BIT"}))
    assert "Two outputs would be called" in error.message
    assert len(formats.outputs([("made-up", {}), ("made-up", {"as": "other"})])) == 2


def test_nothing_to_make_is_refused() -> None:
    assert refused().details["option"] == "to"


def test_what_the_library_cannot_do_with_the_model_is_refused() -> None:
    source = Source(str(DEMO))
    assert refused(("made-up", {"group_size": 7}), source=source).reason == "unsupported"
    assert formats.outputs([("made-up", {"group_size": 7})])[0].options["group_size"] == 7


def test_only_plain_models_in_safetensors_are_quantized(tmp_path: Path) -> None:
    error = refused(("made-up", {}), source=Source(str(DEMO.parent / "demo-awq")))
    assert error.reason == "unsupported"
    assert "quantized already, with awq" in error.message
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert "not a folder" in refused(("made-up", {}), source=Source(str(file))).message
    assert refused(("made-up", {}), source=Source("/nowhere")).reason == "unsupported"


def test_texts_that_nothing_is_calibrated_with_are_refused() -> None:
    texts = Calibration(texts=["One."])
    error = refused(("made-up", {"bits": 8}), texts=texts)
    assert error.details["option"] == "calibration"
    assert formats.outputs([("made-up", "Q8_0"), ("made-up", {})], None, texts)


def make(tmp_path: Path, **params: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []

    class Channel:
        def notify(self, method: str, params: dict[str, Any]) -> None:
            assert method == "progress"
            told.append(params)

        def emit(self, row: Any) -> None: ...

        def pack(self, id: int, text: str, token_ids: Any) -> None: ...

        def engine_died(self) -> None: ...

    given = {"source": str(DEMO), "format": "made-up", "out": str(tmp_path / "out")} | params
    asked = msgspec.convert(given, quantize.QuantizeParams)
    return asyncio.run(quantize.quantize(Call(3, Channel()), asked)), told


def test_an_output_is_made_and_told_of(tmp_path: Path) -> None:
    made, told = make(tmp_path, options={"bits": 2})
    assert (made["format"], made["label"]) == ("made-up", "Q4_K-2bit")
    assert made["calibration"]["source"] == "default"
    assert made["calibration"]["texts"] > 30
    assert made["calibration"]["tokens"] > 1000
    assert made["libraries"] == {"made-up": "1.0"}
    assert made["notes"] == ["It was easy."]
    out = tmp_path / "out"
    assert made["files"] == {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    assert "tokenizer.json" in made["files"]
    assert not {"model.safetensors", "config.json"} & made["files"].keys()
    assert made["bytes"] == sum(made["files"].values())
    assert made["peak_memory_bytes"] > 2**20
    layers = [(one["done"], one["total"]) for one in told if one["phase"] == "layers"]
    assert layers[-1] == (2, 2)
    assert {one["id"] for one in told} == {3}


@pytest.mark.parametrize(
    ("bits", "calibration", "source"),
    [(4, None, None), (4, {"texts": ["One two."]}, "list"), (2, {"texts": ["One."]}, "list")],
)
def test_optional_texts_are_used_where_they_are_given(
    tmp_path: Path, bits: int, calibration: Any, source: str | None
) -> None:
    made, _ = make(tmp_path, options={"bits": bits}, calibration=calibration)
    assert (made["calibration"] or {}).get("source") == source
    assert made["options"]["rows"] == (0 if source is None else 1)


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        ("full", "disk_full", "full"),
        ("broken", "unsupported", "RuntimeError: a kernel of this library is not here"),
    ],
)
def test_nothing_is_left_of_an_output_that_failed(
    tmp_path: Path, kind: str, reason: str, words: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        make(tmp_path, options={"kind": kind})
    assert caught.value.reason == reason
    assert words in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_options_are_read_from_what_a_library_declares() -> None:
    def library(
        bits: int = 4, group: int | None = 64, path: Path | None = None, *, hidden: bool = False
    ) -> None: ...

    found = declared(library, without=("hidden",), bits={"allowed": (2, 4)})
    assert found == {
        "bits": Option("bits", (int,), 4, (2, 4)),
        "group": Option("group", (int,), 64),
        "path": Option("path", (), None),
    }


def test_answers_can_travel() -> None:
    wire = formats.output("made-up", {}).to_wire()
    assert json.loads(json.dumps(wire)) == wire
