"""What a text says as JSON."""

from typing import Any

import pytest

from vllm_bridge.outputs import add_parsed


def parsed(text: str, **completion: Any) -> Any:
    output = add_parsed({"outputs": [{"text": text, **completion}]})
    return output["outputs"][0]["parsed"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, null, true]}', {"a": [1, None, True]}),
        (' "text" ', "text"),
        ("12", 12),
        (str(2**64 - 1), 2**64 - 1),
        (str(2**64), float(2**64)),
        (str(-(2**63) - 1), float(-(2**63) - 1)),
    ],
)
def test_json_is_parsed_into_what_messagepack_has(text: str, value: Any) -> None:
    assert parsed(text) == value


@pytest.mark.parametrize("text", ["", "{", '{"a": ', "no json", "[" * 100_000])
def test_what_is_no_json_is_none(text: str) -> None:
    assert parsed(text) is None


def test_of_an_answer_the_content_counts() -> None:
    assert parsed("<think>hm</think>[1]", message={"content": "[1]"}) == [1]
    assert parsed("call", message={"content": None}) is None
