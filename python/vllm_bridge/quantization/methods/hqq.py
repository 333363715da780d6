"""HQQ: integers of 1 to 8 bits in groups, made without calibration."""

import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import torch_files
from vllm_bridge.checkpoints.checkpoint import Found
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.hqq import settings as configs
from vllm_bridge.quantization.hqq.settings import PACKINGS, Settings
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method, Online
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Of the library's own format: a dict of each layer's tensors and settings.
_FILE = "qmodel.pt"

# A scale and a zero point of 16 bits.
_SCALE_BITS = 32

# What a safetensors file has of a layer as numbers of its own.
_SCALARS = {"nbits": "I32", "group_size": "I32", "axis": "I32"}


class HQQ(Method):
    name = "hqq"
    title = "HQQ"
    other_names = ("half-quadratic",)
    formats = tuple(
        Format(f"hqq ({bits} bits)", configs.config(Settings(bits))) for bits in (8, 4, 3, 2)
    )
    online = Online(
        bytes=Grouped(4, 64, _SCALE_BITS).bytes().memory,
        words="integers of 4 bits in groups of 64, by HQQ",
        as_read=True,
    )
    note = (
        "`quantization_config:` takes hqq's `nbits`, `group_size` and `axis`; each weight is "
        "quantized as it is read"
    )
    # Layers hold what hqq's tensors become.
    has_final_shapes = False
    experts_note = "Its experts are left as they are."

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)._replace(symmetric=False, producer="hqq")
        try:
            layers = configs.layers(config)
        except ValueError:
            return said
        kinds = [layers.default] if layers.default else list(layers.named.values())
        if not kinds:
            return said
        one = max(kinds, key=kinds.count)
        group = one.group_size or -1
        return said._replace(
            format=f"axis {one.axis}",
            bits=one.nbits,
            group_size=group,
            strategy="group" if group > 0 else "channel",
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        layers = configs.layers(config)
        # Where layers differ, the most frequent kind stands for all.
        counted = Counter([layers.default] if layers.default else layers.named.values())
        if not counted:
            return None
        ((one, _),) = counted.most_common(1)
        _, count = PACKINGS[one.nbits]
        stored = {1: 8.0, 10: 3.2}.get(count, 8 / count)
        group = one.group_size or 0
        return Bytes(
            Grouped(stored, group, _SCALE_BITS).bytes().disk,
            Grouped(one.bits, group, _SCALE_BITS).bytes().memory,
        )

    def online_bytes(self, checkpoint: "Checkpoint", options: Mapping[str, Any]) -> float:
        overrides = options.get("hf_overrides")
        taken = overrides.get("quantization_config") if isinstance(overrides, dict) else None
        given = options.get("quantization_config")
        try:
            if taken is not None:
                one = configs.layers(taken).default or Settings()
            else:
                one = configs.settings(given if isinstance(given, dict) else {})
        except (ValueError, AttributeError):  # told where the settings are taken
            one = Settings()
        return Grouped(one.bits, one.group_size or 0, _SCALE_BITS).bytes().memory

    def find(self, folder: str, names: Collection[str]) -> Found | None:
        if _FILE not in names:
            return None
        path = os.path.join(folder, _FILE)
        modules = torch_files.read(path)
        if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
            raise _damaged(path, "it is not a dict with a dict for each layer")
        layers: dict[str, Settings] = {}
        tensors: dict[str, Tensor] = {}
        for name, module in modules.items():
            meta = module.get("meta") or {}
            if not isinstance(meta, dict):
                raise _damaged(path, f"`meta` of the layer `{name}` is no dict")
            parts = module | meta
            if "W_q" in parts:
                layers[name] = _checked(path, name, parts)
            for part, tensor in parts.items():
                if isinstance(tensor, Tensor):
                    tensors[f"{name}.{part}"] = tensor
        return Found(_config(layers), (_FILE,), tensors, self.name)

    def check(self, checkpoint: "Checkpoint") -> None:
        try:
            layers = configs.layers(checkpoint.quantization or {})
        except ValueError as error:
            raise BridgeError(
                "invalid_checkpoint",
                f"The model's `quantization_config` is none of HQQ's: {error}.",
                {"quantization": self.name},
                remedy="Download its config.json again.",
            ) from error
        if checkpoint.load_format == self.name:
            return  # looked at when it was found
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in checkpoint.tensors.items():
            layer, _, part = name.rpartition(".")
            found[layer][part] = tensor
        for name, parts in found.items():
            if "W_q" in parts or {"scale", "zero"} & parts.keys():
                _check_stored(name, parts, layers.of(name))
        if found and not any("W_q" in parts for parts in found.values()):
            raise BridgeError(
                "invalid_checkpoint",
                "The model's config says it is quantized with HQQ, and none of its weights is.",
                {"quantization": self.name},
                remedy="Download both again, from the same place.",
            )

    def take_settings(self, checkpoint: "Checkpoint", options: dict[str, Any]) -> str | None:
        overrides = options.get("hf_overrides") or {}
        if not isinstance(overrides, dict) or "quantization_config" in overrides:
            return None
        given = options.pop("quantization_config", None) or {}
        if not isinstance(given, dict) or not given.keys() <= set(Settings._fields):
            raise _no_settings(given)
        try:
            taken = configs.settings(given)
            _check_groups(checkpoint, taken)
        except ValueError as error:
            raise BridgeError(
                "invalid_option",
                f"HQQ does not take these settings: {error}.",
                {"option": "quantization_config", "value": given},
                remedy="Change them, or leave `quantization_config` out.",
            ) from error
        options["hf_overrides"] = overrides | {"quantization_config": configs.config(taken)}
        groups = f"groups of {taken.group_size}" if taken.group_size else "one group for each row"
        return f"integers of {taken.nbits} bits in {groups}, axis {taken.axis}"

    def loaded_note(self, config: Any) -> str | None:
        from vllm.platforms import current_platform

        from vllm_bridge.quantization.packed import native

        return native.note(current_platform.is_cpu())

    def install(self) -> None:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_bridge.quantization import torch_loader
        from vllm_bridge.quantization.hqq.layers import HQQConfig, tensors

        register_quantization_config(self.name)(HQQConfig)
        torch_loader.register(self.name, tensors)


def _check_groups(checkpoint: "Checkpoint", settings: Settings) -> None:
    """Raises a ``ValueError`` where a layer of a plain model has no whole groups."""
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) != 2 or not name.endswith("_proj.weight") or ".experts." in name:
            continue
        rows, columns = tensor.shape
        try:
            settings.group(rows, columns)
        except ValueError as error:
            raise ValueError(
                f"`group_size` must divide the inputs of a layer, and those of "
                f"`{name.removesuffix('.weight')}` are {columns} ({error})"
            ) from error


