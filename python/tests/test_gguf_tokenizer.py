"""The tokenizers of GGUF files against llama.cpp's: its ids are in gguf_tokenizers.json, which
scripts/gguf_tokenizers.py has written."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.gguf import tokenizer
from vllm_bridge.quantization.gguf.pre_tokenizers import PRE_TOKENIZERS

REFERENCE = json.loads(Path(__file__).with_name("gguf_tokenizers.json").read_text(encoding="utf-8"))

# llama.cpp has no pattern with upper and lower case letters and takes a stand-in, to which a
# letter with a combining mark is none. The models' own patterns, which are ours, know marks.
STAND_INS = ("tekken", "gpt-4o")


def metadata(vocabulary: str, **changes: Any) -> dict[str, Any]:
    fields = REFERENCE["vocabularies"][vocabulary] | changes
    return {
        key if "." in key else f"tokenizer.ggml.{key}": value
        for key, value in fields.items()
        if value is not None
    }


def read(found: tokenizer.Files) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(found.tokenizer)


def marked(text: str) -> bool:
    return any(unicodedata.category(each).startswith("M") for each in text)


@pytest.mark.parametrize(
    "case",
    REFERENCE["cases"],
    ids=lambda case: " ".join([case["vocabulary"], *map(str, case["changes"].values())]),
)
def test_ids_are_those_of_llama_cpp(case: dict[str, Any]) -> None:
    said = metadata(case["vocabulary"], **case["changes"])
    built = read(tokenizer.files("a.gguf", said))
    compared = 0
    for text, ids in zip(REFERENCE["texts"], case["ids"], strict=True):
        if case["changes"].get("pre") in STAND_INS and marked(text):
            continue
        assert built.encode(text).ids == ids, text
        compared += 1
    assert compared >= len(REFERENCE["texts"]) - 4
    assert tokenizer.generation_config(said)["eos_token_id"] == case["ends"]


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece", "characters", "demo"])
def test_texts_come_back_as_they_were(vocabulary: str) -> None:
    built = read(tokenizer.files("a.gguf", metadata(vocabulary)))
    for text in REFERENCE["texts"]:
        if "<" not in text:
            assert built.decode(built.encode(text).ids) == text


def test_the_reference_tells_pre_tokenizers_apart() -> None:
    ids = {
        PRE_TOKENIZERS[case["changes"]["pre"]]: json.dumps(case["ids"])
        for case in REFERENCE["cases"]
        if case["changes"].keys() == {"pre"}
    }
    assert ids.keys() == set(PRE_TOKENIZERS.values())
    assert len(set(ids.values())) == len(ids)


def test_a_tokenizer_has_the_entries_of_the_file_and_its_special_tokens() -> None:
    said = metadata("demo") | {"general.architecture": "llama", "llama.context_length": 8192}
    found = tokenizer.files("a.gguf", said)
    assert read(found).get_vocab_size() == len(said["tokenizer.ggml.tokens"]) == 1024
    assert found.config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }


def test_all_tokens_that_end_an_answer_are_in_the_generation_config() -> None:
    said = metadata("demo") | {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    names = said["tokenizer.ggml.tokens"]
    found = tokenizer.generation_config(said)
    assert [names[number] for number in found.pop("eos_token_id")] == ["</s>", "<|im_end|>"]
    assert found == {"temperature": 0.6, "top_k": 20}
    said["tokenizer.ggml.eot_token_id"] = names.index("<think>")
    assert names.index("<think>") in tokenizer.generation_config(said)["eos_token_id"]


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (("<|return|>", "<|call|>", "<|end|>"), ("<|return|>", "<|call|>")),
        (("<|flush|>", "<|calls|>", "<|end|>"), ("<|flush|>", "<|calls|>")),
        (("<|flush|>", "<|end|>"), ("<|flush|>", "<|end|>")),
        (("<|tool_response>", "</s>", "<eos>"), ("<|tool_response>", "<eos>")),
        (("<|fim_pad|>", "<|file_sep|>", "<|fim_prefix|>"), ("<|fim_pad|>", "<|file_sep|>")),
    ],
)
def test_an_end_may_be_one_of_a_part_only(tokens: tuple[str, ...], ends: tuple[str, ...]) -> None:
    found = tokenizer.generation_config({"tokenizer.ggml.tokens": tokens})
    assert [tokens[number] for number in found["eos_token_id"]] == list(ends)


def test_an_end_is_found_in_a_text_also_where_the_file_calls_it_normal() -> None:
    said = metadata("bytes")
    end = said["tokenizer.ggml.tokens"].index("<|im_end|>")
    said["tokenizer.ggml.token_type"] = [
        1 if number == end else kind
        for number, kind in enumerate(said["tokenizer.ggml.token_type"])
    ]
    built = read(tokenizer.files("a.gguf", said))
    assert built.encode("<|im_end|>").ids == [end]


def test_chat_templates_are_taken_over_by_their_names() -> None:
    said = metadata("demo") | {"tokenizer.chat_template": "{{ messages }}"}
    assert tokenizer.files("a.gguf", said).config["chat_template"] == "{{ messages }}"
    said["tokenizer.chat_templates"] = ("tool_use",)
    said["tokenizer.chat_template.tool_use"] = "{% generation %}{{ tools }}{% endgeneration %}"
    assert tokenizer.files("a.gguf", said).config["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "{% generation %}{{ tools }}{% endgeneration %}"},
    ]


@pytest.mark.parametrize(
    ("vocabulary", "changes", "words"),
    [
        ("demo", {"model": None}, "it has no `tokenizer.ggml.model`"),
        ("demo", {"tokens": None}, "it has no tokens"),
        ("demo", {"tokens": []}, "it has no tokens"),
        ("demo", {"tokens": [1, 2]}, "its `tokenizer.ggml.tokens` are not what they should be"),
        ("demo", {"tokens": ["a", "b", "a"]}, "the token 'a' is there twice"),
        ("demo", {"token_type": [1, 1]}, "1024 tokens and 2 `tokenizer.ggml.token_type`"),
        ("demo", {"merges": None}, "it has no `tokenizer.ggml.merges`"),
        ("demo", {"merges": ["a b c d"]}, "its merge 'a b c d' is not of two tokens to a third"),
        ("demo", {"merges": ["ab"]}, "its merge 'ab' is not"),
        ("demo", {"bos_token_id": 1024}, "`tokenizer.ggml.bos_token_id` is 1024, and it has 1024"),
        ("demo", {"eot_token_id": 4096}, "`tokenizer.ggml.eot_token_id` is 4096"),
        ("demo", {"eos_token_id": "2"}, "`tokenizer.ggml.eos_token_id` is '2'"),
        ("demo", {"bos_token_id": None}, "no `tokenizer.ggml.bos_token_id` says which"),
        ("sentencepiece", {"scores": None}, "it has no `tokenizer.ggml.scores`"),
        ("sentencepiece", {"scores": [0.5]}, "and 1 `tokenizer.ggml.scores`"),
        ("unigram", {"unknown_token_id": 100_000}, "`tokenizer.ggml.unknown_token_id` is 100000"),
        ("unigram", {"precompiled_charsmap": [1, 2, 3]}, "precompiled_charsmap` is cut short"),
        ("unigram", {"precompiled_charsmap": 7}, "`tokenizer.ggml.precompiled_charsmap` are not"),
        ("demo", {"pre": ["qwen2"]}, "it has no `tokenizer.ggml.pre`"),
        ("demo", {"tokenizer.chat_template": "{% if %}"}, "(`tokenizer.chat_template`)"),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(
    vocabulary: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BridgeError) as refused:
        tokenizer.files("a.gguf", metadata(vocabulary, **changes))
    assert refused.value.reason == "invalid_checkpoint"
    assert words in refused.value.message
    assert "by the option `tokenizer`" in refused.value.message


def test_types_and_scores_of_tokens_that_there_are_not_are_left_out() -> None:
    said = metadata("sentencepiece")
    longer = {
        f"tokenizer.ggml.{key}": [*said[f"tokenizer.ggml.{key}"], 1]
        for key in ("scores", "token_type")
    }
    assert tokenizer.files("a.gguf", said | longer) == tokenizer.files("a.gguf", said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "rwkv"}, "a tokenizer that is not known here: 'rwkv'. Known are gemma4, gpt2,"),
        ({"pre": "made-up"}, "a pre-tokenizer that is not known here: 'made-up'. Known are"),
    ],
)
def test_an_unknown_kind_is_refused_with_those_that_are_known(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BridgeError) as refused:
        tokenizer.files("a.gguf", metadata("demo", **changes))
    assert refused.value.reason == "unsupported"
    assert words in refused.value.message
    assert "by the option `tokenizer`" in refused.value.message
