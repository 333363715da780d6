"""What vLLM gets of HQQ: its config, and linear layers that stay packed. Imports vLLM.

A matrix comes as hqq's three tensors, or as plain weights that are quantized as they are read. What
a rank has of it is cut out and packed anew (``packed.grouped``), without a change of any value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from vllm_bridge.quantization.hqq import settings as configs
from vllm_bridge.quantization.hqq.quantize import quantize
from vllm_bridge.quantization.hqq.settings import Settings
from vllm_bridge.quantization.hqq.stored import (
    SCALES,
    Stored,
    cut,
    plain_meta,
    scales_shape,
    stored,
)
from vllm_bridge.quantization.packed import grouped, native, shards

# What a checkpoint has of a matrix, and what else it has there, which its config says as well.
TENSORS = ("W_q", "scale", "zero")
ABOUT = (
    "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits",
    "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "shape",
    "stores_quant_config", "unpack_view_dtype", "view_as_float",
)  # fmt: skip


class HQQConfig(QuantizationConfig):  # type: ignore[misc]
    """HQQ, as a config says, or with hqq's defaults.

    Args:
        layers: which are quantized, and how
    """

    def __init__(self, layers: configs.Layers | None = None) -> None:
        super().__init__()
        self.layers = layers or configs.Layers(Settings(), {}, ())

    @staticmethod
    def get_name() -> str:
        return "hqq"

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_min_capability() -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HQQConfig":
        return cls(configs.layers(config))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix={f".{name}": None for name in ABOUT})

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        settings = {self.layers.of(name) for name in shards.names(self, prefix)}
        if len(settings) > 1:
            raise ValueError(
                f"the parts of `{prefix}`, which vLLM computes as one layer, are quantized in "
                "different ways"
            )
        found = settings.pop()
        return UnquantizedLinearMethod() if found is None else HQQLinear(found)


class HQQLinear(LinearMethodBase):  # type: ignore[misc]
    def __init__(self, settings: Settings) -> None:
        self._settings = settings

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
        settings, columns = self._settings, input_size_per_partition
        layer.shards = shards.Shards(layer, columns, output_partition_sizes, input_size)
        # The rows of scales that each of the matrices has.
        periods, group = [], columns
        for shard in range(len(output_partition_sizes)):
            rows = layer.shards.whole_rows(shard)
            period, groups = scales_shape(rows, input_size, settings)
            periods.append(output_partition_sizes[shard] if settings.axis == 1 else period)
            group = math.gcd(group, input_size // groups)
        layer.periods, layer.group = periods, group
        scales = (sum(periods), columns // group)
        packed = (sum(output_partition_sizes), (columns * settings.bits + 7) // 8)
        for name, shape, dtype in (
            ("qweight", packed, torch.uint8),
            ("scales", scales, SCALES),
            ("zeros", scales, SCALES),
        ):
            layer.register_parameter(name, Parameter(torch.zeros(shape, dtype=dtype), False))
        layer.waiting = {}
        shards.wait_for(layer, _dtypes(settings, params_dtype), self._load)

    def _load(
        self, layer: Any, name: str, _parameter: Any, tensor: torch.Tensor, shard: Any = None
    ) -> None:
        if name == "weight":
            self._fill(layer, quantize(tensor, self._settings), shard)
            return
        waiting = layer.waiting.setdefault(shard, {})
        waiting[name] = tensor
        if len(waiting) == len(TENSORS):
            rows = sum(map(layer.shards.whole_rows, layer.shards.meant(shard)))
            packed, scale, zero = (waiting[name] for name in TENSORS)
            columns = layer.shards.columns
            whole = stored(packed, scale, zero, rows, columns, self._settings)
            self._fill(layer, whole, shard)
            del layer.waiting[shard]

    def _fill(self, layer: Any, whole: Stored, shard: Any) -> None:
        for number, rows in layer.shards.rows(shard):
            part = cut(whole, rows, layer.shards.column_range, layer.group)
            layer.shards.of(layer.qweight, number).copy_(
                grouped.pack(part.integers, self._settings.bits)
            )
            for name in ("scales", "zeros"):
                target = _narrowed(getattr(layer, name), layer.periods, number)
                target.copy_(getattr(part, name))

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in (*TENSORS, "weight"):
            delattr(layer, name)
        del layer.waiting

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        bits = self._settings.bits
        if self._settings.axis == 1 or len(layer.periods) == 1:
            product = grouped.matmul(x, layer.qweight, layer.scales, layer.zeros, bits)
        else:
            parts = [
                grouped.matmul(
                    x,
                    layer.shards.of(layer.qweight, number),
                    _narrowed(layer.scales, layer.periods, number),
                    _narrowed(layer.zeros, layer.periods, number),
                    bits,
                )
                for number in range(len(layer.periods))
            ]
            product = torch.cat(parts, -1)
        return product if bias is None else product + bias


def tensors(modules: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ``qmodel.pt`` as a file of safetensors has them."""
    for name, module in modules.items():
        if "W_q" in module:
            module = plain_meta(module)
        for part, tensor in module.items():
            if isinstance(tensor, torch.Tensor):
                yield f"{name}.{part}", tensor


def _narrowed(tensor: torch.Tensor, counts: Sequence[int], number: int) -> torch.Tensor:
    return tensor.narrow(0, sum(counts[:number]), counts[number])


def _dtypes(settings: Settings, params_dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Of the tensors that a matrix may come as."""
    integers = torch.int32 if settings.nbits == 3 else torch.uint8
    return dict(zip(TENSORS, (integers, SCALES, SCALES), strict=True)) | {"weight": params_dtype}
