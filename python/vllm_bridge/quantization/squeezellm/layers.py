"""What vLLM gets of SqueezeLLM: its config, and linear layers that stay packed. Imports vLLM.

A row of integers is a stream of bits in the checkpoint as well (``packed.tables``), though one that
runs down a column. What is sparse beside them is added in float32, before a product is rounded.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from vllm_bridge.quantization.packed import grouped, native, shards, sparse, tables

# What a checkpoint has of a matrix: of all, of some, and of those with rows that are not sparse.
DENSE = {"qweight": torch.int32, "lookup_table": torch.float32}
SPARSE = {"rows": torch.int32, "cols": torch.int32, "vals": torch.float32}
FULL = {"full_rows": torch.float32, "full_row_indices": torch.int32}


class SqueezeLLMConfig(QuantizationConfig):  # type: ignore[misc]
    """SqueezeLLM.

    Args:
        bits: of an integer, 3 or 4
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @staticmethod
    def get_name() -> str:
        return "squeezellm"

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_min_capability() -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quant_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SqueezeLLMConfig":
        return cls(cls.get_from_keys(config, ["wbits"]))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        # How a GPU's threads share the sparse part.
        return WeightsMapper(orig_to_new_suffix={".startrows": None})

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return SqueezeLLMLinear(self.bits) if isinstance(layer, LinearBase) else None


class SqueezeLLMLinear(LinearMethodBase):  # type: ignore[misc]
    def __init__(self, bits: int) -> None:
        self._bits = bits

    @property
    def kernel_name(self) -> str:
        return native.kernel(current_platform.is_cpu())

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        layer.shards = shards.Shards(layer, columns, output_partition_sizes, input_size)
        packed = torch.zeros(rows, (columns * self._bits + 7) // 8, dtype=torch.uint8)
        layer.register_parameter("weight_packed", Parameter(packed, False))
        # Values are rounded to what they are multiplied in.
        values = torch.zeros(rows, 2**self._bits, dtype=params_dtype)
        layer.register_parameter("tables", Parameter(values, False))
        layer.waiting = {}
        shards.wait_for(layer, DENSE | SPARSE | FULL, self._load)

    def _load(
        self, layer: Any, name: str, _parameter: Any, tensor: torch.Tensor, shard: Any = None
    ) -> None:
        if name == "qweight":
            packed = tensor.T.contiguous().view(torch.uint8)
            columns = layer.shards.column_range
            if columns != slice(0, layer.shards.columns):
                integers = grouped.unpack(packed, self._bits, layer.shards.columns)
                packed = grouped.pack(integers[:, columns], self._bits)
            self._fill(layer, layer.weight_packed, packed, shard)
        elif name == "lookup_table":
            self._fill(layer, layer.tables, tensor.to(layer.tables.dtype), shard)
        else:
            layer.waiting.setdefault(shard, {})[name] = tensor

    def _fill(self, layer: Any, parameter: Parameter, whole: torch.Tensor, shard: Any) -> None:
        for number, rows in layer.shards.rows(shard):
            layer.shards.of(parameter, number).copy_(whole[rows])

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in DENSE | SPARSE | FULL:
            delattr(layer, name)
        parts = [
            _placed(layer, shard, *_entries(tensors)) for shard, tensors in layer.waiting.items()
        ]
        del layer.waiting
        layer.has_sparse = bool(parts)
        if parts:
            rows, columns, values = (torch.cat(each) for each in zip(*parts, strict=True))
            range_ = layer.shards.column_range
            shape = (len(layer.tables), range_.stop - range_.start)
            compressed = sparse.compress(rows, columns, values, shape)
            dense = tables.dequantize(
                layer.weight_packed, layer.tables, self._bits, shape[1], layer.tables.dtype
            )
            compressed = sparse.rounded(compressed, dense)
            for name, tensor in compressed._asdict().items():
                layer.register_parameter(f"sparse_{name}", Parameter(tensor, False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        added = None
        if layer.has_sparse:
            added = sparse.Sparse(layer.sparse_starts, layer.sparse_columns, layer.sparse_values)
        product = tables.matmul(x, layer.weight_packed, layer.tables, self._bits, added)
        return product if bias is None else product + bias


Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows, columns and values of what is sparse."""


def _entries(tensors: Mapping[str, torch.Tensor]) -> Entries:
    """What a checkpoint has beside the tables of a matrix.

    Raises:
        ValueError: where tensors are missing
    """
    found: list[Entries] = []
    for names in (SPARSE, FULL):
        missing = [name for name in names if name not in tensors]
        if missing and len(missing) < len(names):
            raise ValueError(
                f"Following weights were not initialized from checkpoint: {', '.join(missing)}"
            )
    if "rows" in tensors:
        starts = tensors["rows"].long()
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        found.append((rows, tensors["cols"].long(), tensors["vals"].float()))
    if "full_rows" in tensors:
        full, indices = tensors["full_rows"].float(), tensors["full_row_indices"].long()
        columns = torch.arange(len(full)).repeat(len(indices))
        found.append((indices.repeat_interleave(len(full)), columns, full.T.flatten()))
    rows, columns, values = (torch.cat(each) for each in zip(*found, strict=True))
    if not values.isfinite().all():
        raise ValueError("Following weights are not finite numbers: vals or full_rows")
    return rows, columns, values


def _placed(
    layer: Any, shard: Any, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> Entries:
    """The entries that belong to the rank, where they are in its layer."""
    range_ = layer.shards.column_range
    placed: list[Entries] = []
    for number, part in layer.shards.rows(shard):
        inside = (rows >= part.start) & (rows < part.stop)
        inside &= (columns >= range_.start) & (columns < range_.stop)
        first = layer.shards.first_row(number)
        placed.append(
            (rows[inside] - part.start + first, columns[inside] - range_.start, values[inside])
        )
    one, two, three = (torch.cat(each) for each in zip(*placed, strict=True))
    return one, two, three


def tensors(contents: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file of SqueezeLLM's, which has a few numbers too."""
    for name, tensor in contents.items():
        if isinstance(tensor, torch.Tensor):
            yield name, tensor
