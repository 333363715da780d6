"""The table of the quantization methods of the installed vLLM and its plugins, with what this
library knows of them and what runs on this device. Imports vLLM.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_bridge import diagnosis
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import availability, naming, registry, scheme
from vllm_bridge.quantization.method import Method

_BITS = re.compile(r"(?:fp|int)(\d+)")


class Use(NamedTuple):
    """A format of checkpoints, or what is made of a plain model while it is loaded.

    Args:
        name: of the format; of what is made, what it is in words
        bits: of each weight, where they are known
        runs: whether it does on this device; None where one layer does not tell
        why_not: why it does not, or cannot be told
    """

    name: str
    bits: float | None
    runs: bool | None
    why_not: str | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A method.

    Args:
        name: vLLM's
        title: how people write it
        other_names: by which it can be named as well
        bits: that its weights may have, as far as that is known
        formats: the usual ones of its checkpoints
        pre_quantized: whether it loads checkpoints that were quantized with it
        in_flight: what it makes of a plain model; None where it only loads checkpoints
        dtype: the engine's ``dtype`` that has a plain model quantized with it
        extra: the packages that it needs, as ``mix vllm.setup --with`` calls them
        installed: whether they are there
        capability: the least compute capability of an NVIDIA GPU: 7.5
        runs: whether any use of it runs on this device; None where none can be tried
        why_not: why not
        note: what users should know of it
    """

    name: str
    title: str
    other_names: tuple[str, ...]
    bits: tuple[float, ...]
    formats: tuple[Use, ...]
    pre_quantized: bool
    in_flight: Use | None
    dtype: str | None
    extra: str | None
    installed: bool
    capability: float | None
    runs: bool | None
    why_not: str | None
    note: str | None

    def to_wire(self) -> dict[str, Any]:
        wire = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return wire | {
            "formats": [use._asdict() for use in self.formats],
            "in_flight": self.in_flight and self.in_flight._asdict(),
        }


def rows() -> tuple[Row, ...]:
    """All of them, by name. Blocks for the seconds of vLLM's import."""
    return tuple(sorted(map(_row, _groups()), key=lambda row: row.name))


def _groups() -> Iterator[tuple[str, ...]]:
    """The names of each method, the one that is used here first: vLLM has several for some."""
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
    from vllm.model_executor.layers.quantization import get_quantization_config

    groups: dict[Any, list[str]] = {}
    for name in naming.methods():
        own = name in ONLINE_QUANT_SHORTHAND_NAMES
        groups.setdefault(name if own else get_quantization_config(name), []).append(name)
    for names in groups.values():
        known = [name for name in names if registry.of(name).name == name]
        yield tuple(dict.fromkeys([*known, *names]))
    for name in registry.extras():
        if name not in naming.methods():
            yield (name,)  # its plugin is not installed


def _row(names: tuple[str, ...]) -> Row:
    name, *aliases = names
    method = registry.of(name)
    if method.name != name:
        method = Method()  # one of several that are known by a common name
    missing, least = _missing(name), least_capability(name)
    refused = missing or _refused_by_platform(name)
    formats = tuple(_formats(method, refused))
    in_flight = _in_flight(name, method, refused)
    uses = [*formats, *([in_flight] if in_flight else [])]
    bits = {use.bits for use in uses if use.bits is not None} | set(method.bits) | _told_by(name)
    return Row(
        name=name,
        title=method.title or name,
        other_names=(*aliases, *method.other_names),
        bits=tuple(sorted(bits)),
        formats=formats,
        pre_quantized=bool(formats) or method.needs_checkpoint or _loads_checkpoints(name),
        in_flight=in_flight,
        dtype=method.online and method.online.dtype,
        extra=method.extra and method.extra.name,
        installed=missing is None,
        capability=least and least / 10,
        runs=_any(uses) if refused is None else False,
        why_not=refused or _why_not(uses),
        note=method.note or None,
    )


def _formats(method: Method, refused: str | None) -> Iterator[Use]:
    for name, config in method.formats:
        yield _use(name, method.scheme(config).bits, refused or availability.of_formats()[name])


def _in_flight(name: str, method: Method, refused: str | None) -> Use | None:
    online, known = availability.of_methods_online(), method.online
    if known is not None:
        return _use(known.words, scheme.digits(known.words), refused or online.get(name))
    if name in online:
        return _use(name, next(iter(_told_by(name)), None), refused or online[name])
    if _is_online(name):
        return Use(name, None, None, "What it makes is said by `quantization_config`.")
    return None


def _told_by(name: str) -> set[int]:
    """The bits that vLLM's names tell of: ``fp8_per_channel``."""
    found = _BITS.search(name)
    return {int(found[1])} if found else set()


def _is_online(name: str) -> bool:
    """Whether a method is vLLM's own that has nothing to do with checkpoints."""
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    return (
        name in ONLINE_QUANT_SHORTHAND_NAMES
        or get_quantization_config(name) is OnlineQuantizationConfig
    )


def _loads_checkpoints(name: str) -> bool:
    """Whether a method of which no formats are known has some: one that cannot be without."""
    if name not in naming.methods():
        return True
    return not _is_online(name) and availability.online_config(name) is None


def _use(name: str, bits: float | None, refused: str | None) -> Use:
    if refused is None:
        return Use(name, bits, True, None)
    if refused == availability.EXPERTS_ONLY:
        return Use(name, bits, None, "It has to do with the experts of mixtures only.")
    return Use(name, bits, False, diagnosis.readable(refused).removesuffix("Reasons:").rstrip())


def _any(uses: list[Use]) -> bool | None:
    found = [use.runs for use in uses]
    if any(found):
        return True
    return False if found and None not in found else None


def _why_not(uses: list[Use]) -> str | None:
    if any(use.runs for use in uses):
        return None
    said = (use.why_not for use in uses if use.why_not)
    return next(said, "It can only be tried with a checkpoint.")


def _missing(name: str) -> str | None:
    try:
        availability.check_packages(name)
    except BridgeError as error:
        return error.message
    return None


def _refused_by_platform(name: str) -> str | None:
    """What vLLM says of the device before it looks at a layer."""
    from vllm.platforms import current_platform

    try:
        current_platform.verify_quantization(name)
    except ValueError as error:
        return diagnosis.readable(str(error))
    least = least_capability(name)
    if least is None or not current_platform.is_cuda():
        return None
    found = current_platform.get_device_capability()
    if found is None or found.to_int() >= least:
        return None
    has = f"{found.major}.{found.minor}"
    return f"It needs a GPU of compute capability {least / 10}; this one has {has}."


def least_capability(name: str) -> int | None:
    """The least compute capability of an NVIDIA GPU that vLLM has a method for, in tenths as it
    counts them: 75 is 7.5. None where it does not say."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    if name not in naming.methods():
        return None
    least: int = get_quantization_config(name).get_min_capability()
    return least if least > 0 else None
