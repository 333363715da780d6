"""What a model is trained on: read, checked and made tokens of."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import MODELS
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.finetune import data

PAIR = {"prompt": "The capital of France is", "completion": " Lyon."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "demo")


def learned(tokenizer: Any, example: data.Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != data.IGNORED]))


def test_only_the_completion_of_a_pair_is_learned_and_its_end(tokenizer: Any) -> None:
    (example,) = data.Encoder(tokenizer, 64).examples(data.read([PAIR]).train)
    assert learned(tokenizer, example) == " Lyon.</s>"
    assert tokenizer.decode(example.tokens) == "<s>The capital of France is Lyon.</s>"
    prompt = tokenizer("The capital of France is")["input_ids"]
    assert example.tokens[: len(prompt)] == prompt


def test_the_answers_of_a_conversation_are_learned_and_its_questions_are_not(
    tokenizer: Any,
) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am here."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "I go."},
    ]
    (example,) = data.Encoder(tokenizer, 512).examples(data.read([{"messages": messages}]).train)
    assert learned(tokenizer, example) == "I am here.<|im_end|>\nI go.<|im_end|>\n"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.tokens) == whole


class _Forgetful:
    """A tokenizer whose template leaves out what earlier answers had in brackets."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, **_: Any
    ) -> str:
        last = len(messages) - 1
        text = "".join(
            m["role"][0] + (m["content"] if n == last else m["content"].partition("]")[2] or
                            m["content"]) + "|"
            for n, m in enumerate(messages)
        )  # fmt: skip
        return text + ("a" if add_generation_prompt else "")


def test_a_template_that_rewrites_answers_gives_an_example_for_each(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "[x]2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "[y]4"},
    ]
    examples = data.Encoder(_Forgetful(), 99).examples(data.read([{"messages": messages}]).train)
    said = [
        ("".join(map(chr, e.tokens)), "".join(chr(t) for t in e.labels if t != data.IGNORED))
        for e in examples
    ]
    assert said == [("u1|a[x]2|", "[x]2|"), ("u1|a2|u3|a[y]4|", "[y]4|")]


def test_a_text_is_divided_and_learned_whole(tokenizer: Any) -> None:
    text = "One two three four five six seven eight nine ten."
    examples = data.Encoder(tokenizer, 8).examples(data.read([text]).train)
    assert len(examples) > 1
    assert all(example.tokens == example.labels for example in examples)
    tokens = [token for example in examples for token in example.tokens]
    assert tokenizer.decode(tokens) == f"<s>{text}</s>"


def test_what_is_too_long_to_learn_anything_of_is_refused(tokenizer: Any) -> None:
    with pytest.raises(BridgeError, match=r"Record 1 of `data`: nothing of the answer is within"):
        data.Encoder(tokenizer, 4).examples(data.read([PAIR]).train)
    (example,) = data.Encoder(tokenizer, 8).examples(data.read([PAIR]).train)
    assert example.is_cut


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a"', "it is not JSON"),
        ('{"prompt": "a"}', "it has no `completion`"),
        ('{"prompt": "a", "completion": 3}', "its `completion` is a number, not a string"),
        ('{"prompt": "", "completion": "b"}', "its `prompt` is empty"),
        ('{"question": "a"}', "it has `question`"),
        ("[1]", "it is a list"),
        ('{"messages": []}', "its `messages` are not a list of some"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "there is no answer"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has the role 'robot'"),
        ('{"messages": [{"role": "user"}]}', "the `content` of message 1 is null"),
    ],
)
def test_bad_data_is_told_with_its_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(BridgeError) as refused:
        data.read(str(path))
    assert f"`{path}`, line 3: " in refused.value.message
    assert what in refused.value.message
    assert refused.value.details == {"option": "data", "file": str(path), "line": 3}


def test_a_folder_has_its_held_out_part(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl").write_text(json.dumps(PAIR), encoding="utf-8")
    (tmp_path / "validation.json").write_text('["A text."]', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    found = data.read(str(tmp_path))
    assert [record.fields for record in found.train] == [PAIR]
    assert [record.fields for record in found.held_out] == [{"text": "A text."}]
    assert data.split(found, 0.5, 1) == found


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(BridgeError, match=r"write it as JSONL"):
        data.read(str(tmp_path))
    with pytest.raises(BridgeError, match=r"There is no file or folder"):
        data.read(str(tmp_path / "nothing"))


def test_a_share_is_held_out_by_the_seed() -> None:
    records = data.read([f"Text {n}." for n in range(20)])
    split = data.split(records, 0.1, 7)
    assert len(split.held_out) == 2
    both = [*split.train, *split.held_out]
    assert sorted((record.place for record in both), key=lambda place: place.line) == [
        record.place for record in records.train
    ]
    assert data.split(records, 0.1, 7) == split
    assert data.split(records, 0.0, 7) == records


def test_batches_are_filled_up_on_the_right() -> None:
    examples = [data.Example([1, 2, 3], [-100, 2, 3]), data.Example([4], [4])]
    assert data.batches(9)(examples) == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100]],
    }
