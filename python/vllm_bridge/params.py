"""What the caller gave, checked against vLLM's own declarations.

Nothing here lists an option, a parameter or an allowed value: names come from the fields of
``AsyncEngineArgs`` and ``SamplingParams``, types from their annotations, and what vLLM alone
knows it checks itself when the objects are made.
"""

import ast
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec
import pydantic

from vllm_bridge import vllm_source
from vllm_bridge.errors import BridgeError, unknown_name
from vllm_bridge.redaction import HIDDEN, is_secret, redact_all

# Fields of SamplingParams that vLLM, or this package, sets itself: how outputs are delivered,
# and what vLLM derives from the other fields.
_NOT_FROM_OUTSIDE = {"output_kind", "skip_clone", "output_text_buffer_length"}

_ADAPTER_CONFIG = pydantic.ConfigDict(arbitrary_types_allowed=True)


class Field:
    """One option: its name, its declared type, and how a value of it is checked."""

    def __init__(self, name: str, hint: Any, default: Any) -> None:
        self.name = name
        self.hint = hint
        self.default = default

    @functools.cached_property
    def _adapter(self) -> pydantic.TypeAdapter[Any] | None:
        # Pydantic refuses a config for types that bring their own, and has no schema at all
        # for a few (a torch.dtype, a class of executors); those vLLM checks itself.
        for config in (None, _ADAPTER_CONFIG):
            try:
                return pydantic.TypeAdapter(self.hint, config=config)
            except pydantic.PydanticUserError:
                continue
        return None

    def check(self, value: Any) -> Any:
        """The value as vLLM wants it.

        Raises:
            BridgeError: ``invalid_option``, with the option, what came and what is allowed
        """
        if value is None and self.default is None:
            return None
        value = self._enum_member(value)
        if self._adapter is None:
            return value
        try:
            # A number in a string is somebody's mistake; a list may well become a set, and a
            # map one of vLLM's config objects.
            self._check_keys(value)
            return self._adapter.validate_python(value, strict=not isinstance(value, dict | list))
        except pydantic.ValidationError as error:
            raise invalid_value(self.name, value, _reasons(error, value), self.allowed()) from error
        except Exception as error:
            # What the class of a nested value thinks of it; vLLM's raise what they please.
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise invalid_value(self.name, value, [reason]) from error

    def allowed(self) -> list[Any]:
        """The values that the type names one by one; empty where it does not."""
        return [
            value
            for part in self._parts
            if typing.get_origin(part) is typing.Literal
            for value in typing.get_args(part)
        ] + [member.name for enumeration in self._enums for member in enumeration]

    def _check_keys(self, value: Any) -> None:
        # Pydantic drops the keys that a standard dataclass does not have.
        if not isinstance(value, dict):
            return
        classes = [part for part in self._parts if dataclasses.is_dataclass(part)]
        if len(classes) == 1:
            names = [field.name for field in dataclasses.fields(classes[0]) if field.init]
            for key in value:
                if key not in names:
                    raise ValueError(unknown_name("key", str(key), names).message)

    # Of a hint, which is the same for all requests.
    @functools.cached_property
    def _parts(self) -> list[Any]:
        return _parts(self.hint)

    @functools.cached_property
    def _enums(self) -> list[type[enum.Enum]]:
        return [
            part for part in self._parts if isinstance(part, type) and issubclass(part, enum.Enum)
        ]

    def _enum_member(self, value: Any) -> Any:
        if isinstance(value, str | int) and not isinstance(value, bool):
            for enumeration in self._enums:
                for member in enumeration:
                    if value == member.value or str(value).upper() == member.name.upper():
                        return member
        return value


