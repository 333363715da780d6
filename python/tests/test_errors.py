import ast
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import vllm_bridge
from vllm_bridge.errors import (
    REASONS,
    BridgeError,
    internal_error,
    map_exceptions,
    nearest,
    unknown_name,
)

ELIXIR_REASONS = Path(__file__).resolve().parents[2] / "lib" / "vllm" / "error" / "reasons.ex"


def test_both_sides_have_the_same_reasons() -> None:
    source = ELIXIR_REASONS.read_text(encoding="utf-8")
    table = source[source.index("@reasons [") : source.index("@spec")]
    assert set(re.findall(r"^    (\w+):", table, re.MULTILINE)) == REASONS


def test_an_error_has_a_known_reason() -> None:
    with pytest.raises(AssertionError):
        BridgeError("no_such_reason", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ("token hf_abcDEF123456789 here", "token [redacted] here"),
        (["hf_abcDEF123456789"], ["[redacted]"]),
        ({"a": {"hf_abcDEF123456789": None}}, {"a": {"[redacted]": None}}),
        (
            {"a": [{"api_key": ["x"], "max_tokens": 1}]},
            {"a": [{"api_key": "[redacted]", "max_tokens": 1}]},
        ),
        ({1: (2.5, True)}, {"1": [2.5, True]}),
        ({1}, [1]),
        (b"\x00", "b'\\x00'"),
    ],
)
def test_details_are_plain_data_without_secrets(value: Any, expected: Any) -> None:
    wire = BridgeError("internal", "", {"value": value}).to_wire()
    assert wire["details"] == {"value": expected}
    msgspec.msgpack.encode(wire)


def test_what_to_do_is_the_end_of_the_message_and_a_detail() -> None:
    error = BridgeError("internal", "It broke.", {"at": 1}, "Use hf_abcDEF123456789.")
    assert str(error) == error.message == "It broke. Use hf_abcDEF123456789."
    assert error.details == {"at": 1}
    assert error.to_wire() == {
        "reason": "internal",
        "message": "It broke. Use [redacted].",
        "details": {"at": 1, "remedy": "Use [redacted]."},
    }
    assert BridgeError("internal", "It broke.").to_wire()["details"] == {}


# Where models are looked at before they are loaded.
BEFORE_A_START = (
    *("checkpoints", "hub", "quantization", "sizing", "json_files.py", "params.py", "versions.py"),
    *("engine/plan.py", "engine/parallel.py", "engine/config.py", "engine/elsewhere.py"),
)


def test_what_is_wrong_with_a_model_has_what_to_do_about_it() -> None:
    package = Path(vllm_bridge.__file__).parent
    places = [package / name for name in BEFORE_A_START]
    files = [file for path in places for file in ([path] if path.is_file() else path.rglob("*.py"))]
    raised = [
        (f"{path.relative_to(package)}:{node.lineno}", _has_remedy(node))
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "BridgeError"
    ]
    assert len(raised) > 90
    assert [place for place, has_remedy in raised if not has_remedy] == []


def _has_remedy(call: ast.Call) -> bool:
    return len(call.args) == 4 or any(argument.arg == "remedy" for argument in call.keywords)


def test_nearest_names() -> None:
    assert nearest("quantisation", ["quantization", "tokenizer"]) == "quantization"
    assert nearest("TENSOR_PARALLEL", ["tensor_parallel_size"]) == "tensor_parallel_size"
    assert nearest("zzz", ["quantization"]) is None


def test_an_unknown_name() -> None:
    error = unknown_name("engine option", "quantisation", ["quantization"])
    assert error.reason == "invalid_option"
    assert error.message == "Unknown engine option `quantisation`. Did you mean `quantization`?"
    assert error.details == {"option": "quantisation", "nearest": "quantization"}


def test_exceptions_are_translated_and_bridge_errors_are_not() -> None:
    with pytest.raises(BridgeError) as caught, map_exceptions(internal_error):
        raise ZeroDivisionError("1/0")
    assert caught.value.reason == "internal"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError: 1/0" in caught.value.details["traceback"]

    original = BridgeError("timeout", "Late.")
    with pytest.raises(BridgeError) as caught, map_exceptions(internal_error):
        raise original
    assert caught.value is original
