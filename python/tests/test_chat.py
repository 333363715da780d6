import asyncio
import types
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from conftest import MODELS
from vllm_bridge.chat import Chat, ChatParams, ChatTemplateParams, Conversation, tool_call
from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.protocol import Response, encode, unpack_u32
from vllm_bridge.stream import MessageDelta

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

HELLO = [{"role": "user", "content": "Hello!"}]
PROMPT = "<s><|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def run() -> Iterator[Run[Any]]:
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


@pytest.fixture(scope="module")
def chat() -> Chat:
    """The chat of the demo model, of which only the weights are not there."""
    config = AsyncEngineArgs(
        model=str(MODELS / "demo"), max_model_len=256, enforce_eager=True
    ).create_engine_config()
    return Chat(
        types.SimpleNamespace(
            vllm_config=config,
            model_config=config.model_config,
            renderer=renderer_from_config(config),
        )
    )


@pytest.fixture
def render(chat: Chat, run: Run[Conversation]) -> Callable[..., Conversation]:
    def render(sampling_params: Any = None, **params: Any) -> Conversation:
        return run(chat.render(ChatParams(**{"messages": HELLO} | params), sampling_params))

    return render


@pytest.fixture
def refused(render: Callable[..., Conversation]) -> Callable[..., BridgeError]:
    def refused(**params: Any) -> BridgeError:
        with pytest.raises(BridgeError) as caught:
            render(**params)
        return caught.value

    return refused


def completion(text: str) -> Any:
    return types.SimpleNamespace(index=0, text=text, token_ids=[5, 6])


def test_a_conversation_becomes_the_prompt_of_the_models_template(
    chat: Chat, run: Run[Conversation]
) -> None:
    conversation = run(chat.render(ChatTemplateParams(messages=HELLO)))
    rendered = conversation.rendered()
    assert rendered["prompt"] == PROMPT
    ids = unpack_u32(rendered["prompt_token_ids"])
    # <s> <|im_start|> … <|im_end|> … <|im_start|>: one token each, and only one <s>.
    assert ids[:2] == [0, 3]
    assert [ids.count(token) for token in (0, 3, 4)] == [1, 2, 1]


def test_the_prompt_ends_as_asked_for(render: Callable[..., Conversation]) -> None:
    said = [*HELLO, {"role": "assistant", "content": "Hello! How"}]
    open_end = render(messages=said, continue_final_message=True)
    assert open_end.prompt_text.endswith("<|im_start|>assistant\nHello! How")
    assert render(add_generation_prompt=False).prompt_text.endswith("Hello!<|im_end|>\n")
    assert open_end.message(completion(" can I"))["role"] == "assistant"


def test_a_template_of_the_callers_own_gets_its_variables(
    render: Callable[..., Conversation],
) -> None:
    conversation = render(
        chat_template="{{ mood }}: {{ messages[0].content }}",
        chat_template_kwargs={"mood": "glad", "nobody": "asks"},
    )
    assert conversation.prompt_text == "glad: Hello!"


def test_tools_and_their_calls_are_part_of_the_prompt(render: Callable[..., Conversation]) -> None:
    messages = [
        {"role": "user", "content": "The weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "They ask.",
            "tool_calls": [
                {
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "Rain."},
    ]
    text = render(messages=messages, tools=[WEATHER]).prompt_text
    assert '"name": "get_weather"' in text.partition("\n</tools>")[0]
    assert CALL in text
    assert "<tool_response>\nRain.\n</tool_response>" in text


def test_a_tool_call_is_parsed(render: Callable[..., Conversation]) -> None:
    conversation = render(tools=[WEATHER], tool_call_parser="hermes")
    message = conversation.message(completion("Let me see.\n" + CALL))
    (call,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": "Let me see.\n", "reasoning": None}
    assert call.pop("id")
    assert call == {
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
        "parsed": {"city": "Paris"},
    }


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"tools": [WEATHER]},
        {"tool_call_parser": "hermes"},
        {"tools": [WEATHER], "tool_call_parser": "hermes", "tool_choice": "none"},
    ],
)
def test_without_tools_or_parser_or_choice_a_call_is_text(
    render: Callable[..., Conversation], params: dict[str, Any]
) -> None:
    assert render(**params).message(completion(CALL)) == {
        "role": "assistant",
        "content": CALL,
        "reasoning": None,
        "tool_calls": [],
    }