def _config(layers: Mapping[str, Settings]) -> dict[str, Any]:
    """The config of layers, short where all of a kind are the same."""
    kinds: dict[str, set[Settings]] = defaultdict(set)
    for name, settings in layers.items():
        kinds[configs.shared_name(name)].add(settings)
    named: dict[str, Settings] = {}
    for name, settings in layers.items():
        kind = configs.shared_name(name)
        named[kind if len(kinds[kind]) == 1 else name] = settings
    return configs.config(named)


def _checked(path: str, name: str, parts: Mapping[str, Any]) -> Settings:
    """The settings of a layer in ``qmodel.pt``, whose tensors are looked at."""
    try:
        settings = configs.settings(parts)
        shape = parts.get("shape")
        if not (
            isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(n, int) for n in shape)
        ):
            raise ValueError(f"its shape is {reprlib.repr(shape)}")
        if not isinstance(parts["W_q"], Tensor):
            raise ValueError("its `W_q` is no tensor")
        for one in ("scale", "zero"):
            if not any(part in parts for part in (one, f"{one}_q", "zero_scale")):
                raise ValueError(f"it has no `{one}`")
        _check_sizes(shape, settings, parts)
    except ValueError as error:
        raise _damaged(path, f"of the layer `{name}`, {error}") from error
    return settings


def _check_stored(name: str, parts: Mapping[str, Tensor], settings: Settings | None) -> None:
    """A layer in safetensors files, against its config."""
    try:
        for part in ("W_q", "scale", "zero"):
            if part not in parts:
                raise ValueError(f"`{name}.{part}` is missing")
        if ".experts." in name:
            raise BridgeError(
                "unsupported_quantization",
                "Experts of mixtures that are quantized with HQQ are not computed here "
                f"(`{name}`).",
                {"quantization": "hqq"},
                remedy="Use the plain model, or its AWQ or GPTQ variant.",
            )
        if settings is None:
            raise ValueError(f"`{name}` is quantized")
        said = dict(_scalars(parts))
        if said:
            own = settings._asdict()
            for setting, value in said.items():
                if value != own[setting] and not (setting == "nbits" and own[setting] == 1.58):
                    raise ValueError(f"`{name}` has {setting} {value}, and not {own[setting]}")
        shape = parts.get("shape")
        if shape is not None and shape.is_here:
            _check_sizes(tuple(_numbers(shape, "<i8")), settings, parts)
    except ValueError as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"The model's config does not describe its weights: {error}.",
            {"quantization": "hqq", "layer": name},
            remedy="Download both again, from the same place.",
        ) from error


def _check_sizes(shape: tuple[int, ...], settings: Settings, parts: Mapping[str, Any]) -> None:
    """Raises a ``ValueError`` where tensors are not of a matrix of this shape."""
    rows, columns = shape
    group = settings.group(rows, columns)
    across, count = rows * columns // group, PACKINGS[settings.nbits][1]
    length, width = (group, across) if settings.axis == 0 else (across, group)
    packed = -(-length // count) * width * (4 if settings.nbits == 3 else 1)
    if parts["W_q"].size != packed:
        raise ValueError(
            f"`W_q` has {parts['W_q'].size} bytes, and {rows} x {columns} integers of "
            f"{settings.nbits} bits in groups of {group} have {packed}"
        )
    for name in ("scale", "zero"):
        tensor = parts.get(name)
        if isinstance(tensor, Tensor) and _count(tensor) != across:
            raise ValueError(f"`{name}` has {_count(tensor)} numbers for {across} groups")


def _count(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _scalars(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    for name, dtype in _SCALARS.items():
        tensor = parts.get(name)
        if tensor is not None and tensor.is_here and tensor.dtype == dtype and tensor.size == 4:
            (yield name, _numbers(tensor, "<i4")[0])


def _numbers(tensor: Tensor, dtype: str) -> list[int]:
    import numpy

    count = tensor.size // numpy.dtype(dtype).itemsize
    found = numpy.fromfile(tensor.file, dtype, count, offset=tensor.start)
    return [int(number) for number in found]


def _damaged(path: str, what: str) -> BridgeError:
    return BridgeError(
        "invalid_checkpoint",
        f"`{path}` is no model of the library hqq: {what}.",
        {"file": path},
        remedy="Download it again.",
    )


def _no_settings(given: Any) -> BridgeError:
    known = Settings._fields
    wrong = next((n for n in given if n not in known), None) if isinstance(given, dict) else given
    suggestion = nearest(str(wrong), known)
    return BridgeError(
        "invalid_option",
        f"HQQ has no setting `{wrong}`.",
        {"option": "quantization_config", "nearest": suggestion, "allowed": list(known)},
        remedy=did_you_mean(suggestion) + f"It has: {', '.join(known)}.",
    )
