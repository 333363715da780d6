"""Conversations: their messages to a prompt, and the model's answer to a message.

Both ways are those of vLLM's own server. A conversation becomes its ``ChatCompletionRequest``,
which its renderer turns into a prompt by the chat template and its parsers adjust (a forced tool
call constrains the output, say); what the model wrote goes through the same parsers. They only
see as much of the request as they need: how to sample is the caller's ``SamplingParams``.
"""

import contextlib
from typing import Annotated, Any

import msgspec
import pydantic

from vllm_bridge import tokenization
from vllm_bridge.errors import BridgeError, nearest
from vllm_bridge.lora import LoRA
from vllm_bridge.rpc.protocol import pack_u32
from vllm_bridge.stream import MessageDelta, ToolCallDelta

# What vLLM's parsers change of a request that is a matter of sampling.
_SAMPLING = ("structured_outputs", "skip_special_tokens", "spaces_between_special_tokens")

# How deep the decoded arguments of a tool call may be nested; deeper ones stay text.
_MAX_DEPTH = 64


class ChatTemplateParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The params of ``apply_chat_template``; see guides/protocol.md."""

    messages: Any = None
    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] | None = None


class ChatParams(ChatTemplateParams):
    """The params of ``chat``."""

    tool_choice: str | dict[str, Any] | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    sampling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    lora_request: LoRA | None = None
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None
    credit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    parse: bool = False


class Conversation:
    """A conversation, rendered, whose answer is to come.

    Args:
        request: vLLM's ``ChatCompletionRequest``, as its parsers left it
        renderer: vLLM's ``OnlineRenderer`` that rendered it
        prompt: as ``AsyncLLM.generate`` takes it
    """

    def __init__(self, request: Any, renderer: Any, prompt: Any) -> None:
        self.prompt = prompt
        self.prompt_token_ids: list[int] = list(prompt.get("prompt_token_ids") or [])
        self._request = request
        self._renderer = renderer
        # Of a stream: the parser of each completion, and the ids of its tool calls by their index.
        self._streams: dict[int, tuple[Any, dict[int, str]]] = {}

    @property
    def prompt_text(self) -> str:
        text = self.prompt.get("prompt")
        if text is None:
            # Some models' messages become tokens without a text in between.
            text = self._renderer.renderer.get_tokenizer().decode(self.prompt_token_ids)
        return str(text)

    def rendered(self) -> dict[str, Any]:
        """The result of ``apply_chat_template``."""
        return {"prompt": self.prompt_text, "prompt_token_ids": pack_u32(self.prompt_token_ids)}

    def adjust(self, sampling_params: Any) -> None:
        """Has the parsers' part in how the answer is sampled go into the ``SamplingParams``."""
        for name in _SAMPLING:
            setattr(sampling_params, name, getattr(self._request, name))

    def engine_arguments(self) -> dict[str, Any]:
        """What ``AsyncLLM.generate`` is to know of the reasoning, which structured outputs leave
        out where the engine has a reasoning parser too."""
        parser = self._parser()
        arguments: dict[str, Any] = {
            "reasoning_ended": self._request.resolve_reasoning_ended(parser, self.prompt_token_ids)
        }
        if parser is not None and parser.reasoning_parser is not None:
            arguments["reasoning_parser_kwargs"] = {"chat_template_kwargs": self._template_kwargs()}
        return arguments

    def deltas(self, output: Any) -> dict[int, MessageDelta]:
        """What a ``RequestOutput`` of kind DELTA adds to the messages of its completions."""
        return {completion.index: self._delta(completion) for completion in output.outputs}

    def _delta(self, completion: Any) -> MessageDelta:
        if completion.index not in self._streams:
            self._streams[completion.index] = (self._parser(), {})
        parser, ids = self._streams[completion.index]
        if parser is None:
            return MessageDelta(completion.text)
        finished = completion.finish_reason is not None
        delta = MessageDelta()
        pieces = _pieces(completion.text, list(completion.token_ids), parser.reasoning_parser)
        for number, (text, token_ids) in enumerate(pieces, 1):
            # A step that only computes a part of the prompt is none to the parser.
            if text or token_ids or finished:
                parsed = parser.parse_delta(
                    text,
                    token_ids,
                    self._request,
                    self.prompt_token_ids,
                    finished=finished and number == len(pieces),
                )
                if parsed is not None:
                    delta.add(_message_delta(parsed, ids))
        return delta

    def message(self, completion: Any) -> dict[str, Any]:
        """The *message* of one of vLLM's ``CompletionOutput``, after the deltas if it is streamed:
        its tool calls have the ids that the deltas gave them."""
        from vllm.renderers.chat_utils import make_tool_call_id

        _parser, ids = self._streams.get(completion.index, (None, {}))
        reasoning, content, calls = None, completion.text, None
        # Parsers have state: each answer gets its own.
        if (parser := self._parser()) is not None:
            parser.set_prompt_token_ids(self.prompt_token_ids)
            reasoning, content, calls = parser.parse(
                completion.text,
                self._request,
                enable_auto_tools=True,
                model_output_token_ids=completion.token_ids,
            )
        return {
            "role": self._role(),
            "content": content,
            "reasoning": reasoning,
            "tool_calls": [
                tool_call(
                    ids.get(index) or call.id or make_tool_call_id(), call.name, call.arguments
                )
                for index, call in enumerate(calls or [])
            ],
        }

    def _role(self) -> str:
        if self._request.add_generation_prompt:
            return "assistant"
        return str(self._request.messages[-1]["role"])

    def _template_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = self._renderer.effective_chat_template_kwargs(self._request)
        return kwargs

    def _parser(self) -> Any:
        if self._renderer.parser is None:
            return None
        return self._renderer.parser(
            self._renderer.renderer.get_tokenizer(),
            self._request.tools,
            chat_template_kwargs=self._template_kwargs(),
            model_config=self._renderer.model_config,
        )