def test_reasoning_is_parsed_of_each_answer_anew(render: Callable[..., Conversation]) -> None:
    conversation = render(
        tools=[WEATHER], tool_call_parser="hermes", reasoning_parser="deepseek_r1"
    )
    for _ in range(2):
        message = conversation.message(completion(f"<think>Rain?</think>{CALL}"))
        assert message["reasoning"] == "Rain?"
        assert message["content"] is None
        assert message["tool_calls"][0]["parsed"] == {"city": "Paris"}
    assert conversation.engine_arguments() == {
        "reasoning_ended": False,
        "reasoning_parser_kwargs": {
            "chat_template_kwargs": {
                "add_generation_prompt": True,
                "continue_final_message": False,
            }
        },
    }


def streamed(conversation: Conversation, text: str, at_once: int) -> list[MessageDelta]:
    """The deltas of a text that comes ``at_once`` tokens at a time."""
    tokenizer = conversation._renderer.renderer.get_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = []
    for start in range(0, len(ids), at_once):
        end = min(start + at_once, len(ids))
        step = types.SimpleNamespace(
            index=0,
            text=tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :],
            token_ids=ids[start:end],
            finish_reason="stop" if end == len(ids) else None,
        )
        deltas.append(conversation.deltas(types.SimpleNamespace(outputs=[step]))[0])
    return deltas


# vLLM merges the tokens that nobody took in time, so they come one by one or many at once.
@pytest.mark.parametrize("at_once", [*range(1, 24), 1000])
def test_a_streamed_answer_is_parsed_as_it_comes(
    render: Callable[..., Conversation], at_once: int
) -> None:
    conversation = render(
        tools=[WEATHER], tool_call_parser="hermes", reasoning_parser="deepseek_r1"
    )
    text = f"<think>Rain, or not?</think>Let me see.\n{CALL}"
    whole = MessageDelta()
    deltas = streamed(conversation, text, at_once)
    for delta in deltas:
        whole.add(delta)
    if at_once == 1:
        assert sum(delta != MessageDelta() for delta in deltas) > 5
    assert whole.reasoning == "Rain, or not?"
    assert whole.content.strip() == "Let me see."
    assert whole.tool_calls[0].name == "get_weather"
    assert whole.tool_calls[0].arguments == '{"city": "Paris"}'
    # The message in the end is that of an answer in one piece, with the call's id of the stream.
    message = conversation.message(completion(text))
    assert message["reasoning"] == "Rain, or not?"
    assert message["tool_calls"][0]["id"] == whole.tool_calls[0].id


def test_without_a_parser_a_stream_is_content(render: Callable[..., Conversation]) -> None:
    step = types.SimpleNamespace(index=1, text="a", token_ids=[5], finish_reason=None)
    conversation = render()
    for _ in range(2):
        output = types.SimpleNamespace(outputs=[step])
        assert conversation.deltas(output) == {1: MessageDelta("a")}


def test_a_forced_call_constrains_the_sampling(render: Callable[..., Conversation]) -> None:
    sampling = SamplingParams(max_tokens=5)
    render(sampling, tools=[WEATHER], tool_call_parser="hermes", tool_choice="required")
    assert "get_weather" in sampling.structured_outputs.structural_tag
    assert sampling.skip_special_tokens is False
    assert sampling.max_tokens == 5


def test_sampling_is_left_alone_where_no_parser_asks(render: Callable[..., Conversation]) -> None:
    outputs = StructuredOutputsParams(regex="a+")
    sampling = SamplingParams(structured_outputs=outputs, skip_special_tokens=True)
    render(sampling, tools=[WEATHER])
    assert sampling.structured_outputs.regex == "a+"
    assert sampling.skip_special_tokens is True
    assert render().engine_arguments() == {"reasoning_ended": None}


