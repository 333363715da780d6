"""The fields of a ``config.json``, which anybody may have written: one that can mean nothing is
refused by its name where it is read.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

from vllm_bridge.errors import BridgeError

# No model has a number that is larger, and products of some of these are still floats.
_MOST: Final = 2**53

_SHOWN: Final = 60


class Fields(dict[str, Any]):
    """A part of a config. What reads a number that is none or is too large to be of a model, or a
    field that is not there by ``[]``, gets the error ``invalid_checkpoint``.

    Args:
        fields: as they are in the file
        place: the field that they are the value of; None for those of the model
    """

    def __init__(self, fields: Mapping[str, Any], place: str | None = None) -> None:
        super().__init__(fields)
        self._place = place
        self._read: list[str] = []

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Refuses the field that was read last where what is made of it fails."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._refuse(error)

    def number(self, *names: str) -> int:
        """The first of these fields that is a whole number and not 0; else 0."""
        return next(
            (found for name in names if isinstance(found := self.get(name), int) and found), 0
        )

    def replaced(self, others: Mapping[str, Any]) -> "Fields":
        """These, with others in their place."""
        return Fields({**self, **others}, self._place) if others else self

    def get(self, name: str, default: Any = None) -> Any:
        self._read[:] = [name]
        value = super().get(name, default)
        if isinstance(value, float | int) and not -_MOST <= value <= _MOST:  # NaN neither
            self._refuse()
        return value

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            kind = f" of a model of the type `{self['model_type']}`" if "model_type" in self else ""
            raise _invalid(f"The config.json{kind} has no {self._named(name)}.", name)
        return self.get(name)

    def _refuse(self, error: Exception | None = None) -> NoReturn:
        (name,) = self._read
        raise _invalid(
            f"What the model's config.json has as {self._named(name)} cannot be understood: "
            f"{_shown(super().get(name))}.",
            name,
        ) from error

    def _named(self, name: str) -> str:
        return f"`{name}`" if self._place is None else f"`{name}` of `{self._place}`"


def _invalid(message: str, field: str) -> BridgeError:
    return BridgeError(
        "invalid_checkpoint",
        message,
        {"field": field},
        remedy="Compare it with the one that the model was published with.",
    )


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > _MOST:
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
