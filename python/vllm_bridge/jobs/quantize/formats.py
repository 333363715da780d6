"""The formats that models can be made in, each with the module that makes it.

Nothing of a format is known here but where it is: what it can do is asked of its module, which asks
its library.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from vllm_bridge.errors import BridgeError, unknown_name
from vllm_bridge.jobs.quantize import calibration
from vllm_bridge.jobs.quantize.producer import Producer, Source, all_options
from vllm_bridge.quantization import registry

# The module of each format, by vLLM's name of it.
MODULES = {
    "gguf": "gguf",
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
}

# What labels are made of: names of folders that no file system and no shell objects to.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclasses.dataclass(frozen=True)
class Output:
    """One thing that is to be made.

    Args:
        producer: makes it
        options: all of the producer's
        label: tells it from the other outputs of its source
        texts: as the producer's ``texts`` says
    """

    producer: Producer
    options: Mapping[str, Any]
    label: str
    texts: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "format": self.producer.NAME,
            "label": self.label,
            "options": dict(self.options),
            "texts": self.texts,
        }


def producer(name: str) -> Producer:
    """The producer of a format, in any spelling.

    Raises:
        BridgeError: ``invalid_option``
    """
    named = registry.meant_by(name).name or name.strip().lower().replace("_", "-")
    if named not in MODULES:
        error = unknown_name("format", name, MODULES)
        error.remedy = f"{error.remedy} Models are made in: {', '.join(MODULES)}.".strip()
        raise error
    found: Any = importlib.import_module(f"{__package__}.{MODULES[named]}")
    return found  # type: ignore[no-any-return]


def output(name: str, given: Mapping[str, Any] | str | None) -> Output:
    """A format and its options, checked.

    Args:
        given: options by their names; ``as`` among them says what the output is called, and
            ``preset`` is a word that the others go over. A word alone stands for the options that
            the format knows it for.

    Raises:
        BridgeError: ``invalid_option``; ``quantize_not_installed`` where its library is not there
    """
    made_by = producer(name)
    try:
        if isinstance(given, str):
            given = _preset(made_by, given)
        left = dict(given or {})
        called = left.pop("as", None)
        if (word := left.pop("preset", None)) is not None:
            left = {**_preset(made_by, str(word)), **left}
        options = all_options(made_by, left)
        made_by.check(None, options)
        label = made_by.label(options) if called is None else called
    except ModuleNotFoundError as error:
        raise _not_installed(made_by, error) from error
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise BridgeError(
            "invalid_option",
            f"`as` is {label!r}, which cannot be the name of a folder.",
            {"option": "as", "value": label},
            remedy="Use letters, digits, `.`, `_` and `-`, and begin with a letter or a digit.",
        )
    return Output(made_by, options, label, made_by.texts(options))


def outputs(
    asked: Sequence[tuple[str, Mapping[str, Any] | str | None]],
    source: Source | None = None,
    texts: calibration.Calibration | None = None,
) -> list[Output]:
    """All that a job is to make, checked before anything starts: each for itself, with the source,
    and whether their labels tell them apart.

    Raises:
        BridgeError: the first that is wrong
    """
    found = [output(name, options) for name, options in asked]
    if not found:
        raise BridgeError(
            "invalid_option",
            "Nothing is to be made.",
            {"option": "to", "allowed": list(MODULES)},
            remedy=f"Name at least one format: {', '.join(MODULES)}.",
        )
    labels = [one.label.lower() for one in found]  # some file systems do not tell them apart
    for one in found:
        if labels.count(one.label.lower()) > 1:
            raise BridgeError(
                "invalid_option",
                f"Two outputs would be called `{one.label}`.",
                {"option": "to", "label": one.label},
                remedy="Leave one out, or give one of them another name with `as`.",
            )
    if source is not None:
        source.check()
        for one in found:
            one.producer.check(source, one.options)
    if texts is not None:
        if all(one.texts == "unused" for one in found):
            raise BridgeError(
                "invalid_option",
                "Calibration texts have no use here: none of these formats is calibrated.",
                {"option": "calibration"},
                remedy="Leave `calibration` out.",
            )
        calibration.check(texts, None if source is None else source.path)
    return found


def described() -> list[dict[str, Any]]:
    """All that models can be made in: what each format knows words for, its options as its library
    declares them, and why nothing can be made in it here, if that is so."""
    return [_described(name) for name in MODULES]


def _described(name: str) -> dict[str, Any]:
    made_by = producer(name)
    refused = None
    options, words = [], []
    try:
        options = [option.to_wire() for option in made_by.options().values()]
        words = list(made_by.presets())
    except ModuleNotFoundError as error:
        refused = _not_installed(made_by, error).message
    except BridgeError as error:
        refused = error.message
    return {"format": name, "types": words, "options": options, "refused": refused}


def _preset(made_by: Producer, word: str) -> Mapping[str, Any]:
    known = made_by.presets()
    for name, options in known.items():
        if name.upper() == word.strip().upper():
            return options
    error = unknown_name(f"kind of {made_by.NAME}", word, known)
    listed = ", ".join(known)
    said = f"There are: {listed}." if known else f"Give {made_by.NAME} its options by their names."
    error.remedy = f"{error.remedy} {said}".strip()
    raise error


def _not_installed(made_by: Producer, error: ModuleNotFoundError) -> BridgeError:
    lacking = (error.name or "").partition(".")[0]
    if find_spec("torch") is not None and find_spec("vllm") is None and lacking:
        what = f"The quantizing environment lacks `{lacking}`, which {made_by.NAME} is made with."
    else:
        what = f"This Python lacks `{lacking}`, which {made_by.NAME} is made with."
    return BridgeError(
        "quantize_not_installed",
        what,
        {"format": made_by.NAME, "module": error.name},
        remedy="Run `mix vllm.setup --with quantize`.",
    )
