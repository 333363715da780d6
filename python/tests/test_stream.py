"""Deltas: what they say, and how they wait for a slow reader."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm_bridge.rpc.call import Row
from vllm_bridge.rpc.protocol import unpack_u32
from vllm_bridge.stream import DeltaStream, MessageDelta, ToolCallDelta


def output(*completions: tuple[int, str, list[int]], finish: str | None = None) -> Any:
    return SimpleNamespace(
        outputs=[
            SimpleNamespace(
                index=index,
                text=text,
                token_ids=token_ids,
                logprobs=None,
                finish_reason=finish,
                stop_reason=None,
            )
            for index, text, token_ids in completions
        ]
    )


def said(rows: list[Row]) -> list[tuple[int, int, str, list[int], str | None]]:
    return [
        (id, index, text, list(unpack_u32(token_ids)), finish)
        for id, index, text, token_ids, _logprobs, finish, _stop in rows
    ]


def test_each_step_is_a_delta_while_there_is_credit() -> None:
    rows: list[Row] = []
    stream = DeltaStream(7, 8, rows.append)
    stream.put(output((0, "a", [1])))
    stream.put(output((0, "b", [2, 3]), finish="stop"))
    assert said(rows) == [(7, 0, "a", [1], None), (7, 0, "b", [2, 3], "stop")]


def test_without_credit_steps_are_merged_until_some_is_granted() -> None:
    rows: list[Row] = []
    stream = DeltaStream(7, 1, rows.append)
    for text, token in (("a", 1), ("b", 2), ("c", 3)):
        stream.put(output((0, text, [token])))
    assert said(rows) == [(7, 0, "a", [1], None)]
    stream.grant(5)
    assert said(rows)[1:] == [(7, 0, "bc", [2, 3], None)]
    stream.put(output((0, "d", [4])))
    assert said(rows)[2:] == [(7, 0, "d", [4], None)]


def test_the_end_needs_no_credit() -> None:
    rows: list[Row] = []
    stream = DeltaStream(7, 1, rows.append)
    stream.put(output((0, "a", [1])))
    stream.put(output((0, "b", [2])))
    stream.put(output((0, "c", [3]), finish="length"))
    stream.finish()
    assert said(rows)[1:] == [(7, 0, "bc", [2, 3], "length")]


def test_completions_of_one_request_are_merged_each_for_itself() -> None:
    rows: list[Row] = []
    stream = DeltaStream(7, 2, rows.append)
    stream.put(output((0, "a", [1]), (1, "x", [9])))
    stream.put(output((0, "b", [2])))
    stream.put(output((1, "y", [8]), (0, "c", [3])))
    stream.finish()
    texts = {index: "".join(row[2] for row in said(rows) if row[1] == index) for index in (0, 1)}
    assert texts == {0: "abc", 1: "xy"}
    assert len(rows) == 4


def test_what_comes_to_a_message_is_merged_too() -> None:
    rows: list[Row] = []
    stream = DeltaStream(7, 1, rows.append)
    begun = ToolCallDelta("call-1", "f", '{"a"')
    stream.put(output((0, "a", [1])), {0: MessageDelta("a")})
    stream.put(output((0, "b", [2])), {0: MessageDelta("b", "r", {0: begun})})
    stream.put(
        output((0, "c", [3])), {0: MessageDelta("", "s", {0: ToolCallDelta(None, None, ":1}")})}
    )
    assert rows[0][7] == {"content": "a", "reasoning": "", "tool_calls": []}
    assert len(rows) == 1
    stream.grant(1)
    assert rows[1][7] == {
        "content": "b",
        "reasoning": "rs",
        "tool_calls": [{"index": 0, "id": "call-1", "name": "f", "arguments": '{"a":1}'}],
    }
    # What was put is left as it was.
    assert begun.arguments == '{"a"'


def packing(credit: int) -> tuple[DeltaStream, list[tuple[int, str, list[int]]], list[Row]]:
    packed: list[tuple[int, str, list[int]]] = []
    rows: list[Row] = []

    def pack(id: int, text: str, token_ids: Sequence[int]) -> None:
        packed.append((id, text, list(token_ids)))

    return DeltaStream(7, credit, rows.append, pack), packed, rows


def test_what_is_no_more_than_a_text_and_its_tokens_is_packed_and_the_rest_are_rows() -> None:
    stream, packed, rows = packing(8)
    stream.put(output((0, "a", [1])))
    stream.put(output((0, "b", [2, 3])))
    stream.put(output((1, "x", [9])))
    stream.put(output((0, "c", [4]), (1, "y", [8])))
    stream.put(output((0, "d", [5])), {0: MessageDelta("d")})
    stream.put(output((0, "e", [6]), finish="stop"))
    assert packed == [(7, "a", [1]), (7, "b", [2, 3]), (7, "c", [4])]
    assert [row[1:3] + row[5:6] for row in rows] == [
        [1, "x", None],
        [1, "y", None],
        [0, "d", None],
        [0, "e", "stop"],
    ]


def test_what_is_packed_takes_credit_and_is_merged_without() -> None:
    stream, packed, rows = packing(1)
    for text, token in (("a", 1), ("b", 2), ("c", 3)):
        stream.put(output((0, text, [token])))
    assert packed == [(7, "a", [1])]
    stream.grant(1)
    assert packed[1:] == [(7, "bc", [2, 3])]
    stream.put(output((0, "d", [4])))
    stream.put(output((0, "e", [5]), finish="length"))
    stream.finish()
    assert packed[2:] == []
    assert said(rows) == [(7, 0, "de", [4, 5], "length")]
