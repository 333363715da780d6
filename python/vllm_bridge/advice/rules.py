"""The rules of ``rules.toml``, as values."""

import functools
import os
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

# What goals weigh: a number from 0 to 1 of each format; see ``ranking``.
Mark = Literal["quality", "one", "many", "memory", "training"]


class Source(NamedTuple):
    """Where a figure is from."""

    title: str
    url: str


class Loss(NamedTuple):
    """By how much a format is worse than 16 bits.

    Args:
        metric: ``"perplexity"`` (percent that it rises), ``"accuracy"`` (percent of itself that it
            falls) or ``"kl"`` (divergence of the demo model)
        value: of it
        source: a name of ``Rules.sources``
        name: the class that this is
        mark: of that class, from 0 to 1
        derived: how it follows from what the source says; empty where that says it itself
    """

    metric: str
    value: float
    source: str
    name: str
    mark: float
    derived: str = ""

    @property
    def words(self) -> str:
        """``"small: accuracy falls by 1.6 %"``."""
        if self.name == "none":
            return "none"
        if self.metric == "kl":
            return f"{self.name}: KL divergence {self.value:.5f} on the demo model"
        verb = "falls" if self.metric == "accuracy" else "rises"
        digits = 1 if self.value >= 1 else 2
        return f"{self.name}: {self.metric} {verb} by {self.value:.{digits}f} %"


class Training(NamedTuple):
    """What training an adapter over a format takes.

    Args:
        bytes: for each parameter of the model, with everything that training needs
        speed: relative to training over 16 bits
        source: a name of ``Rules.sources``
    """

    bytes: float
    speed: float
    source: str


class Format(NamedTuple):
    """What is known of a format.

    Args:
        name: see ``rules.toml``
        order: the place in the file, which decides between equals
        loss: of quality
        calibration: whether making one needs text
        in_flight: the options that make it of the plain model while that loads; None where none do
        made_with: what makes a checkpoint of it; empty where nothing does
        training: None where no adapters are trained over it
        is_dense: whether the experts of mixtures cannot have it
        note: what to know beside that
    """

    name: str
    order: int
    loss: Loss
    calibration: bool
    in_flight: Mapping[str, Any] | None
    made_with: str
    training: Training | None
    is_dense: bool
    note: str


class Speed(NamedTuple):
    """Speed relative to the plain model on the same device.

    Args:
        one: of one sequence
        many: of many together
        source: of the first; a name of ``Rules.sources``
        many_source: of the second
        unpacked: whether the weights take the memory of 16 bits
        note: how it is computed
        derived: how it follows from what the sources say; empty where they say it themselves
    """

    one: float
    many: float
    source: str
    many_source: str
    unpacked: bool = False
    note: str = ""
    derived: str = ""


class Goal(NamedTuple):
    """What a model is wanted for.

    Args:
        name: as users call it
        words: what it means
        weights: of each mark; together 1
    """

    name: str
    words: str
    weights: Mapping[Mark, float]


class Scope(NamedTuple):
    """The formats and the devices that something is said of."""

    formats: tuple[str, ...]
    kind: str
    since: tuple[int, ...]
    until: tuple[int, ...] | None

    def covers(self, name: str, kind: str, capability: tuple[int, int] | None) -> bool:
        # A method's name stands for all of its formats.
        if name not in self.formats and name.partition(" (")[0] not in self.formats:
            return False
        if self.kind == "any":
            return True
        if kind != self.kind:
            return False
        if not self.since and self.until is None:
            return True
        return (
            capability is not None
            and capability >= self.since
            and (self.until is None or capability < self.until)
        )


class Rules(NamedTuple):
    """All rules.

    Args:
        sources: by the names that figures have them by
        goals: by name
        formats: by name, in the order of the file
        rows: of speed, with the formats and devices of each; of several for one the first counts
    """

    sources: Mapping[str, Source]
    goals: Mapping[str, Goal]
    formats: Mapping[str, Format]
    rows: tuple[tuple[Scope, Speed], ...]

    def speed(self, name: str, kind: str, capability: tuple[int, int] | None) -> Speed | None:
        """Of a format on a device; None where nothing is known of it.

        Args:
            kind: of the device: ``"cuda"``, ``"rocm"``, ``"xpu"``, ``"cpu"``, …
            capability: its compute capability, where it has one
        """
        found = (speed for scope, speed in self.rows if scope.covers(name, kind, capability))
        return next(found, None)


@functools.cache
def rules() -> Rules:
    """The rules of the file."""
    with open(os.path.join(os.path.dirname(__file__), "rules.toml"), "rb") as file:
        read = tomllib.load(file)
    classes = read["classes"]
    return Rules(
        sources={name: Source(**source) for name, source in read["sources"].items()},
        goals={name: Goal(name, **goal) for name, goal in read["goals"].items()},
        formats={
            found["name"]: _format(order, found, classes)
            for order, found in enumerate(read["formats"])
        },
        rows=tuple((_scope(found), _speed(found)) for found in read["speeds"]),
    )


def _format(order: int, found: Mapping[str, Any], classes: list[Mapping[str, Any]]) -> Format:
    training = found.get("training")
    return Format(
        name=found["name"],
        order=order,
        loss=_loss(found["loss"], classes),
        calibration=found.get("calibration", False),
        in_flight=found.get("in_flight"),
        made_with=found.get("made_with", ""),
        training=Training(**training) if training else None,
        is_dense=found.get("is_dense", False),
        note=found.get("note", ""),
    )


def _loss(found: Mapping[str, Any], classes: list[Mapping[str, Any]]) -> Loss:
    metric, value = found["metric"], found["value"]
    of = next(one for one in classes if value <= one.get(metric, float("inf")))
    derived = found.get("derived", "")
    return Loss(metric, value, found["source"], of["name"], of["mark"], derived)


def _scope(found: Mapping[str, Any]) -> Scope:
    until = found.get("until")
    return Scope(
        tuple(found["formats"]),
        found["kind"],
        tuple(found.get("since", ())),
        until and tuple(until),
    )


def _speed(found: Mapping[str, Any]) -> Speed:
    said = {name: found[name] for name in Speed._fields if name in found}
    return Speed(**{"many_source": found["source"]} | said)