class Chat:
    """Renders the conversations of an engine.

    Args:
        llm: the ``AsyncLLM``
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._renderers: dict[tuple[str | None, str | None], Any] = {}

    async def warm_up(self) -> None:
        """Renders a conversation, so that what the first one imports and compiles is part of the
        start."""
        # A model without a template has nothing to warm, and one whose template does not take this
        # is none the worse for it.
        with contextlib.suppress(Exception):
            await self.render(ChatParams(messages=[{"role": "user", "content": "Hello!"}]))

    async def render(self, params: ChatTemplateParams, sampling_params: Any = None) -> Conversation:
        """The conversation of one request, ready for the engine.

        Args:
            sampling_params: vLLM's; those that the parsers change are changed in it

        Raises:
            BridgeError: ``invalid_prompt`` or ``invalid_option``
            Exception: vLLM's own, for what only it knows
        """
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMValidationError

        renderer = self._renderer(params)
        request = _request(params, sampling_params, self._llm.model_config.max_model_len)
        try:
            result = await renderer.render_chat(request)
        except Exception as error:
            if (fault := _render_error(error, params)) is not None:
                raise fault from error
            raise
        if isinstance(result, ErrorResponse):
            # A tool choice that needs a parser is all that is left to refuse here.
            raise VLLMValidationError(
                result.error.message, parameter=result.error.param or "tool_choice"
            )
        _messages, (prompt,) = result
        conversation = Conversation(request, renderer, prompt)
        if sampling_params is not None:
            conversation.adjust(sampling_params)
        return conversation

    def _renderer(self, params: ChatTemplateParams) -> Any:
        from vllm.reasoning import ReasoningParserManager
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.tool_parsers import ToolParserManager

        tools = reasoning = None
        if isinstance(params, ChatParams):
            config = self._llm.vllm_config.structured_outputs_config
            tools = params.tool_call_parser
            reasoning = params.reasoning_parser or config.reasoning_parser or None
            _check_parser("tool_call_parser", tools, ToolParserManager)
            _check_parser("reasoning_parser", reasoning, ReasoningParserManager)
        if (tools, reasoning) not in self._renderers:
            self._renderers[tools, reasoning] = OnlineRenderer(
                self._llm.model_config,
                self._llm.renderer,
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
                # Who calls here started the engine, unlike a client of a server.
                trust_request_chat_template=True,
                enable_auto_tools=True,
                tool_parser=tools,
                reasoning_parser=reasoning,
            )
        return self._renderers[tools, reasoning]


def _pieces(text: str, token_ids: list[int], reasoning_parser: Any) -> list[tuple[str, list[int]]]:
    """A delta in pieces, of which the token that opens the reasoning is one by itself.

    vLLM merges the deltas that a busy event loop did not come to take, and its parsers leave that
    token in the reasoning where others came with it.
    """
    mark = str((reasoning_parser and reasoning_parser.reasoning_start_str) or "")
    token = reasoning_parser.vocab.get(mark) if mark else None
    if len(token_ids) < 2 or token not in token_ids or mark not in text:
        return [(text, token_ids)]
    before, _, after = text.partition(mark)
    at = token_ids.index(token)
    pieces = [(before, token_ids[:at]), (mark, [token]), (after, token_ids[at + 1 :])]
    return [piece for piece in pieces if piece != ("", [])]


def _message_delta(parsed: Any, ids: dict[int, str]) -> MessageDelta:
    """vLLM's ``DeltaMessage`` as ours; notes the ids of its tool calls."""
    delta = MessageDelta(parsed.content or "", parsed.reasoning or "")
    for call in parsed.tool_calls:
        if call.id:
            ids.setdefault(call.index, call.id)
        name = call.function.name if call.function else None
        arguments = call.function.arguments if call.function else None
        added = ToolCallDelta(call.id, name and _text(name), _text(arguments or ""))
        delta.add(MessageDelta(tool_calls={call.index: added}))
    return delta


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A *tool call* of the protocol."""
    text = _text(arguments)
    return {"id": id, "name": _text(name), "arguments": text, "parsed": _parsed(text)}


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of one conversation, of which every one can be somebody's saying.

    Raises:
        BridgeError: ``invalid_prompt``
    """
    if not isinstance(messages, list) or not messages:
        raise BridgeError(
            "invalid_prompt",
            'A conversation is a list of messages such as {"role": "user", "content": "Hello!"}, '
            "with at least one.",
        )
    for index, message in enumerate(messages):
        if fault := _fault(message):
            raise BridgeError(
                "invalid_prompt", f"Message {index} {fault}", {"message_index": index}
            )
    return messages


