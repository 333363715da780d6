"""Devices by their names, so that any machine can be asked about any other; and this machine's own.

``devices.toml`` has the table.
"""

import contextlib
import csv
import dataclasses
import functools
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from vllm_bridge import memory, versions
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.memory import GIB

Kind = Literal["cuda", "rocm", "xpu", "hpu", "cpu", "gpu"]


class Device(NamedTuple):
    """A device that a model may run on.

    Args:
        name: as its vendor calls it, or as the user did
        kind: of vLLM's platforms; ``"gpu"`` for one of which only the size is known
        memory: bytes that programs can have
        capability: NVIDIA's compute capability, or what torch says in its place of AMD's devices;
            None where there is none or it is not known
        bandwidth: of the memory, in bytes per second; None where it is not known
        source: where the figures are from
    """

    name: str
    kind: Kind
    memory: int
    capability: tuple[int, int] | None = None
    bandwidth: float | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A device of the table.

    Args:
        name: without the size of its memory
        words: of its name
        others: further words by which it may be called
        sizes: how the size of its memory is written
    """

    name: str
    device: Device
    words: frozenset[str]
    others: frozenset[str]
    sizes: frozenset[str]


# What vendors write around the name of a device.
_NOISE: Final = frozenset({
    "nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "intel", "habana", "data", "center",
    "gpu", "graphics", "card", "generation", "edition", "accelerator", "tm", "r",
})  # fmt: skip

# "2x A10G", with any of the signs for "times".
_COUNT = re.compile(r"(?P<count>[0-9]{1,3})\s*[x\u00d7*]\s*(?P<name>.+)", re.IGNORECASE)
_COUNT_AFTER = re.compile(r"(?P<name>.+?)\s*[x\u00d7*]\s*(?P<count>[0-9]{1,3})", re.IGNORECASE)
_AMOUNT: Final = r"[0-9]{1,6}(?:\.[0-9]{1,6})?"
_SIZE = re.compile(rf"({_AMOUNT})\s*(?:GiB|GB|G)", re.IGNORECASE)
_CPU = re.compile(
    rf"cpu[\s,:]+(?P<size>{_AMOUNT})\s*(?:GiB|GB|G)(?:[\s,]+(?P<speed>{_AMOUNT})\s*GB/s)?",
    re.IGNORECASE,
)

_WORD: Final = r"[a-z0-9.]+"

# Error correction without memory of its own takes so much of all.
_ECC: Final = 1 / 16

# Of a name that is nobody's.
_SHOWN: Final = 60

_GIGA: Final = 10**9

_NVIDIA_SMI: Final = (
    "nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap",
    "--format=csv,noheader,nounits",
)  # fmt: skip

_SMI_COLUMNS: Final = 5
_SMI_SECONDS: Final = 10


def named(given: str | Sequence[str]) -> tuple[Device, ...]:
    """The devices that a user means.

    Args:
        given: ``"H100"``, ``"NVIDIA H100 80GB HBM3"``, ``"2x RTX 4090"``, ``"24GiB"`` for any
            device of that size, ``"cpu 64GiB"`` or ``"cpu 64GiB 80GB/s"``; or several of them.
            GB and GiB are the same here, as with memory modules

    Raises:
        BridgeError: ``invalid_option`` for one that is not known, with the nearest that is
    """
    if not isinstance(given, str):
        if not given or not all(isinstance(text, str) for text in given):
            raise BridgeError(
                "invalid_option",
                "`devices` is a list of names of devices.",
                {"option": "devices", "value": list(given)},
                remedy="Give such as `24GiB` or `RTX 4090`.",
            )
        devices = tuple(device for text in given for device in named(text))
        kinds = {device.kind for device in devices}
        if len(kinds) > 1 and ("cpu" in kinds or len(kinds - {"gpu"}) > 1):
            raise BridgeError(
                "invalid_option",
                f"No engine runs on devices of several kinds ({', '.join(sorted(kinds))}).",
                {"option": "devices", "value": list(given)},
                remedy="Give devices of one kind.",
            )
        return devices
    text = " ".join(given.split())
    count, name = 1, text
    if match := _COUNT.fullmatch(text) or _COUNT_AFTER.fullmatch(text):
        count, name = int(match["count"]), match["name"]
    if not count:
        raise _unknown(text)
    return (_one(name),) * count


def here() -> tuple[Device, ...]:
    """The devices of this machine that vLLM would use: NVIDIA's, as far as
    ``CUDA_VISIBLE_DEVICES`` has them, or the processor where there are none or vLLM is built for
    it."""
    found = () if versions.is_cpu_build() else tuple(_nvidia())
    return found or (Device("cpu", "cpu", memory.available_cpu(), source="/proc/meminfo"),)


def every() -> tuple[Device, ...]:
    """All devices of the table."""
    return tuple(entry.device for entry in _table())


def _one(name: str) -> Device:
    match = _CPU.fullmatch(name)
    if match and all(float(amount) for amount in match.groups() if amount is not None):
        speed = None if match["speed"] is None else float(match["speed"]) * _GIGA
        return Device(name, "cpu", int(float(match["size"]) * GIB), None, speed, name)
    if (match := _SIZE.fullmatch(name)) and float(match[1]):
        return Device(name, "gpu", int(float(match[1]) * GIB), source=name)
    entry = None if "," in name else _entry(name)  # several are a list
    if entry is None:
        raise _unknown(name)
    return entry.device


def _entry(name: str) -> _Entry | None:
    """The device of the table whose name has all of these words and the fewest others. Sizes alone
    are none's name."""
    words = _words(name)
    matching = [
        entry
        for entry in _table()
        if words - entry.sizes and words <= entry.words | entry.others | entry.sizes
    ]
    return min(matching, key=lambda entry: len(entry.words - words), default=None)


