"""What a producer is: a module that quantizes models into one format, with a library of the field.

A producer is looked at long before it works, so that a module imports its library only within its
functions. ``formats`` finds the modules; the functions that all of them need are here. Nothing here
imports torch.
"""

import dataclasses
import functools
import inspect
import os
import shutil
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol

from vllm_bridge.checkpoints import models
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, unknown_name
from vllm_bridge.jobs.quantize.calibration import Texts

# How far a producer is: the phase, how much of it is done, and of how much.
Tell = Callable[[str, int, int], None]

# What the types of options are called in errors.
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_WORDS |= {list: "a list", dict: "a map"}

# How the names of weights end, and other files that a producer writes itself or nobody needs.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx")
_LEFT = ("config.json", "README.md")

# How the parts of a config are called that are about something else than text.
_SENSES = ("vision_", "audio_")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a producer, as its library declares it.

    Args:
        name: the library's
        types: those of its values; any where there are none
        default: what holds where it is not given; may be None whatever the types are
        allowed: the only values, where they can be counted
        doc: what it does, in a sentence
    """

    name: str
    types: tuple[type, ...] = ()
    default: Any = None
    allowed: tuple[Any, ...] = ()
    doc: str = ""

    def checked(self, value: Any) -> Any:
        """The value as the library takes it.

        Raises:
            BridgeError: ``invalid_option``
        """
        if value is None and self.default is None:
            return None
        if self.allowed:
            for one in self.allowed:
                if value == one and isinstance(value, bool) == isinstance(one, bool):
                    return one
                if isinstance(one, str) and isinstance(value, str) and value.upper() == one.upper():
                    return one
            raise self.refused(value, f"one of {', '.join(map(str, self.allowed))}")
        if float in self.types and type(value) is int:
            return float(value) if int not in self.types else value
        if self.types and type(value) not in self.types:
            raise self.refused(value, " or ".join(_WORDS.get(t, t.__name__) for t in self.types))
        return value

    def refused(self, value: Any, expected: str) -> BridgeError:
        return BridgeError(
            "invalid_option",
            f"`{self.name}` is {value!r}, not {expected}.",
            {"option": self.name, "value": value, "allowed": list(self.allowed)},
            remedy=self.doc,
        )

    def to_wire(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "types": [one.__name__ for one in self.types],
            "default": self.default,
            "allowed": list(self.allowed),
            "doc": self.doc,
        }


@dataclasses.dataclass(frozen=True)
class Source:
    """The plain model that is quantized.

    Args:
        path: of the folder with its safetensors, config and tokenizer
        work: a folder for what several outputs of it have in common; nothing is kept where it is
            None
    """

    path: str
    work: str | None = None

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """What its files say.

        Raises:
            BridgeError: ``model_not_found``, ``not_a_model`` or ``invalid_checkpoint``
        """
        return models.look_at(models.locate(self.path, {}), {})

    @property
    def takes_more_than_text(self) -> bool:
        """Whether its config has a part for pictures or sound."""
        return any(key.startswith(_SENSES) for key in self.checkpoint.config)

    def check(self) -> None:
        """Refuses what is no plain model in safetensors.

        Raises:
            BridgeError: also ``unsupported``
        """
        if not os.path.isdir(self.path):
            raise BridgeError(
                "unsupported",
                f"`{self.path}` is not a folder: a plain model is a folder with safetensors.",
                {"model": self.path},
                remedy="Name the model that it was made of.",
            )
        if self.checkpoint.quantization is not None:
            raise BridgeError(
                "unsupported",
                f"`{self.path}` is quantized already, with {self.checkpoint.description}: what "
                "that has lost would not come back.",
                {"model": self.path, "quantization": self.checkpoint.quant_method},
                remedy="Name the plain model that it was made of.",
            )
        if not any(name.endswith(".safetensors") for name in self.checkpoint.files):
            raise BridgeError(
                "unsupported",
                f"`{self.path}` has no safetensors, which is what is quantized.",
                {"model": self.path},
                remedy="Save it once more with transformers, or name a variant that has them.",
            )

    def copy_rest(self, out: str) -> None:
        """Gives the output what goes with the source's weights: the tokenizer, the chat template,
        the defaults of sampling; whatever the library has not written itself."""
        for name in sorted(os.listdir(self.path)):
            file, target = os.path.join(self.path, name), os.path.join(out, name)
            is_left = name in _LEFT or name.startswith(".") or name.endswith(_WEIGHTS)
            if os.path.isfile(file) and not is_left and not os.path.exists(target):
                shutil.copyfile(file, target)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a producer says of its output.

    Args:
        libraries: that made it: versions by names
        options: all that had an effect, defaults included
        notes: what users should know of it, such as a part that is left as it was; sentences
    """

    libraries: Mapping[str, str]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Producer(Protocol):
    """What each module has, as functions of the module."""

    NAME: str
    """vLLM's name of the format."""

    def options(self) -> Mapping[str, Option]:
        """Its options, asked of the library."""

    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """What the words mean that may stand for options: ``"Q4_K_M"`` in ``gguf:Q4_K_M``."""

    def texts(self, options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
        """Whether calibration texts have a use; where they are required and none are given, it is
        the default set."""

    def check(self, source: Source | None, options: Mapping[str, Any]) -> None:
        """Refuses what the library cannot do here, or with this model. The source is a plain model
        in safetensors; it is None where only the options are asked about.

        Raises:
            BridgeError: ``invalid_option`` or ``unsupported``, with the reason
        """

    def label(self, options: Mapping[str, Any]) -> str:
        """What an output with these options is called: ``Q4_K_M``, ``gptq-4bit-128g``."""

    def make(
        self,
        source: Source,
        options: Mapping[str, Any],
        texts: Texts | None,
        out: str,
        tell: Tell,
    ) -> Made:
        """Writes the output into the folder ``out``, which is there and empty. Blocks.

        Args:
            options: all of them, with defaults
            texts: for the calibration; None where none are used
            tell: to be called for each layer or tensor
        """


def all_options(producer: Producer, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with defaults for the rest.

    Raises:
        BridgeError: ``invalid_option``
    """
    known = producer.options()
    for name in given:
        if name not in known:
            raise unknown_name(f"option of {producer.NAME}", name, known)
    return {
        name: option.checked(given[name]) if name in given else option.default
        for name, option in known.items()
    }


def declared(
    function: Callable[..., Any],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    **better: Mapping[str, Any],
) -> dict[str, Option]:
    """The options that a library's function, class or dataclass declares by its signature.

    Args:
        only: the names of those that are meant; all where it is None
        without: the names of those that are not for users
        better: what is said of an option beside its signature, by the fields of ``Option``
    """
    try:
        hints = typing.get_type_hints(
            function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
        )
    except (NameError, TypeError):
        hints = {}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in without:
            continue
        if only is not None and name not in only:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        # Dataclasses have a sentinel in the place of what a factory makes.
        default = default if isinstance(default, bool | int | float | str | list | dict) else None
        of_default = () if default is None else (type(default),)
        said = {"types": _types(hints.get(name)) or of_default, "default": default}
        found[name] = Option(name, **(said | dict(better.get(name, {}))))
    return found


def _types(hint: Any) -> tuple[type, ...]:
    """The types of a hint, as far as they can come over the wire; none where it has others."""
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    plain = {typing.get_origin(part) or part for part in parts if part is not type(None)}
    if not plain or not plain <= _WORDS.keys():
        return ()
    return tuple(sorted(plain, key=lambda one: str(one.__name__)))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