def _fault(message: Any) -> str | None:
    if not isinstance(message, dict):
        return "is not a map with `role` and `content`."
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        return 'has no `role`: "system", "user", "assistant", "tool" or another of the template\'s.'
    if not isinstance(content, str | list | None):
        return "has a `content` that is neither a string nor a list of parts."
    if isinstance(content, list) and not all(isinstance(part, str | dict) for part in content):
        return "has a part of `content` that is neither a string nor a map."
    if not isinstance(message.get("tool_calls"), list | None):
        return "has `tool_calls` that are not a list."
    if content is None and not message.get("tool_calls") and not message.get("reasoning"):
        return "has neither `content` nor `tool_calls`."
    return None


def _request(params: ChatTemplateParams, sampling_params: Any, max_model_len: int) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    generate = params.add_generation_prompt
    given: dict[str, Any] = {
        "messages": checked_messages(params.messages),
        "add_generation_prompt": not params.continue_final_message
        if generate is None
        else generate,
        "continue_final_message": params.continue_final_message,
        "chat_template": params.chat_template,
        "chat_template_kwargs": params.chat_template_kwargs,
    }
    if params.tools:
        given["tools"] = params.tools
    if isinstance(params, ChatParams):
        given |= tokenization.for_generating(params.tokenization_kwargs, max_model_len)
        if params.tool_choice is not None:
            given["tool_choice"] = params.tool_choice
    if sampling_params is not None:
        given |= {name: getattr(sampling_params, name) for name in _SAMPLING}
    try:
        return ChatCompletionRequest.model_validate(given)
    except pydantic.ValidationError as error:
        raise _shape_error(error) from error
    except KeyError as error:
        # vLLM looks for the chosen tool before it looks at the tools.
        raise BridgeError(
            "invalid_option",
            f'`tools` has a tool without {error}; one is {{"type": "function", '
            '"function": {"name": …, "parameters": …}}.',
            {"option": "tools"},
        ) from error