@pytest.mark.parametrize(
    ("option", "name", "suggestion"),
    [
        ("tool_call_parser", "hermez", "hermes"),
        ("reasoning_parser", "deepseek_r2", "deepseek_r1"),
        ("reasoning_parser", "zzz", None),
    ],
)
def test_an_unknown_parser_is_refused_with_the_nearest(
    refused: Callable[..., BridgeError], option: str, name: str, suggestion: str | None
) -> None:
    error = refused(**{option: name})
    assert error.reason == "invalid_option"
    assert error.details["option"] == option
    assert error.details["nearest"] == suggestion
    assert (f"Did you mean `{suggestion}`?" in error.message) == (suggestion is not None)
    assert len(error.details["allowed"]) > 5
    assert all(allowed in error.message for allowed in error.details["allowed"])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "A conversation is a list of messages"),
        ([], "at least one"),
        ({"role": "user", "content": "x"}, "A conversation is a list of messages"),
        (["Hello!"], "Message 0 is not a map"),
        ([*HELLO, {"content": "x"}], "Message 1 has no `role`"),
        ([{"role": 7, "content": "x"}], "Message 0 has no `role`"),
        ([{"role": "user"}], "Message 0 has neither `content` nor `tool_calls`"),
        ([{"role": "user", "content": 7}], "Message 0 has a `content` that is neither"),
        ([{"role": "assistant", "tool_calls": "x"}], "Message 0 has `tool_calls` that are not"),
        ([{"role": "user", "content": [7]}], "Message 0 has a part of `content`"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "not of a shape"),
        ([{"role": "user", "content": "x", "name": 7}], "Message 0 is not of a shape"),
    ],
)
def test_a_bad_message_is_named(
    refused: Callable[..., BridgeError], messages: Any, words: str
) -> None:
    error = refused(messages=messages)
    assert error.reason == "invalid_prompt"
    assert words in error.message


@pytest.mark.parametrize(
    ("params", "option", "words"),
    [
        ({"chat_template": "{% if %}"}, "chat_template", "Expected an expression"),
        (
            {"chat_template": "{{ raise_exception('No users.') }}"},
            "chat_template",
            "does not render these messages: No users.",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.function: Field required"),
        (
            {"tools": [{"type": "function"}], "tool_choice": {"function": {"name": "a"}}},
            "tools",
            "a tool without 'function'",
        ),
    ],
)
def test_a_bad_option_is_named(
    refused: Callable[..., BridgeError], params: dict[str, Any], option: str, words: str
) -> None:
    error = refused(**params)
    assert error.reason == "invalid_option"
    assert error.details["option"] == option
    assert words in error.message


def test_what_the_models_own_template_refuses_is_the_messages_fault(
    chat: Chat, run: Run[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat._llm.renderer.get_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('No users.') }}")
    with pytest.raises(BridgeError, match="refuses these messages: No users") as caught:
        run(chat.render(ChatParams(messages=HELLO)))
    assert caught.value.reason == "invalid_prompt"


def test_a_model_without_a_template_needs_one(
    chat: Chat, run: Run[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat._llm.renderer.get_tokenizer(), "chat_template", None)
    with pytest.raises(BridgeError, match="no chat template") as caught:
        run(chat.render(ChatParams(messages=HELLO)))
    assert caught.value.details == {"option": "chat_template"}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"city": "Köln", "days": [1, 2.5, null]}', {"city": "Köln", "days": [1, 2.5, None]}),
        ("{}", {}),
        ("", None),
        ('{"city": ', None),
        ("[1]", None),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
        ('{"a": 18446744073709551615}', {"a": 2**64 - 1}),
        ('{"a": 18446744073709551616}', None),
        ('{"a": ' + "[" * 63 + "]" * 63 + "}", ...),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", None),
        ('{"a": ' + "[" * 100_000, None),
        ('{"a": "\ud800"}', {"a": "?"}),
    ],
)
def test_arguments_are_decoded_where_they_are_an_object(arguments: str, parsed: Any) -> None:
    call = tool_call("call-1", "f", arguments)
    if parsed is ...:
        assert isinstance(call["parsed"], dict)
    else:
        assert call["parsed"] == parsed
    # Whatever a model writes, the answer can be sent.
    assert encode(Response(7, None, call))
