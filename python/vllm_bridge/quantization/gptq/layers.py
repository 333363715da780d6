"""GPTQ's linear layers, and what vLLM gets in the place of its own config of the method.

What vLLM computes itself it is given. Of the rest, layers go to vLLM's kernels where they have one
for their bits: with zero points, and with inputs in another order, which is undone by reordering
the weights and gathering the activations. What is left is computed by ``packed.grouped``.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    QuantizationConfig,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    is_layer_gptq_quantized,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from vllm_bridge.quantization import activations
from vllm_bridge.quantization.gptq import format
from vllm_bridge.quantization.gptq.experts import GPTQExpertsMethod
from vllm_bridge.quantization.gptq.format import Settings
from vllm_bridge.quantization.packed import grouped, native, shards
from vllm_bridge.quantization.packed.shards import Shards


class GPTQConfig(AutoGPTQConfig):  # type: ignore[misc]
    """vLLM's config of the method, for all of its formats."""

    def __init__(
        self,
        weight_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, dict[str, int | bool]],
        full_config: dict[str, Any],
        modules_in_block_to_quantize: list[str] | None = None,
    ) -> None:
        QuantizationConfig.__init__(self)  # vLLM's own refuses most formats
        self.weight_bits = weight_bits
        self.group_size = group_size
        self.desc_act = desc_act
        self.is_sym = is_sym
        self.lm_head_quantized = lm_head_quantized
        self.dynamic = dynamic
        self.full_config = full_config
        self.modules_in_block_to_quantize = modules_in_block_to_quantize or []
        self.quant_type = self.TYPE_MAP.get((weight_bits, is_sym))
        self.autoround_version = full_config.get("autoround_version", "")
        rules = [rule for name, rule in dynamic.items() if not name.startswith("-:")]
        every = [self._settings(rule) for rule in ({}, *rules)]
        for settings in every:
            settings.check()
        self.pack_factor = Fraction(format.WORD, weight_bits)
        self.is_ordered = any(settings.is_ordered for settings in every)

    def settings_of(self, name: str) -> Settings | None:
        """How a layer is quantized; None where it is not.

        Args:
            name: of vLLM's layer, which may be of several modules of the checkpoint
        """
        if not is_layer_gptq_quantized(
            name, self.modules_in_block_to_quantize, self.packed_modules_mapping
        ):
            return None
        found = {self._of_module(module) for module in shards.names(self, name)}
        if len(found) > 1:
            raise ValueError(
                f"the modules that vLLM computes as one layer, `{name}`, are quantized in "
                "different ways"
            )
        return found.pop()

    def _of_module(self, name: str) -> Settings | None:
        rule = get_dynamic_override(self, name)
        return None if rule is False else self._settings(rule or {})

    def _settings(self, rule: Mapping[str, Any]) -> Settings:
        form = self.full_config.get("checkpoint_format") or "gptq"
        if form not in format.STORES_ZEROS:
            raise ValueError(
                f"the quantization's checkpoint_format is {form}, not one of "
                f"{', '.join(format.STORES_ZEROS)}"
            )
        group_size = rule.get("group_size", self.group_size)
        return Settings(
            bits=rule.get("bits", self.weight_bits),
            group_size=group_size,
            # Where all share a scale the order does not matter.
            is_ordered=rule.get("desc_act", self.desc_act) and group_size != -1,
            is_symmetric=rule.get("sym", self.is_sym),
            stores_zeros=format.STORES_ZEROS[form],
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return self._of_experts(layer, prefix)
        is_head = isinstance(layer, ParallelLMHead)
        if not (isinstance(layer, LinearBase) or (is_head and self.lm_head_quantized)):
            return None
        settings = self.settings_of(prefix)
        if settings is None:
            return UnquantizedEmbeddingMethod() if is_head else UnquantizedLinearMethod()
        # The order is dropped while weights are read, unless there is a layer that needs it.
        return GPTQLinearMethod(settings, takes_order=self.is_ordered)

    def _of_experts(self, layer: torch.nn.Module, prefix: str) -> Any:
        settings = self._of_module(prefix)
        if settings is None:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        own = _vllms_config(settings)
        if own is None or self.is_ordered:
            return GPTQExpertsMethod(settings, layer.moe_config)
        return own.get_quant_method(layer, prefix)

    def get_checkpoint_weight_mapper(self) -> Any:
        return WeightsMapper() if self.is_ordered else super().get_checkpoint_weight_mapper()


def register() -> None:
    """Puts the config in the place of vLLM's own."""
    for name in QUANTIZATION_METHODS:
        if get_quantization_config(name) is AutoGPTQConfig:
            register_quantization_config(name)(GPTQConfig)


@register_weight_loader_v2_supported_method
class GPTQLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer in GPTQ's format.

    Args:
        takes_order: whether it gets a ``g_idx`` while weights are read
    """

    def __init__(self, settings: Settings, takes_order: bool = False) -> None:
        self.settings = settings
        self.kernel: Any = None
        self._takes_order = takes_order
        self._parts: list[slice] = []
        self._rounded = False

    @property
    def kernel_name(self) -> str | None:
        """What computes the layer, where that is no kernel of vLLM's."""
        if self.kernel is not None:
            return None
        return native.kernel(current_platform.is_cpu())

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        settings, columns = self.settings, input_size_per_partition
        settings.check_columns(input_size, input_size // columns)
        if columns * settings.bits % format.WORD:
            raise ValueError(f"{columns} inputs of {settings.bits} bits are no whole words")
        sizes = (columns, output_partition_sizes, input_size, output_size, params_dtype)
        if self._takes_order:
            self._create_order(layer, Shards(layer, columns, output_partition_sizes, input_size))
        if isinstance(layer, LinearBase) and self._is_vllms(layer, *sizes, **extra_weight_attrs):
            return
        count = sum(output_partition_sizes)
        loader, groups = extra_weight_attrs["weight_loader"], settings.groups(columns)
        dims = {"output_dim": 0, "input_dim": 1}
        # In the dtypes of the checkpoint's own tensors: vLLM warns of others.
        weight = ModelWeightParameter(
            data=torch.empty(count, columns * settings.bits // format.WORD, dtype=torch.int32),
            weight_loader=_converting(_rows_of_words, settings, loader),
            **dims,
        )
        weight.stored_shape = (columns * settings.bits // format.WORD, count)
        layer.register_parameter("qweight", weight)
        # A scale that all inputs have is the same in all ranks.
        scale_type = GroupQuantScaleParameter
        if settings.group_size == -1:
            scale_type, dims = ChannelQuantScaleParameter, {"output_dim": 0}
        for name, convert, dtype in (
            ("scales", _transpose, params_dtype),
            ("qzeros", format.zeros, torch.int32),
        ):
            parameter = scale_type(
                data=torch.empty(count, groups, dtype=dtype),
                weight_loader=_converting(convert, settings, loader),
                **dims,
            )
            if name == "scales":
                parameter.stored_shape = (groups, count)
            layer.register_parameter(name, parameter)
        self.kernel = self._vllms_kernel(columns, count, input_size, output_size, params_dtype)
        ends = itertools.accumulate(output_partition_sizes, initial=0)
        self._parts = [slice(*part) for part in itertools.pairwise(ends)]

    def _create_order(self, layer: torch.nn.Module, matrices: Shards) -> None:
        """Room for the order of the inputs of each matrix that the layer is made of."""
        count = len(matrices.meant(None))
        shape = (count, matrices.columns) if self.settings.is_ordered else (0,)
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=torch.int32), requires_grad=False)

        def load(target: torch.Tensor, loaded: torch.Tensor, shard: Any = None) -> None:
            if self.settings.is_ordered:
                for number in matrices.meant(shard):
                    target.data[number].copy_(loaded)

        parameter.weight_loader = load
        layer.register_parameter("g_idx", parameter)

    def _is_vllms(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> bool:
        """Leaves the layer to vLLM's own method where that can compute it."""
        own = _vllms_config(self.settings)
        if own is None or self.settings.is_ordered:
            return False
        with contextlib.suppress(ValueError):
            method = AutoGPTQLinearMethod(own)
            method.create_weights(layer, *sizes, **attributes)
            layer.quant_method = method
            return True
        return False

    def _vllms_kernel(
        self, columns: int, rows: int, input_size: int, output_size: int, dtype: torch.dtype
    ) -> Any:
        bits, symmetric = self.settings.bits, self.settings.is_symmetric
        name = f"uint{bits}b{1 << (bits - 1)}" if symmetric else f"uint{bits}"
        config = MPLinearLayerConfig(
            full_weight_shape=(input_size, output_size),
            partition_weight_shape=(columns, rows),
            weight_type=getattr(scalar_types, name),
            act_type=dtype,
            group_size=self.settings.group_size,
            zero_points=not symmetric,
        )
        try:
            return choose_mp_linear_kernel(config)(config, "qweight", "scales", "qzeros")
        except ValueError:
            return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        orders = self._orders(layer)
        scales = layer.scales.data
        packed, zeros = layer.qweight.data.view(torch.uint8), layer.qzeros.data.to(torch.uint8)
        for part, inputs in orders:
            if inputs is not None:
                packed[part] = format.reorder(packed[part], self.settings.bits, inputs)
        self._parts = [part for part, _ in orders]
        every = [inputs for _, inputs in orders if inputs is not None]
        if self._takes_order:
            del layer.g_idx
        layer.order = _frozen(torch.stack(every).int()) if every else None
        if self.kernel is not None and len(orders) == 1:
            self._give_to_kernel(layer, packed, scales, zeros)
            return
        self.kernel = None
        self._rounded = activations.are_rounded(get_current_vllm_config())
        if self.settings.is_symmetric:
            zeros = zeros[:1, :1]
        layer.qweight, layer.scales = _frozen(packed), _frozen(scales)
        layer.qzeros = _frozen(zeros.to(scales.dtype))

    def _orders(self, layer: torch.nn.Module) -> list[tuple[slice, torch.Tensor | None]]:
        """The parts of the layer that have an order of their inputs each, and that."""
        whole = slice(0, self._parts[-1].stop)
        if not self.settings.is_ordered:
            return [(whole, None)]
        indices = layer.g_idx.data
        if (indices == indices[0]).all():
            return [(whole, format.order(indices[0]))]
        in_order = torch.arange(indices.shape[1], device=indices.device)
        orders = []
        for part, index in zip(self._parts, indices, strict=True):
            inputs = format.order(index)
            orders.append((part, in_order if inputs is None else inputs))
        return orders

    def _give_to_kernel(
        self,
        layer: torch.nn.Module,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
    ) -> None:
        """Has vLLM's kernel take the weights, in the layout in which its own methods give them."""
        bits = self.settings.bits

        def words(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(torch.int32).T.contiguous()

        def parameter(kind: Any, tensor: torch.Tensor, **dims: int) -> torch.nn.Parameter:
            made: torch.nn.Parameter = kind(data=tensor, weight_loader=None, **dims)
            return made

        factor = format.WORD // bits
        layer.qweight = parameter(
            PackedvLLMParameter,
            words(packed),
            input_dim=0,
            output_dim=1,
            packed_dim=0,
            packed_factor=factor,
        )
        layer.scales = parameter(
            GroupQuantScaleParameter, scales.T.contiguous(), input_dim=0, output_dim=1
        )
        layer.qzeros = parameter(
            PackedvLLMParameter,
            words(grouped.pack(zeros.T, bits)),
            input_dim=1,
            output_dim=0,
            packed_dim=0,
            packed_factor=factor,
        )
        self.kernel.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.kernel is not None:
            if layer.order is not None:
                x = x.index_select(-1, layer.order[0])
            product: torch.Tensor = self.kernel.apply_weights(layer, x, bias)
            return product
        products = [self._product(layer, x, number) for number in range(len(self._parts))]
        product = products[0] if len(products) == 1 else torch.cat(products, -1)
        return product if bias is None else product + bias

    def _product(self, layer: torch.nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
        part = self._parts[number]
        if layer.order is not None:
            x = x.index_select(-1, layer.order[number])
        return grouped.matmul(
            x,
            layer.qweight[part],
            layer.scales[part],
            layer.qzeros if self.settings.is_symmetric else layer.qzeros[part],
            self.settings.bits,
            self._rounded,
        )


def _vllms_config(settings: Settings) -> Any:
    """vLLM's own config for layers like these; None where it refuses them."""
    with contextlib.suppress(ValueError):
        return AutoGPTQConfig(
            weight_bits=settings.bits,
            group_size=settings.group_size,
            desc_act=settings.is_ordered,
            is_sym=settings.is_symmetric,
            lm_head_quantized=False,
            dynamic={},
            full_config={},
        )
    return None


def _converting(
    convert: Callable[[torch.Tensor, Settings], torch.Tensor],
    settings: Settings,
    loader: Callable[..., Any],
) -> Callable[..., Any]:
    """Has vLLM load what is made of a tensor of the checkpoint."""

    def load(parameter: Any, loaded: torch.Tensor, *args: Any, **named: Any) -> Any:
        return loader(parameter, convert(loaded, settings), *args, **named)

    return load


def _rows_of_words(qweight: torch.Tensor, settings: Settings) -> torch.Tensor:
    return format.rows(qweight, settings).view(torch.int32)


def _transpose(scales: torch.Tensor, _settings: Settings) -> torch.Tensor:
    return scales.T


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
