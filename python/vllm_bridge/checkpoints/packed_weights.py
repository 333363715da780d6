"""Whether weights that are packed into integers are what their config says. Only headers and a
few small tensors are read, and nothing is imported but NumPy.

vLLM loads most such checkpoints and answers nonsense, or ends with words about sizes.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge import json_files
from vllm_bridge.checkpoints.headers import read_header
from vllm_bridge.errors import BridgeError

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint
    from vllm_bridge.checkpoints.headers import Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")

_WORD = 32  # bits of the integers that weights are packed into
_BYTE = 8

# So many weights of a layer tell their range.
_SAMPLE = 2**20


def settings_beside(
    folder: str, names: Collection[str], file: str, needed: Collection[str]
) -> Mapping[str, Any] | None:
    """What a tool says in a file of its own of weights that are packed as GPTQ's or AWQ's; None
    where there is no such file, or no such weights.

    Args:
        names: of the files in the folder
        file: the tool's
        needed: what such a file must have; other tools have files of the same name
    """
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if file not in names or not weights:
        return None
    try:
        config = json_files.read(os.path.join(folder, file))
    except (OSError, ValueError):
        return None
    if not config.keys() >= set(needed):
        return None
    # A file that another model has left says nothing of plain weights.
    tensors = read_header(os.path.join(folder, weights[0]))
    return config if any(name.endswith(".qweight") for name in tensors) else None


def check_plain(checkpoint: "Checkpoint") -> None:
    """Raises ``invalid_checkpoint`` where a model that is not quantized, by its config, is."""
    folder = checkpoint.folder
    if folder is None or any("quant" in name for name in os.listdir(folder)):
        return  # some tools have a file of their own for their settings
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("_proj.weight") and tensor.dtype not in _FLOATS:
            raise BridgeError(
                "invalid_checkpoint",
                f"The model's config names no quantization, and `{name}` holds {tensor.dtype}.",
                {"tensor": name, "dtype": tensor.dtype},
                remedy=(
                    "Copy the `quantization_config` of its config.json from where it comes from."
                ),
            )


def check_bitsandbytes(checkpoint: "Checkpoint") -> None:
    """Raises ``invalid_checkpoint`` where weights of bitsandbytes lack what belongs to them.

    Beside each weight lie its scales and what else its numbers mean, the same for all; the
    loader takes what it finds."""
    tensors = checkpoint.tensors
    parts: dict[str, set[str]] = {
        name: set()
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in ("U8", "I8")
    }
    for name in tensors:
        module, found, _ = name.partition(".weight.")
        if not found and name.endswith(".SCB"):
            module, found = name.removesuffix(".SCB"), ".SCB"
        if found:
            parts.setdefault(f"{module}.weight", set()).add(name.removeprefix(module))
    usual = set().union(*parts.values())
    for weight, there in parts.items():
        missing = [weight.removesuffix(".weight") + part for part in sorted(usual - there)]
        if weight not in tensors:
            missing.insert(0, weight)
        if missing:
            raise BridgeError(
                "invalid_checkpoint",
                f"The model's files lack `{missing[0]}`, without which `{weight}` cannot be read.",
                {"missing": missing},
                remedy="Download them again.",
            )


def check_integers(checkpoint: "Checkpoint", method: str) -> None:
    """Raises ``invalid_checkpoint`` where a config of AWQ or GPTQ contradicts the weights.

    Args:
        method: ``awq`` or ``gptq``, which pack the integers in different ways
    """
    config = checkpoint.quantization or {}
    if _is_other_layout(config, method):
        return  # it is left to those that load it
    packed = [name for name in checkpoint.tensors if name.endswith(".qweight")]
    first = True
    for name in packed:
        module = name.rpartition(".")[0]
        settings = {**config, **_override(checkpoint, config, module)}
        bits, group = (_number(checkpoint, settings, name) for name in ("bits", "group_size"))
        if bits is None or group is None:
            return  # by other names
        inputs = _check_shapes(checkpoint, name, method, bits, group)
        if method == "gptq":
            # Zero points are looked at in one layer, which is enough for a config that is wrong.
            _check_gptq(checkpoint, module, settings, bits, first)
            _check_order(checkpoint, module, settings, inputs, group if group > 0 else inputs)
        elif first and settings.get("zero_point") is False:
            _check_zeros(checkpoint, module, bits, 0)
        first = False
    if checkpoint.tensors and not packed and {"bits", "group_size"} <= config.keys():
        raise _contradiction(checkpoint, "none of the weights is packed")


def _override(
    checkpoint: "Checkpoint", config: Mapping[str, Any], module: str
) -> Mapping[str, Any]:
    """What GPTQ's config says of a single module, by the first pattern that is one of its name."""
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise _contradiction(checkpoint, f"its `dynamic` is {rules!r}")
    for pattern, rule in rules.items():
        try:
            found = re.match(pattern.removeprefix("+:"), module)
        except re.error as error:
            raise _contradiction(checkpoint, f"`{pattern}` of it is no pattern: {error}") from error
        if found and not pattern.startswith("-:"):
            return dict(rule) if isinstance(rule, dict) else {}
    return {}


def _is_other_layout(config: Mapping[str, Any], method: str) -> bool:
    if method == "gptq":
        return config.get("checkpoint_format") in ("gptq_p", "marlin")
    return "gemv" in str(config.get("version", config.get("format"))).lower()


