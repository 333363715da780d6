"""The texts that a model is calibrated with: those of the user, or the set that comes with this
package.

What is read is looked at line by line, so that an error can say where it is. Nothing here imports
torch; transformers only where conversations become texts, by the model's chat template.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_bridge import json_files
from vllm_bridge.errors import BridgeError

# A set of this package's own: prose in several languages, conversations and code.
DEFAULT = os.path.join(os.path.dirname(__file__), "default.txt")

MAX_SAMPLES = 256
MAX_LENGTH = 2048

_SHAPES = "`text`, or `prompt` and `completion`, or `messages`"

# How the files of a dataset are called that can be read.
_SUFFIXES = (".txt", ".jsonl", ".parquet")

# Of a token of text, as most tokenizers cut it.
_BYTES = 4

T = TypeVar("T")


class Calibration(msgspec.Struct, forbid_unknown_fields=True):
    """Where calibration texts come from: a list, or a file or folder. The default set where it is
    neither."""

    texts: list[Any] | None = None
    path: str | None = None


class Texts:
    """Calibration texts.

    Attributes:
        source: ``"default"``, ``"list"``, or the path that they were read from
        texts: as the model would read them, no more than ``max_samples``
        max_samples: the most that are used
        max_length: the most tokens that one of them has
        tokens: how many tokens were used, which is known once they were made
    """

    def __init__(
        self,
        source: str,
        texts: Sequence[str],
        max_samples: int = MAX_SAMPLES,
        max_length: int = MAX_LENGTH,
    ) -> None:
        self.source = source
        self.texts = tuple(_spread(texts, max_samples))
        self.max_samples = max_samples
        self.max_length = max_length
        self.tokens: int | None = None

    def ids(self, tokenizer: Any) -> list[list[int]]:
        """The texts as tokens of the model. What is longer than ``max_length`` becomes several.

        Args:
            tokenizer: of transformers
        """
        whole = [list(tokenizer(text)["input_ids"]) for text in self.texts]
        starts = range(0, max(map(len, whole), default=0), self.max_length)
        cut = [
            piece for ids in whole for start in starts if (piece := ids[start:][: self.max_length])
        ]
        rows = _spread(cut, self.max_samples)
        self.tokens = sum(map(len, rows))
        return rows

    def to_wire(self) -> dict[str, Any]:
        return {"source": self.source, "texts": len(self.texts), "tokens": self.tokens}


def read(
    given: Calibration,
    model: str,
    max_samples: int = MAX_SAMPLES,
    max_length: int = MAX_LENGTH,
) -> Texts:
    """The texts of a calibration.

    Args:
        model: the folder of the model, whose chat template conversations are written with

    Raises:
        BridgeError: ``invalid_option``, which says where the data is wrong
    """
    template = _Template(model)
    texts = [template.text(item, where) for where, item in _items(given)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise _wrong(_place(given), "there is no text in it", "Give texts like those to come.")
    return Texts(_name(given), texts, max_samples, max_length)


def count(given: Calibration, model: str | None, max_samples: int, max_length: int) -> int:
    """How many tokens of the texts would be used.

    Args:
        model: the folder of the model, by whose tokenizer they are counted; None where it is not
            here yet. Then, and where transformers does not read the tokenizer, a token is taken for
            ``_BYTES`` bytes.

    Raises:
        BridgeError: ``invalid_option``
    """
    if model is not None:
        from transformers import AutoTokenizer

        texts = read(given, model, max_samples, max_length)
        with contextlib.suppress(OSError, ValueError, KeyError):
            return sum(map(len, texts.ids(AutoTokenizer.from_pretrained(model))))
    items = _spread([item for _, item in _items(given)], max_samples)
    sizes = (sum(len(part.encode()) for part in _parts(item)) // _BYTES + 1 for item in items)
    return min(sum(sizes), max_samples * max_length)


def check(given: Calibration, model: str | None) -> None:
    """Looks at the data without making texts of it.

    Args:
        model: the folder of the model; None where it is not here yet

    Raises:
        BridgeError: ``invalid_option``
    """
    template = None if model is None else _Template(model)
    found = False
    for where, item in _items(given):
        found = True
        if isinstance(item, list) and template is not None:
            template.check(where)
    if not found:
        raise _wrong(_place(given), "there is no text in it", "Give texts like those to come.")


def _name(given: Calibration) -> str:
    return given.path or ("default" if given.texts is None else "list")


def _place(given: Calibration) -> str:
    return f"`{given.path}`" if given.path else "The list"


def _items(given: Calibration) -> Iterator[tuple[str, str | list[Any]]]:
    """Each text, or the messages of each conversation, with where it stands."""
    if given.texts is not None and given.path is not None:
        raise BridgeError(
            "invalid_option",
            "The calibration has both a list of texts and a path.",
            {"option": "calibration"},
            remedy="Give one of them.",
        )
    if given.texts is not None:
        for number, item in enumerate(given.texts, 1):
            yield f"text {number} of the list", _item(item, f"text {number} of the list")
        return
    path = given.path or DEFAULT
    files = _dataset(path) if os.path.isdir(path) else [path]
    yield from itertools.chain.from_iterable(map(_file, files))


def _dataset(folder: str) -> list[str]:
    """The files of a dataset: those of its part for training, where it has one."""
    files = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.endswith(_SUFFIXES) and not name.startswith(".")
    )
    if not files:
        what = f"it has no files that end with {', '.join(_SUFFIXES)}"
        raise _wrong(f"`{folder}`", what, "Name a folder or a file with texts.")
    trained = [file for file in files if "train" in os.path.relpath(file, folder).lower()]
    return trained or files


def _file(path: str) -> Iterator[tuple[str, str | list[Any]]]:
    try:
        if path.endswith(".parquet"):
            rows = _parquet(path)
        else:
            with open(path, encoding="utf-8") as file:
                lines = file.read().split("\n")
            rows = _json_lines(lines) if path.endswith(".jsonl") else _paragraphs(lines)
        for where, item in rows:
            place = f"`{path}`, {where}"
            try:
                yield place, _item(item, place)
            except ValueError as error:
                raise _wrong(place, str(error), f"Each line is JSON with {_SHAPES}.") from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        remedy = "Name a file with texts in UTF-8, JSONL, or the folder of a dataset."
        raise _wrong(f"`{path}`", f"it cannot be read ({why})", remedy) from error


def _json_lines(lines: Sequence[str]) -> Iterator[tuple[str, Any]]:
    return ((f"line {n}", _Json(line)) for n, line in enumerate(lines, 1) if line.strip())


class _Json(str):
    """A line that is JSON."""


def _paragraphs(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What stands between empty lines; each line where there are none."""
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    if all(line.strip() for line in lines):
        yield from ((f"line {number}", line) for number, line in enumerate(lines, 1))
        return
    numbered = enumerate(lines, 1)
    for filled, group in itertools.groupby(numbered, key=lambda one: bool(one[1].strip())):
        if filled:
            paragraph = list(group)
            yield f"line {paragraph[0][0]}", "\n".join(line for _, line in paragraph)


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        remedy = "Give it as JSONL, or run `mix vllm.setup --with quantize`."
        raise _wrong(f"`{path}`", "there is no pyarrow here to read it", remedy) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise _wrong(f"`{path}`", f"it cannot be read ({error})", "Repeat its download.") from error
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _item(item: Any, where: str) -> str | list[Any]:
    """A text, or the messages of a conversation."""
    if isinstance(item, _Json):
        item = json_files.parse(item)
    match item:
        case str():
            return item
        case {"text": str(text)}:
            return text
        case {"prompt": str(prompt), "completion": str(completion)}:
            return prompt + completion
        case {"messages": list(messages)} if messages and all(map(_is_message, messages)):
            return messages
    keys = ", ".join(f"`{name}`" for name in item) if isinstance(item, Mapping) else ""
    found = f"it has {keys}" if keys else f"it is {item!r:.60}"
    remedy = f"Give a string, or a map with {_SHAPES} (maps with `role` and `content`)."
    raise _wrong(where, f"there is no text in it: {found}", remedy)


def _parts(item: str | list[Any]) -> list[str]:
    """The words of a text, or of a conversation."""
    return [item] if isinstance(item, str) else [message["content"] for message in item]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def _wrong(place: str, what: str, remedy: str) -> BridgeError:
    return BridgeError(
        "invalid_option",
        f"Calibration: {place}: {what}.",
        {"option": "calibration", "place": place},
        remedy=remedy,
    )


class _Template:
    """The chat template of a model, read when the first conversation comes."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._tokenizer: Any = None

    def text(self, item: str | list[Any], where: str) -> str:
        if isinstance(item, str):
            return item
        self.check(where)
        try:
            return str(self._tokenizer.apply_chat_template(item, tokenize=False))
        except Exception as error:  # of Jinja, or what the template itself raises
            what = f"the model's chat template does not take it ({error})"
            raise _wrong(where, what, "Give a conversation as the model knows them.") from error

    def check(self, where: str) -> None:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._model)
        if not self._tokenizer.chat_template:
            what = "it is a conversation, and the model has no chat template"
            raise _wrong(where, what, "Give texts.")


def _spread(items: Sequence[T], count: int) -> list[T]:
    """No more than so many of the items, from all over them."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
