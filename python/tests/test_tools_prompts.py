"""Prompts that an engine is measured with, from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.tools import prompts


def ask(path: Path, limit: int = 100) -> list[dict[str, Any]]:
    return prompts._read(str(path), limit)


def test_each_form_of_a_record_is_a_prompt_without_its_answer(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "I."}
    records: list[Any] = [
        {"prompt": "Say a", "completion": " b"},
        {"prompt": "Say c"},
        {"text": "Once"},
        "Twice",
        {"messages": [question, answer, question, answer], "tools": []},
        {"messages": [question]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert ask(path) == [
        {"prompt": "Say a"},
        {"prompt": "Say c"},
        {"prompt": "Once"},
        {"prompt": "Twice"},
        {"messages": [question, answer, question], "tools": []},
        {"messages": [question], "tools": None},
    ]
    assert ask(path, limit=2) == [{"prompt": "Say a"}, {"prompt": "Say c"}]


def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(BridgeError, match="line 2: it has `question`") as caught:
        ask(path)
    assert caught.value.details["option"] == "prompts"
