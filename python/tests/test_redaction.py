"""Errors tell no secrets."""

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest

from vllm_bridge import diagnosis, params
from vllm_bridge.errors import BridgeError
from vllm_bridge.redaction import NAMES, is_secret, redact

ELIXIR = Path(__file__).resolve().parents[2] / "lib" / "vllm" / "secrets.ex"


def test_both_sides_take_the_same_names_for_secrets() -> None:
    found = re.search(r"@secret ~r/(.*)/i", ELIXIR.read_text(encoding="utf-8"))
    assert found is not None
    assert found[1] == NAMES


@pytest.mark.parametrize("name", ["hf_token", "apiKey", "AWS_SECRET_ACCESS_KEY", "env", "db.pwd"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "environment", "key", "compass"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_the_users_own_token_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-form")
    assert redact("It is a-token-of-no-known-form!") == "It is [redacted]!"
    monkeypatch.setenv("HF_TOKEN", "")
    assert redact("nothing to hide") == "nothing to hide"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'api_key': 'k', 'depth': 2}", "{'api_key': [redacted], 'depth': 2}"),
        ('{"a": {"api_key": "it\'s", "b": 1}}', '{"a": {"api_key": [redacted], "b": 1}}'),
        (r"{'password': 'a\'b', 'b': 1}", "{'password': [redacted], 'b': 1}"),
        ("Config(api_key=b'k', n=1)", "Config(api_key=[redacted], n=1)"),
        ("Config(password=s3cr3t, n=1)", "Config(password=[redacted], n=1)"),
        ("{'env': {'A': '}', 'B': ['b']}, 'n': 1}", "{'env': [redacted], 'n': 1}"),
        ("{'credentials': ('user', 'pwd'", "{'credentials': [redacted]"),
        ("{'api_key': 'cut of", "{'api_key': [redacted]"),
        ("Authorization: Bearer abc.def==", "Authorization: Bearer [redacted]"),
        ("{'max_tokens': 5, 'tokenizer': 't'}", "{'max_tokens': 5, 'tokenizer': 't'}"),
        ("Unexpected token: '<' at 3", "Unexpected token: '<' at 3"),
    ],
)
def test_values_that_stand_by_the_name_of_a_secret(text: str, expected: str) -> None:
    assert redact(text) == expected


class Nested(pydantic.BaseModel):
    depth: int
    extra: dict[str, int]


def test_what_pydantic_shows_of_its_input() -> None:
    # It cuts its input in the middle, so that the name of a secret may be gone.
    given: dict[str, Any] = {"a" * 40: "b" * 40, "api_key": "abcdefgh", "depth": "x", "extra": 1}
    with pytest.raises(pydantic.ValidationError) as caught:
        Nested.model_validate([given])
    assert "input_value=[{" in str(caught.value)
    redacted = redact(str(caught.value))
    assert "input_value=[redacted], input_type=list" in redacted
    assert "efgh" not in redacted


def wire_of(error: BridgeError) -> str:
    return str(error.to_wire())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hf_token", ["abcdefgh"]),
        ("compilation_config", {"mode": {"api_key": "abcdefgh"}}),
        ("compilation_config", [{"env": {"A": "abcdefgh"}}]),
        ("pooler_config", {"task": {"headers": [{"password": "abcdefgh"}]}}),
        ("max_model_len", {"credentials": "abcdefgh"}),
    ],
)
def test_options_that_are_refused_tell_no_secret(option: str, value: Any) -> None:
    with pytest.raises(BridgeError) as caught:
        params.engine_options({option: value})
    assert caught.value.details["option"] == option
    assert "abcdefgh" not in wire_of(caught.value)


def test_neither_does_what_vllm_raises_at_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Nested.model_validate({"extra": {"api_key": "abcdefgh"}})
    monkeypatch.setattr(diagnosis, "_LOG_PATIENCE_SECONDS", 0)
    for error in (caught.value, RuntimeError(str(caught.value))):
        assert "abcdefgh" not in wire_of(diagnosis.load_error(error))
        assert "abcdefgh" not in wire_of(diagnosis.request_error(error, 8, []))