def _number(checkpoint: "Checkpoint", config: Mapping[str, Any], name: str) -> int | None:
    if name not in config:
        return None
    value = config[name]
    if isinstance(value, int) and not isinstance(value, bool) and value not in (0, None):
        return value
    raise BridgeError(
        "invalid_checkpoint",
        f"`{name}` of the model's `quantization_config` is {value!r}, not a number of its kind.",
        {"quantization": checkpoint.quant_method},
        remedy="Download the model's config.json again.",
    )


def _check_shapes(checkpoint: "Checkpoint", name: str, method: str, bits: int, group: int) -> int:
    """Returns how many inputs a layer has."""
    module = name.rpartition(".")[0]
    weight = checkpoint.tensors[name]
    shape = weight.shape
    scales = checkpoint.tensors.get(f"{module}.scales")
    if scales is None or len(shape) != 2:
        raise _contradiction(checkpoint, f"`{name}` has no scales, or is no matrix")
    if weight.dtype != "I32":
        raise _contradiction(checkpoint, f"`{name}` is {weight.dtype}")
    if scales.dtype not in _FLOATS:
        raise _contradiction(checkpoint, f"`{module}.scales` are {scales.dtype}")
    rows, columns = shape
    inputs, outputs = (
        (rows, columns * _WORD // bits) if method == "awq" else (rows * _WORD // bits, columns)
    )
    groups = math.ceil(inputs / group) if group > 0 else 1
    if scales.shape != (groups, outputs):
        raise _contradiction(
            checkpoint,
            f"`{name}` of {list(shape)} and `{module}.scales` of {list(scales.shape)} are not of "
            f"{bits} bits in groups of {group}",
        )
    zeros = checkpoint.tensors.get(f"{module}.qzeros")
    if zeros is not None and zeros.shape != (groups, outputs * bits // _WORD):
        raise _contradiction(
            checkpoint,
            f"`{module}.qzeros` of {list(zeros.shape)} are not those of {groups} groups of "
            f"{outputs} outputs",
        )
    return inputs


def _check_gptq(
    checkpoint: "Checkpoint", module: str, settings: Mapping[str, Any], bits: int, first: bool
) -> None:
    if first and settings.get("sym") is True:
        # They are taken for granted. The older format stores one less.
        _check_zeros(checkpoint, module, bits, 1)
    if settings.get("sym") is False and f"{module}.qzeros" not in checkpoint.tensors:
        raise _contradiction(checkpoint, f"there is no `{module}.qzeros`")


def _check_order(
    checkpoint: "Checkpoint", module: str, settings: Mapping[str, Any], inputs: int, group: int
) -> None:
    """Whether the order of a layer's inputs is one, with as many of them in each group, and the
    usual one where the config says nothing of another."""
    import numpy

    name = f"{module}.g_idx"
    order = checkpoint.tensors.get(name)
    is_ordered = settings.get("desc_act") is True and group < inputs
    if order is None:
        if is_ordered:
            raise _contradiction(checkpoint, f"there is no `{name}`")
        return
    if order.dtype != "I32" or order.shape != (inputs,):
        raise _contradiction(
            checkpoint, f"`{name}` is {order.dtype} {list(order.shape)}, not I32 [{inputs}]"
        )
    if not order.is_here:
        return
    index = _read(order)
    usual = numpy.arange(inputs) // group
    if is_ordered:
        if not (numpy.sort(index) == usual).all():
            raise _contradiction(
                checkpoint, f"`{name}` does not divide {inputs} inputs into groups of {group}"
            )
    elif settings.get("desc_act") is False and not (index == usual).all():
        raise _contradiction(checkpoint, f"`{name}` has the columns in another order")


def _check_zeros(checkpoint: "Checkpoint", module: str, bits: int, less: int) -> None:
    """Whether the zero points of weights that are said to be symmetric are in the middle, or
    ``less`` below it."""
    import numpy

    zeros = checkpoint.tensors.get(f"{module}.qzeros")
    if zeros is None or not zeros.is_here or zeros.size * _BYTE % bits:
        return
    fields = numpy.unpackbits(_read(zeros).view(numpy.uint8), bitorder="little")
    values = fields.reshape(-1, bits) @ (1 << numpy.arange(bits))
    middle = 1 << (bits - 1)
    if not ((values == middle - less).all() or (values == middle).all()):
        raise _contradiction(checkpoint, f"`{module}.qzeros` are not those of symmetric weights")


def check_range(checkpoint: "Checkpoint") -> None:
    """Raises ``invalid_checkpoint`` where integers of compressed-tensors that have a byte each are
    of more bits than the config says; vLLM cuts off what is more."""
    import numpy

    config = checkpoint.quantization or {}
    groups = config.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if groups else []
    bits = max((_number(checkpoint, one, "num_bits") or _BYTE for one in weights), default=_BYTE)
    if bits >= _BYTE:
        return
    bound = 1 << (bits - 1)
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("_proj.weight") and tensor.dtype == "I8" and tensor.is_here:
            size = min(tensor.size, _SAMPLE)
            values = numpy.fromfile(tensor.file, "i1", size, offset=tensor.start)
            if values.min() < -bound or values.max() >= bound:
                raise _contradiction(checkpoint, f"`{name}` holds more than {bits} bits")
            return


def _read(tensor: "Tensor") -> Any:
    import numpy

    return numpy.fromfile(tensor.file, "<i4", tensor.size // 4, offset=tensor.start)


def _contradiction(checkpoint: "Checkpoint", what: str) -> BridgeError:
    return BridgeError(
        "invalid_checkpoint",
        f"The model's config does not describe its weights: it says {checkpoint.description}, but "
        f"{what}.",
        {"quantization": checkpoint.quant_method},
        remedy="Download both again, from the same place.",
    )
