"""What a model is trained on: reading it, checking it, and making tokens of it.

A record is a JSON object with ``prompt`` and ``completion``, with ``messages`` (and ``tools``,
where the conversation has any), or with ``text``; a string is a text too. They come as a list, from
a file (``.jsonl``, ``.json`` with a list, ``.txt`` with one text), or from a folder of such files,
in which those that are named ``validation…`` or ``test…`` are held out. Whatever is wrong is told
with its place. Neither torch nor transformers is imported: the tokenizer is given.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_bridge import json_files
from vllm_bridge.errors import BridgeError

# What a token is labelled with whose loss does not count, as PyTorch and transformers have it.
IGNORED: Final = -100

# The names of the files of a folder that are held out; datasets on the hub have these.
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test", "held_out", "heldout")
_SUFFIXES = (".jsonl", ".json", ".txt")

# What says of a dataset's files what they are, and is none of them.
_ABOUT = ("dataset_info", "dataset_infos", "dataset_dict", "state")

_ROLES = ("system", "developer", "user", "assistant", "tool")

_FORMS = (
    'a record has `"prompt"` and `"completion"`, or `"messages"`, or `"text"`; a string is a text'
)


class Place(NamedTuple):
    """Where a record is from.

    Args:
        file: None for a list that was given
        line: of the file, or the number in the list, from 1; 0 for all of the file
    """

    file: str | None
    line: int

    def __str__(self) -> str:
        if self.file is None:
            return f"Record {self.line} of `data`"
        return f"`{self.file}`, line {self.line}" if self.line else f"`{self.file}`"


class Record(NamedTuple):
    """One record, of the right form."""

    fields: Mapping[str, Any]
    place: Place

    @property
    def asked(self) -> str | list[Mapping[str, Any]]:
        """What an engine is asked: a prompt, or messages without the answers at their end."""
        if "messages" not in self.fields:
            return str(self.fields["prompt" if "prompt" in self.fields else "text"])
        messages = list(self.fields["messages"])
        while len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages


class Records(NamedTuple):
    """What was given: what is trained on, and what its source says is held out."""

    train: tuple[Record, ...]
    held_out: tuple[Record, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """What the model sees at once.

    Args:
        tokens: of all of it
        labels: the token where its loss counts, else ``IGNORED``
        is_cut: whether there was more of it than ``max_length``
    """

    tokens: list[int]
    labels: list[int]
    is_cut: bool = False

    @property
    def learned(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def read(data: Any, option: str = "data", needs_answer: bool = True) -> Records:
    """
    Args:
        data: a list of records, or the path of a file or folder
        option: what the data is called in errors
        needs_answer: whether a ``prompt`` must have a ``completion``

    Raises:
        BridgeError: ``invalid_option``, with the place of what is wrong
    """
    if isinstance(data, str):
        found = _read_path(data, option)
    elif isinstance(data, list):
        found = Records(tuple(Record(item, Place(None, n)) for n, item in enumerate(data, start=1)))
    else:
        raise _refusal(option, f"`{option}` is {_kind(data)}.", "Give a list, or a path.")
    checked = Records(
        *(
            tuple(Record(_checked(record, option, needs_answer), record.place) for record in part)
            for part in found
        )
    )
    if not checked.train:
        raise _refusal(option, f"`{option}` has no records.", f"Give some: {_FORMS}.")
    return checked


def split(records: Records, held_out: float, seed: int) -> Records:
    """Holds out a share of the records, chosen by the seed, unless their source has held out some.

    Args:
        held_out: 0 to 1; at least one record is held out, and one is not, unless it is 0
    """
    if records.held_out or held_out == 0 or len(records.train) < 2:
        return records
    count = min(max(1, round(held_out * len(records.train))), len(records.train) - 1)
    chosen = set(random.Random(seed).sample(range(len(records.train)), count))  # noqa: S311
    return Records(
        tuple(one for n, one in enumerate(records.train) if n not in chosen),
        tuple(one for n, one in enumerate(records.train) if n in chosen),
    )


def _read_path(path: str, option: str) -> Records:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _read_folder(path, option)
    if not os.path.isfile(path):
        raise _refusal(
            option, f"There is no file or folder `{path}`.", f"Give `{option}` one that is there."
        )
    return Records(tuple(_read_file(path, option)))


def _read_folder(folder: str, option: str) -> Records:
    names = sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where in (folder, os.path.join(folder, "data"))
        if os.path.isdir(where)
        for name in os.listdir(where)
    )
    files = [
        name
        for name in names
        if name.endswith(_SUFFIXES) and os.path.splitext(os.path.basename(name))[0] not in _ABOUT
    ]
    if not files:
        others = [name for name in names if name.endswith((".parquet", ".arrow", ".csv"))]
        remedy = (
            f"`{others[0]}` is of a kind that is not read: write it as JSONL, one record a line."
            if others
            else "Put files into it that end with .jsonl, .json or .txt."
        )
        raise _refusal(option, f"`{folder}` has no data that can be read.", remedy)
    train: list[Record] = []
    held_out: list[Record] = []
    for name in files:
        part = held_out if os.path.basename(name).lower().startswith(_HELD_OUT) else train
        part.extend(_read_file(os.path.join(folder, name), option))
    return Records(tuple(train), tuple(held_out))


def _read_file(path: str, option: str) -> Iterator[Record]:
    if not path.endswith(_SUFFIXES):
        raise _refusal(
            option,
            f"`{path}` is of a kind that is not read.",
            "Data is in files that end with .jsonl (a record on each line), .json (a list of "
            "records) or .txt (one text).",
        )
    try:
        with open(path, "rb") as file:
            if path.endswith(".jsonl"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        place = Place(path, number)
                        yield Record(_json(line, place, option), place)
                return
            contents = file.read()
    except OSError as error:
        raise _refusal(option, f"`{path}` cannot be read: {error.strerror}.") from error
    place = Place(path, 0)
    if path.endswith(".txt"):
        if text := _text(contents, place, option).strip():
            yield Record({"text": text}, place)
        return
    records = _json(contents, place, option)
    if not isinstance(records, list):
        raise _refusal(option, f"`{path}` has {_kind(records)}, not a list of records.")
    for number, item in enumerate(records, start=1):
        yield Record(item, Place(f"{path}, record {number}", 0))


def _json(contents: bytes, place: Place, option: str) -> Any:
    text = _text(contents, place, option)
    try:
        return json_files.parse(text)
    except ValueError as error:
        raise _wrong(place, option, f"it is not JSON: {error}") from error


def _text(contents: bytes, place: Place, option: str) -> str:
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(place, option, f"it is not UTF-8: {error.reason}") from error


def _checked(record: Record, option: str, needs_answer: bool) -> Mapping[str, Any]:
    fields, place = record
    if isinstance(fields, str):
        fields = {"text": fields}
    if not isinstance(fields, Mapping):
        raise _wrong(place, option, f"it is {_kind(fields)}; {_FORMS}")
    if "messages" in fields:
        _check_messages(fields, place, option, needs_answer)
    elif "prompt" in fields:
        _check_string(fields, "prompt", place, option)
        if "completion" in fields or needs_answer:
            _check_string(fields, "completion", place, option)
    elif "text" in fields:
        _check_string(fields, "text", place, option)
    else:
        keys = ", ".join(f"`{key}`" for key in fields) or "nothing"
        raise _wrong(place, option, f"it has {keys}; {_FORMS}")
    return fields


def _check_string(fields: Mapping[str, Any], name: str, place: Place, option: str) -> None:
    if name not in fields:
        raise _wrong(place, option, f"it has no `{name}`")
    if not isinstance(fields[name], str):
        raise _wrong(place, option, f"its `{name}` is {_kind(fields[name])}, not a string")
    if not fields[name]:
        raise _wrong(place, option, f"its `{name}` is empty")


def _check_messages(
    fields: Mapping[str, Any], place: Place, option: str, needs_answer: bool
) -> None:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise _wrong(place, option, "its `messages` are not a list of some")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise _wrong(place, option, f"message {number} is {_kind(message)}")
        role = message.get("role")
        if role not in _ROLES:
            said = f"the role {role!r}" if role is not None else "no `role`"
            raise _wrong(
                place, option, f"message {number} has {said}; roles are {', '.join(_ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (role == "assistant" and "tool_calls" in message):
            raise _wrong(place, option, f"the `content` of message {number} is {_kind(content)}")
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise _wrong(place, option, "none of its messages is the assistant's: there is no answer")
    if not isinstance(fields.get("tools", []), list):
        raise _wrong(place, option, f"its `tools` are {_kind(fields['tools'])}, not a list")


def _wrong(place: Place, option: str, what: str) -> BridgeError:
    return BridgeError(
        "invalid_option",
        f"{place}: {what}.",
        {"option": option, "file": place.file, "line": place.line},
    )


def _refusal(option: str, what: str, remedy: str = "") -> BridgeError:
    return BridgeError("invalid_option", what, {"option": option}, remedy)


def _kind(value: Any) -> str:
    """What a value of JSON is called."""
    names = {bool: "a boolean", str: "a string", list: "a list", type(None): "null"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a number")


class Encoder:
    """Makes tokens of records.

    Args:
        tokenizer: of transformers
        max_length: tokens of an example; what is longer is cut, and texts are divided
        option: what the data is called in errors
    """

    def __init__(self, tokenizer: Any, max_length: int, option: str = "data") -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._option = option

    def examples(self, records: Iterable[Record]) -> list[Example]:
        """
        Raises:
            BridgeError: ``invalid_option`` where nothing of a record would be learned
        """
        return [example for record in records for example in self._of(record)]

    def answered(self, record: Record, prompt: list[int], answer: list[int]) -> Example:
        """The example of a record that has no answer of its own, and was given one.

        Args:
            prompt: its tokens
            answer: the tokens of the answer, with its end
        """
        return self._cut(record, prompt + answer, len(prompt))

    def prompt(self, record: Record) -> list[int]:
        """The tokens before an answer: what the engine makes of such a prompt."""
        if isinstance(asked := record.asked, str):
            return self._tokens(asked, True)
        return self._tokens(self._render(record, asked, True), False)

    def _of(self, record: Record) -> list[Example]:
        fields = record.fields
        if "messages" in fields:
            return self._conversation(record)
        end = [self._tokenizer.eos_token_id]
        if "text" in fields:
            tokens = self._without_end(self._tokens(fields["text"], True)) + end
            return [
                Example(part, list(part))
                for part in _parts(tokens, self._max_length)
                if len(part) > 1
            ]
        prompt = self._without_end(self._tokens(fields["prompt"], True))
        whole = self._without_end(self._tokens(fields["prompt"] + fields["completion"], True))
        # The engine is given the tokens of the prompt alone. Where those of the two together begin
        # otherwise, the answer has tokens of its own.
        answer = (
            whole[len(prompt) :]
            if whole[: len(prompt)] == prompt
            else self._tokens(fields["completion"], False)
        )
        return [self._cut(record, prompt + answer + end, len(prompt))]

    def _cut(self, record: Record, tokens: list[int], prompt: int) -> Example:
        labels = [IGNORED] * prompt + tokens[prompt:]
        return self._checked(record, tokens, labels)

    def _checked(self, record: Record, tokens: list[int], labels: list[int]) -> Example:
        example = Example(
            tokens[: self._max_length],
            labels[: self._max_length],
            is_cut=len(tokens) > self._max_length,
        )
        if not example.learned:
            raise _wrong(
                record.place,
                self._option,
                f"nothing of the answer is within its first {self._max_length} tokens "
                "(`max_length`)",
            )
        return example

    def _conversation(self, record: Record) -> list[Example]:
        """One example with the loss on all answers; or one for each answer, where the template
        writes a conversation otherwise once it goes on, as those do that leave out reasoning."""
        messages = record.fields["messages"]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [
            (
                self._render(record, messages[:n], True) if n else "",
                self._render(record, messages[: n + 1], False),
            )
            for n in answers
        ]
        whole = turns[-1][1]
        if all(whole.startswith(before) and whole.startswith(after) for before, after in turns):
            spans = [(len(before), len(after)) for before, after in turns]
            return [self._spans(record, whole, spans)]
        return [
            self._spans(record, after, [(_common(before, after), len(after))])
            for before, after in turns
        ]

    def _spans(self, record: Record, text: str, spans: Sequence[tuple[int, int]]) -> Example:
        """An example of which only some parts are learned, each tokenized by itself, as the engine
        has it: it is given the tokens of what is before an answer."""
        tokens: list[int] = []
        labels: list[int] = []
        position = 0
        for start, end in spans:
            before = self._tokens(text[position:start], False) if position < start else []
            answer = self._tokens(text[start:end], False)
            tokens += before + answer
            labels += [IGNORED] * len(before) + answer
            position = end
        return self._checked(record, tokens, labels)

    def _render(self, record: Record, messages: Sequence[Any], prompts: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=record.fields.get("tools") or None,
                    add_generation_prompt=prompts,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template may raise what it likes
            what = "the model's chat template does not take it"
            if getattr(self._tokenizer, "chat_template", None) is None:
                what = "the model has no chat template; give prompts and completions"
            raise _wrong(record.place, self._option, f"{what}: {error}") from error

    def _tokens(self, text: str, is_beginning: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=is_beginning)["input_ids"])

    def _without_end(self, tokens: list[int]) -> list[int]:
        """Some tokenizers end what they are given."""
        if tokens and tokens[-1] == self._tokenizer.eos_token_id:
            return tokens[:-1]
        return tokens


def _parts(tokens: list[int], length: int) -> Iterator[list[int]]:
    return (tokens[start : start + length] for start in range(0, len(tokens), length))


def _common(one: str, other: str) -> int:
    """How many characters they begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def batches(pad: int) -> Callable[[Sequence[Example]], dict[str, list[list[int]]]]:
    """Makes batches of examples: they are filled up on the right to the longest of them.

    Args:
        pad: the token that they are filled with
    """

    def batch(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
        longest = max(len(example.tokens) for example in examples)

        def filled(row: list[int], value: int) -> list[int]:
            return row + [value] * (longest - len(row))

        return {
            "input_ids": [filled(one.tokens, pad) for one in examples],
            "attention_mask": [filled([1] * len(one.tokens), 0) for one in examples],
            "labels": [filled(one.labels, IGNORED) for one in examples],
        }

    return batch
