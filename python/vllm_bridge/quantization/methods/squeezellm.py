"""SqueezeLLM: integers of 3 or 4 bits that are places in a table of values."""

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge import json_files
from vllm_bridge.checkpoints import torch_files
from vllm_bridge.checkpoints.checkpoint import Found
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Where SqueezeLLM says how many bits there are.
_CONFIG = "quant_config.json"

_BITS = (3, 4)
_WORD = 32
_FLOATS = ("F64", "F32", "F16", "BF16")

# Columns of a matrix of models of 7 billion parameters, for what a table adds to a weight.
_COLUMNS = 4096


class SqueezeLLM(Method):
    name = "squeezellm"
    title = "SqueezeLLM"
    other_names = ("sqllm", "squeeze-llm")
    needs_checkpoint = True
    formats = tuple(Format(f"squeezellm ({bits} bits)", {"wbits": bits}) for bits in _BITS)
    note = "with dense-and-sparse, what is sparse takes 8 bytes for each of its weights beside that"
    # Layers hold what its tensors become.
    has_final_shapes = False

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        # Each row has a table of its own.
        return scheme.usual(config)._replace(strategy="channel", producer="SqueezeLLM")

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        bits = config["wbits"]
        return Grouped(bits, _COLUMNS, 16 * 2**bits).bytes()

    def find(self, folder: str, names: Collection[str]) -> Found | None:
        if _CONFIG not in names:
            return None
        try:
            bits = json_files.read(os.path.join(folder, _CONFIG))["wbits"]
        except (OSError, ValueError, LookupError):
            return None  # another tool's
        config = {"quant_method": self.name, "wbits": bits}
        pickled = sorted(name for name in names if name.endswith(".pt"))
        if any(name.endswith(".safetensors") for name in names) or not pickled:
            return Found(config)
        if len(pickled) > 1:
            raise BridgeError(
                "invalid_checkpoint",
                f"`{folder}` has {len(pickled)} files of weights, {' and '.join(pickled[:2])}.",
                {"model": folder, "files": pickled},
                remedy="Leave the one that is meant, and its quant_config.json.",
            )
        path = os.path.join(folder, pickled[0])
        contents = torch_files.read(path)
        if not isinstance(contents, dict):
            raise BridgeError(
                "invalid_checkpoint",
                f"`{path}` is no model of SqueezeLLM: it is not a dict.",
                {"file": path},
                remedy="Download it again.",
            )
        tensors = {name: one for name, one in contents.items() if isinstance(one, Tensor)}
        return Found(config, tuple(pickled), tensors, self.name)

    def check(self, checkpoint: "Checkpoint") -> None:
        bits = (checkpoint.quantization or {}).get("wbits")
        if bits not in _BITS:
            raise _contradiction(f"`wbits` is {bits!r}, not 3 or 4")
        names = [name.rpartition(".")[0] for name in checkpoint.tensors if _is_packed(name)]
        if checkpoint.tensors and not names:
            raise _contradiction("none of its weights is packed")
        for name in names:
            parts = {
                part: tensor
                for part in _PARTS
                if (tensor := checkpoint.tensors.get(f"{name}.{part}")) is not None
            }
            try:
                _check_dense(parts, bits)
                _check_sparse(parts)
            except ValueError as error:
                raise _contradiction(f"of `{name}`, {error}") from error
            if ".experts." in name:
                raise BridgeError(
                    "unsupported_quantization",
                    "Experts of mixtures that are quantized with SqueezeLLM are not computed here "
                    f"(`{name}`).",
                    {"quantization": self.name},
                    remedy="Use the plain model, or its AWQ or GPTQ variant.",
                )

    def loaded_note(self, config: Any) -> str | None:
        from vllm.platforms import current_platform

        from vllm_bridge.quantization.packed import native

        return native.note(current_platform.is_cpu())

    def install(self) -> None:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from vllm_bridge.quantization import torch_loader
        from vllm_bridge.quantization.squeezellm.layers import SqueezeLLMConfig, tensors

        register_quantization_config(self.name)(SqueezeLLMConfig)
        torch_loader.register(self.name, tensors)


_PARTS = ("qweight", "lookup_table", "rows", "cols", "vals", "full_rows", "full_row_indices")


def _is_packed(name: str) -> bool:
    return name.endswith((".qweight", ".lookup_table"))


def _check_dense(parts: Mapping[str, Tensor], bits: int) -> None:
    packed, table = _parts(parts, "qweight", "lookup_table")
    if packed.dtype != "I32" or len(packed.shape) != 2 or packed.shape[0] % bits:
        raise ValueError(
            f"`qweight` is {packed.dtype} of {list(packed.shape)}, no integers of {bits} bits"
        )
    if table.dtype not in _FLOATS or table.shape != (packed.shape[1], 2**bits):
        raise ValueError(
            f"`lookup_table` is {table.dtype} of {list(table.shape)}, and should have "
            f"{2**bits} values for each of {packed.shape[1]} rows"
        )


def _check_sparse(parts: Mapping[str, Tensor]) -> None:
    """Whether what is sparse is within the matrix."""
    words, rows = parts["qweight"].shape
    columns = words * _WORD // (parts["lookup_table"].shape[1].bit_length() - 1)
    if {"rows", "cols", "vals"} & parts.keys():
        starts, places, values = _parts(parts, "rows", "cols", "vals")
        if starts.is_here:
            _check_starts(_integers(starts), rows, _count(places), _count(values))
        _check_range("cols", places, columns)
    if {"full_rows", "full_row_indices"} & parts.keys():
        full, numbers = _parts(parts, "full_rows", "full_row_indices")
        if full.shape != (columns, _count(numbers)):
            raise ValueError(
                f"`full_rows` has the shape {list(full.shape)}, and should have {columns} columns "
                f"of each of {_count(numbers)} rows"
            )
        _check_range("full_row_indices", numbers, rows)


def _check_starts(starts: Any, rows: int, places: int, values: int) -> None:
    if len(starts) != rows + 1 or (starts[1:] < starts[:-1]).any() or starts[0] != 0:
        raise ValueError(f"`rows` are not the starts of {rows} rows")
    if not starts[-1] == places == values:
        raise ValueError(f"`rows` has {starts[-1]} entries, `cols` {places}, `vals` {values}")


def _check_range(name: str, tensor: Tensor, end: int) -> None:
    if not tensor.is_here:
        return
    found = _integers(tensor)
    if len(found) and not 0 <= found.min() <= found.max() < end:
        raise ValueError(f"`{name}` has numbers from {found.min()} to {found.max()}, of {end}")


def _parts(parts: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing")
    return [parts[name] for name in names]


def _count(tensor: Tensor) -> int:
    return tensor.shape[0] if len(tensor.shape) == 1 else 0


def _integers(tensor: Tensor) -> Any:
    import numpy

    dtype = {"I32": "<i4", "I64": "<i8"}.get(tensor.dtype)
    if dtype is None or len(tensor.shape) != 1:
        raise ValueError(f"a list of numbers is {tensor.dtype} of {list(tensor.shape)}")
    return numpy.fromfile(tensor.file, dtype, tensor.shape[0], offset=tensor.start)


def _contradiction(what: str) -> BridgeError:
    return BridgeError(
        "invalid_checkpoint",
        f"The model is none of SqueezeLLM's: {what}.",
        {"quantization": "squeezellm"},
        remedy="Download it again, with its quant_config.json, from the same place.",
    )
