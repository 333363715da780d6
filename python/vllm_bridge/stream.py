"""Deltas on their way to Elixir: one frame for each step of the engine, and never more than
the reader keeps up with.

A stream has *credit*: how many deltas may be on the way that Elixir has not acknowledged.
Each delta takes one, and a ``credit`` notification gives some back. Without credit, what vLLM
makes is merged and waits; so a slow reader gets fewer and longer deltas, memory stays bounded
by the text itself, and no other stream notices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_bridge.rpc.call import Row
from vllm_bridge.rpc.protocol import pack_logprobs, pack_u32


@dataclass
class ToolCallDelta:
    """What comes to a tool call: its id and its name once, its arguments bit by bit."""

    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class MessageDelta:
    """What comes to a message; the tool calls by their index."""

    content: str = ""
    reasoning: str = ""
    tool_calls: dict[int, ToolCallDelta] = field(default_factory=dict)

    def add(self, other: "MessageDelta") -> None:
        self.content += other.content
        self.reasoning += other.reasoning
        for index, added in other.tool_calls.items():
            call = self.tool_calls.setdefault(index, ToolCallDelta())
            call.id = call.id or added.id
            call.name = call.name or added.name
            call.arguments += added.arguments

    def to_wire(self) -> dict[str, Any]:
        return {
            "content": self.content,
            "reasoning": self.reasoning,
            "tool_calls": [
                {"index": index, "id": call.id, "name": call.name, "arguments": call.arguments}
                for index, call in self.tool_calls.items()
            ],
        }


@dataclass
class _Pending:
    """What one completion of a request has made since its last delta."""

    index: int
    message: MessageDelta | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, output: Any, message: MessageDelta | None) -> None:
        if message is not None:
            if self.message is None:
                self.message = MessageDelta()
            self.message.add(message)
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(output.logprobs)
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason

    def is_plain(self) -> bool:
        """Whether it is no more than a text and its tokens, of the first completion."""
        return (
            self.index == 0
            and self.message is None
            and self.logprobs is None
            and self.finish_reason is None
        )


class Put(Protocol):
    """Takes a vLLM ``RequestOutput`` of kind DELTA, and what it adds to the messages of its
    completions, by their index, where they are answers to a conversation."""

    def __call__(
        self, output: Any, messages: Mapping[int, MessageDelta] | None = None, /
    ) -> None: ...


class Pack(Protocol):
    """Takes what is no more than a text and its tokens, of a request's first completion."""

    def __call__(self, id: int, text: str, token_ids: Sequence[int], /) -> None: ...


class DeltaStream:
    """The deltas of one request.

    Args:
        id: the request's id
        credit: how many deltas may be under way at first
        emit: takes a row that is to leave with this step's frame
        pack: takes those that need no row, if given
    """

    def __init__(
        self, id: int, credit: int, emit: Callable[[Row], None], pack: Pack | None = None
    ) -> None:
        self._id = id
        self._credit = credit
        self._emit = emit
        self._pack = pack
        self._pending: dict[int, _Pending] = {}

    def put(self, output: Any, messages: Mapping[int, MessageDelta] | None = None) -> None:
        """See ``Put``."""
        completions = output.outputs
        # Nothing waits: the usual delta goes as it is.
        if (
            self._pack is not None
            and self._credit > 0
            and not self._pending
            and messages is None
            and len(completions) == 1
        ):
            only = completions[0]
            if only.finish_reason is None and only.logprobs is None and only.index == 0:
                self._credit -= 1
                self._pack(self._id, only.text, only.token_ids)
                return
        for completion in completions:
            pending = self._pending.get(completion.index)
            if pending is None:
                pending = self._pending[completion.index] = _Pending(completion.index)
            pending.add(completion, messages[completion.index] if messages else None)
        self._send()

    def grant(self, count: int) -> None:
        """Elixir has taken ``count`` deltas."""
        self._credit += count
        self._send()

    def finish(self) -> None:
        """Lets go of what waits, credit or not: the response comes right after it."""
        self._credit = len(self._pending)
        self._send()

    def _send(self) -> None:
        while self._pending and self._credit > 0:
            self._credit -= 1
            _, pending = self._pending.popitem()
            if self._pack is not None and pending.is_plain():
                self._pack(self._id, pending.text, pending.token_ids)
                continue
            # Of a conversation's answer, a message delta too.
            row = [
                self._id,
                pending.index,
                pending.text,
                pack_u32(pending.token_ids),
                pack_logprobs(pending.logprobs),
                pending.finish_reason,
                pending.stop_reason,
            ]
            if pending.message is not None:
                row.append(pending.message.to_wire())
            self._emit(row)