def _words(text: str) -> frozenset[str]:
    text = re.sub(r"(\d)\s*(?:GiB|GB)\b", r"\1gb", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(rtx|titan|gaudi)(\d)", r"\1 \2", text.lower())
    return frozenset(re.findall(_WORD, text)) - _NOISE


def _unknown(name: str) -> BridgeError:
    names: dict[str, str] = {}
    for entry in _table():
        for known in (entry.name, entry.name.split()[0]):
            names.setdefault(known.lower(), entry.device.name)
    words = re.findall(_WORD, name.lower())
    found = nearest(" ".join(word for word in words if word not in _NOISE), names)
    suggestion = names[found] if found else None
    return BridgeError(
        "invalid_option",
        f"No device `{name if len(name) <= _SHOWN else name[:_SHOWN] + '…'}` is known.",
        {"option": "device", "value": name, "nearest": suggestion},
        remedy=did_you_mean(suggestion)
        + "Of one that is not in the table, give the size: `24GiB`, or `cpu 64GiB`.",
    )


@functools.cache
def _table() -> tuple[_Entry, ...]:
    path = os.path.join(os.path.dirname(__file__), "devices.toml")
    with open(path, "rb") as file:
        table = tomllib.load(file)
    return tuple(
        _read(kind, found, table["sources"])
        for kind, devices in table["devices"].items()
        for found in devices
    )


def _read(kind: Kind, found: Mapping[str, Any], sources: Mapping[str, str]) -> _Entry:
    name, size = found["name"], found["memory"]
    device = Device(
        f"{name} {size}GB",
        kind,
        int(size * GIB * (1 - _ECC if found.get("ecc") else 1)),
        _capability(found.get("capability")),
        found["bandwidth"] * float(_GIGA),
        sources[found["source"]],
    )
    sizes = frozenset({f"{size}gb", str(size)})
    return _Entry(name, device, _words(name), _words(found.get("also", "")), sizes)


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _nvidia() -> Iterator[Device]:
    try:
        said = subprocess.run(  # noqa: S603 - a program of the system's, with fixed arguments
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if visible is None else [word.strip() for word in visible.split(",")]
    for row in csv.reader(said.splitlines(), skipinitialspace=True):
        if len(row) != _SMI_COLUMNS:
            continue
        index, uuid, name, mebibytes, capability = row
        if allowed is not None and index not in allowed and uuid not in allowed:
            continue
        with contextlib.suppress(ValueError):  # of a device that shares the processor's memory
            entry = _entry(f"{name} {int(mebibytes) // 1024}GB") or _entry(name)
            yield Device(
                name,
                "cuda",
                int(mebibytes) * 2**20,
                _capability(capability),
                None if entry is None else entry.device.bandwidth,
                "nvidia-smi",
            )