def _shape_error(error: pydantic.ValidationError) -> BridgeError:
    reasons = _reasons(error)
    option, *rest = error.errors()[0]["loc"] or (None,)
    if option == "messages":
        index = rest[0]
        return BridgeError(
            "invalid_prompt",
            f"Message {index} is not of a shape that vLLM knows; it follows OpenAI's chat API. "
            f"{reasons[-1]}.",
            {"message_index": index, "errors": reasons},
        )
    return BridgeError("invalid_option", f"{reasons[0]}.", {"option": option, "errors": reasons})


def _reasons(error: pydantic.ValidationError) -> list[str]:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return [".".join(map(str, fault["loc"])) + ": " + fault["msg"] for fault in faults]


def _render_error(error: Exception, params: ChatTemplateParams) -> BridgeError | None:
    """The error for what the chat template had against the messages, or nobody had a template;
    None for an error that is about something else."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import ChatTemplateResolutionError

    if isinstance(error, ChatTemplateResolutionError):
        return BridgeError(
            "invalid_option",
            "The model has no chat template; give one as `chat_template`.",
            {"option": "chat_template"},
        )
    if isinstance(error, pydantic.ValidationError):
        # Parts of a content are looked at only when they are needed.
        return BridgeError(
            "invalid_prompt",
            "A part of a message's `content` is not of a shape that vLLM knows; parts follow "
            "OpenAI's chat API.",
            {"errors": _reasons(error)},
        )
    # What a template raises is the cause of vLLM's error; one that does not compile comes through.
    refused = isinstance(error, VLLMValidationError) and error.__cause__ is not None
    if not refused and not isinstance(error, TemplateError | TimeoutError):
        return None
    words = str(error.args[0]).rstrip(".")
    if params.chat_template is not None:
        return BridgeError(
            "invalid_option",
            f"`chat_template` does not render these messages: {words}.",
            {"option": "chat_template"},
        )
    return BridgeError(
        "invalid_prompt", f"The model's chat template refuses these messages: {words}."
    )


def _check_parser(option: str, name: str | None, manager: Any) -> None:
    known: list[str] = manager.list_registered()
    if name is None or name in known:
        return
    near = nearest(name, known)
    raise BridgeError(
        "invalid_option",
        f"`{option}` cannot be '{name}'."
        + (f" Did you mean `{near}`?" if near else "")
        + f" Allowed: {', '.join(known)}.",
        {"option": option, "value": name, "nearest": near, "allowed": known},
    )


def _text(text: str) -> str:
    # JSON of a model may name half of a surrogate pair, which no encoding has.
    return text.encode(errors="replace").decode()


def _parsed(arguments: str) -> dict[str, Any] | None:
    """The arguments of a tool call as a map; none where they are not a JSON object, or one that
    MessagePack cannot carry."""
    try:
        value = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return None
    return value if _fits(value, _MAX_DEPTH) else None


def _fits(value: Any, depth: int) -> bool:
    match value:
        case dict():
            return depth > 0 and all(_fits(item, depth - 1) for item in value.values())
        case list():
            return depth > 0 and all(_fits(item, depth - 1) for item in value)
        case int():
            return -(2**63) <= value < 2**64
    return True