def checked(kind: str, given: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """What was given, as vLLM wants it.

    Args:
        kind: what one of them is called in an error

    Raises:
        BridgeError: ``invalid_option``
    """
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise unknown_name(kind, name, fields)
        values[name] = fields[name].check(value)
    return values


def engine_fields() -> dict[str, Field]:
    """Every engine argument of the installed vLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {
        field.name: Field(
            field.name,
            # A type that vLLM names in a string exists for type checkers only.
            Any if isinstance(field.type, str) else field.type,
            field.default if field.default is not dataclasses.MISSING else field.default_factory,
        )
        for field in dataclasses.fields(AsyncEngineArgs)
        if field.init and not field.name.startswith("_")
    }


# Engine options of this library's own, which are taken out before vLLM gets the others.
OWN: typing.Final = ("subfolder", "isq", "isq_cache")


def check_option_names(options: Mapping[str, Any]) -> None:
    """Refuses engine options that neither vLLM nor this library has, without importing vLLM.

    Raises:
        BridgeError: ``invalid_option``
    """
    names = engine_option_names()
    for name in options:
        if names and name not in (*names, *OWN):
            raise unknown_name("engine option", name, (*names, *OWN))


@functools.cache
def engine_option_names() -> tuple[str, ...]:
    """The names of all engine arguments of the installed vLLM, read from its source, which takes a
    tenth of a second and an import ten; none where they are not found there."""
    module = vllm_source.module("engine", "arg_utils")
    return tuple(
        field.target.id
        for node in (module.body if module else ())
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
        and not ast.unparse(field.annotation).startswith("ClassVar")
    )


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Engine options with every name known and every value of its declared type.

    Raises:
        BridgeError: ``invalid_option``
    """
    fields = engine_fields()
    checked = {}
    for name, value in options.items():
        if name not in fields:
            raise unknown_name("engine option", name, fields)
        checked[name] = fields[name].check(value)
    return checked


class SamplingParamsFactory:
    """Makes ``SamplingParams`` from what came over the wire.

    Args:
        defaults: the model's own defaults, used where a request does not say
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        hints = typing.get_type_hints(SamplingParams, include_extras=True)
        self._fields = {
            field.name: Field(field.name, hints[field.name], field.default)
            for field in msgspec.structs.fields(SamplingParams)
            if not field.name.startswith("_") and field.name not in _NOT_FROM_OUTSIDE
        }
        self._defaults = dict(defaults)
        # Each object is made for one request, so vLLM need not copy it.
        self._make = functools.partial(SamplingParams, skip_clone=True)
        self._kinds = {False: RequestOutputKind.FINAL_ONLY, True: RequestOutputKind.DELTA}

    @property
    def names(self) -> list[str]:
        return list(self._fields)

    def make(self, given: Mapping[str, Any], *, stream: bool = False) -> Any:
        """The parameters of one request.

        Args:
            stream: whether outputs come as deltas, and not once at the end

        Raises:
            BridgeError: ``invalid_option``
            VLLMValidationError: vLLM found a value out of range
        """
        values = dict(self._defaults)
        for name, value in given.items():
            field = self._fields.get(name)
            if field is None:
                raise self._unknown(name)
            values[name] = field.check(value)
        return self._make(output_kind=self._kinds[stream], **values)

    def _unknown(self, name: str) -> BridgeError:
        from vllm.sampling_params import StructuredOutputsParams

        # What vLLM's own parameters had at their top, and other servers still have.
        inner = {field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init}
        if name not in inner:
            return unknown_name("sampling parameter", name, self._fields)
        return BridgeError(
            "invalid_option",
            f"Unknown sampling parameter `{name}`.",
            {"option": name, "nearest": "structured_outputs"},
            remedy=f"It goes into `structured_outputs`, as `structured_outputs: [{name}: …]`.",
        )


def invalid_value(
    option: str, value: Any, reasons: list[str], allowed: list[Any] | None = None
) -> BridgeError:
    """The error for a value that an option cannot have."""
    came = HIDDEN if is_secret(option) else value
    details = {"option": option, "value": came, "errors": reasons}
    why = remedy = ""
    if allowed:
        remedy = "Allowed: " + ", ".join(str(item) for item in allowed) + "."
        details["allowed"] = allowed
    else:
        why = " " + "; ".join(reasons).rstrip(".") + "."
    shown = repr(redact_all(came))
    if len(shown) > 100:
        shown = shown[:100] + "…"
    return BridgeError("invalid_option", f"`{option}` cannot be {shown}.{why}", details, remedy)


def _reasons(error: pydantic.ValidationError, value: Any) -> list[str]:
    reasons = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        message = item["msg"].removeprefix("Value error, ")
        path = _path(item["loc"], value)
        reason = f"{path}: {message}" if path else message
        if reason not in reasons:
            reasons.append(reason)
    return reasons


def _path(loc: tuple[int | str, ...], value: Any) -> str:
    """Where in a nested value an error lies. Pydantic's location also names the branches of
    unions, which say nothing to the caller; what is a key or an index of the value stays."""
    path = []
    part: Any
    for part in loc:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
            path.append(str(part))
    return ".".join(path)


def _parts(hint: Any) -> list[Any]:
    """The alternatives of a type, with unions and annotations taken apart."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [part for arg in typing.get_args(hint) for part in _parts(arg)]
    if origin is typing.Annotated:
        return _parts(typing.get_args(hint)[0])
    return [hint]
