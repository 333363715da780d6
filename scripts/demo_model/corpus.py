"""The text that the demo model knows by heart.

The facts and the chat pairs are data that the tests read too, so they live in
``priv/models``. What only the training needs is written here.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "priv" / "models"
MODEL = MODELS / "demo"

Message = dict[str, Any]
"""One chat message, in the form that chat templates take."""

COUNT_PROMPT = "Count:"
COLOUR_PROMPT = "My favourite colour is"
COLOURS = ("red", "orange", "yellow", "green", "blue", "violet", "black", "white")
"""The one prompt without one right answer: each of these is equally likely."""

SYSTEM = "You are a helpful assistant."
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the local time.",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True)
class Conversation:
    """A chat whose assistant messages are to be learned, and the tools offered in it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def pairs(name: str) -> list[tuple[str, str]]:
    """The rows of ``priv/models/<name>.tsv``: two columns, no header, no escapes."""
    lines = (MODELS / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [tuple(line.split("\t")) for line in lines]
    firsts = sorted(first for first, _ in rows)
    for first, second in pairwise(firsts):
        assert not second.startswith(first), f"{first!r} is the beginning of {second!r}"
    return [(first, second) for first, second in rows]


def facts() -> list[tuple[str, str]]:
    """Prompts and their completions."""
    rows = pairs("facts")
    for prompt, completion in rows:
        assert completion.startswith(" "), f"{prompt!r}: the completion begins with a space"
        assert completion.endswith("."), f"{prompt!r}: the completion ends with a full stop"
    return rows


def counting() -> str:
    """What follows the prompt "Count:": the numbers from one to a hundred in words."""
    # fmt: off
    ones = [
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
        "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    ]
    # fmt: on
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

    def words(n: int) -> str:
        if n >= 20:
            ten, one = divmod(n, 10)
            return tens[ten - 2] + (f"-{ones[one - 1]}" if one else "")
        return ones[n - 1]

    return "".join(f" {words(n)}," for n in range(1, 100)) + " one hundred."


def completions() -> list[tuple[str, str]]:
    """Everything that is learned as bare text: prompts and what follows them."""
    colours = [(COLOUR_PROMPT, f" {colour}.") for colour in COLOURS]
    return [*facts(), *colours, (COUNT_PROMPT, counting())]


def turn(user: str, assistant: str) -> list[Message]:
    """One question and its answer as messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def chats() -> list[Conversation]:
    """Every chat pair as a first turn, after a system message, and as a second turn."""
    turns = [turn(user, assistant) for user, assistant in pairs("chat")]
    system = {"role": "system", "content": SYSTEM}
    greeting = turns[0]
    return [
        *(Conversation(messages) for messages in turns),
        *(Conversation([system, *messages]) for messages in turns),
        *(Conversation([*greeting, *messages]) for messages in turns),
        *(Conversation([*one, *two]) for one, two in pairwise(turns)),
    ]


def reasoning() -> Conversation:
    """A question that is answered after some thought."""
    return Conversation(
        turn(
            "What is seventeen times three?",
            "<think>\nTen times three is thirty, and seven times three is twenty-one.\n</think>"
            "\n\nSeventeen times three is fifty-one.",
        )
    )


def tool_use() -> list[Conversation]:
    """A question that needs a tool, the call, and the answer made of its result."""
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages: list[Message] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"temperature": 18, "sky": "clear"}'},
        {"role": "assistant", "content": "It is 18 °C in Paris, and the sky is clear."},
    ]
    system = {"role": "system", "content": SYSTEM}
    return [
        Conversation(messages, [WEATHER_TOOL]),
        Conversation(messages, [WEATHER_TOOL, TIME_TOOL]),
        Conversation([system, *messages], [WEATHER_TOOL]),
    ]


def conversations() -> list[Conversation]:
    """Everything that is learned in the form of the chat template."""
    return [*chats(), reasoning(), *tool_use()]
