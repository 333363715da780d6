"""A single linear layer of a model, made by vLLM on its own: how vLLM would compute the model's
layers, and whether it can, before any weight is read. Imports vLLM.

vLLM finds out about most of what it cannot do only when it makes the layers, which is when the
engine's processes have been started.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

# Columns and rows of a layer that stands for others: a multiple of every method's groups and
# blocks, and small.
SIZE = 512

# What a layer of experts is marked with whose weights were dequantized.
DEQUANTIZED_EXPERTS = "vllm_bridge_dequantized_experts"

# How deep a method hides its kernel: one that wraps another method is the deepest.
_DEPTH = 3

# What PyTorch says of an operation that a build only declares, or does not have.
_NO_OPERATION = re.compile(
    r"::\w+\(\) expected at most 0 argument|Could not run '|'_OpNamespace' .* has no attribute"
)


@contextlib.contextmanager
def linear(
    config: Any, dtype: Any, quant_config: Any, prefix: str, columns: int = SIZE, rows: int = SIZE
) -> Iterator[Any]:
    """A layer as vLLM makes it, with its parameters not filled.

    Args:
        config: vLLM's config of an engine
        dtype: that the model computes in
        quant_config: vLLM's config of a quantization method, or None
        prefix: the layer's name in the model
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.platforms import current_platform

    # What is made here must not touch an accelerator: its memory is for the engine's processes.
    device = torch.device("cpu" if current_platform.is_cpu() else "meta")
    default_dtype = torch.get_default_dtype()
    with set_current_vllm_config(config), _one_rank(), device, torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            yield ReplicatedLinear(
                columns,
                rows,
                bias=False,
                quant_config=quant_config,
                prefix=prefix,
                return_bias=False,
                disable_tp=True,
            )
        finally:
            torch.set_default_dtype(default_dtype)


@contextlib.contextmanager
def experts(config: Any, quant_config: Any, prefix: str, names: tuple[str, ...]) -> Iterator[Any]:
    """The experts of one layer of a mixture as vLLM makes them, with their parameters not filled,
    and fewer of them. For CPUs.

    Args:
        config: vLLM's config of an engine
        quant_config: vLLM's config of a quantization method
        prefix: their name in the model
        names: of an expert's gate, down and up
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    few, model = 2, config.model_config
    sizes = _expert_sizes(model.hf_text_config)
    with set_current_vllm_config(config), _one_rank(), torch.device("meta"):
        parallel = FusedMoEParallelConfig.make_no_parallel()
        moe_config = FusedMoEConfig(
            num_experts=few,
            experts_per_token=few,
            hidden_dim=sizes[0],
            intermediate_size=sizes[1],
            num_local_experts=few,
            num_logical_experts=few,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=parallel,
            in_dtype=model.dtype,
            is_lora_enabled=config.lora_config is not None,
        )
        yield RoutedExperts(
            prefix,
            model.dtype,
            moe_config,
            quant_config,
            ExpertMapManager(
                max_num_batched_tokens=few,
                top_k=few,
                global_num_experts=few,
                num_redundant_experts=0,
                num_expert_group=None,
                moe_parallel_config=parallel,
                placement_strategy="linear",
                enable_eplb=False,
                num_fused_shared_experts=0,
                rocm_aiter_enabled=False,
            ),
            *names,
        )


def _expert_sizes(hf_config: Any) -> tuple[int, int]:
    """The hidden and the intermediate size of experts; others where a config does not tell."""
    hidden = getattr(hf_config, "hidden_size", None)
    inner = getattr(hf_config, "moe_intermediate_size", None) or getattr(
        hf_config, "intermediate_size", None
    )
    return (
        hidden if isinstance(hidden, int) else SIZE,
        inner if isinstance(inner, int) else SIZE,
    )


def missing_operation(layer: Any) -> str | None:
    """PyTorch's word about an operation that the layer needs and the build for CPUs only declares
    or does not have; None where there is none, and on accelerators, which nothing here touches.

    The layer is filled with numbers and computes them.
    """
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    try:
        for name, parameter in list(layer.named_parameters()):
            if parameter.device.type == "meta":  # filled by vLLM while it quantizes
                parameter = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                setattr(layer, name, parameter)
            number = 0.01 if parameter.dtype.is_floating_point else 0
            parameter.data.copy_(torch.full(parameter.shape, number).to(parameter.dtype))
        layer.quant_method.process_weights_after_loading(layer)
        layer(torch.full((2, layer.input_size), 0.01))
    except Exception as error:  # some methods need more than numbers
        return str(error) if _NO_OPERATION.search(str(error)) else None
    return None


def is_quantized(layer: Any) -> bool:
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    plain = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
    return not isinstance(layer.quant_method, plain)


def kernel(layer: Any) -> str:
    """The name of the kernel that computes a layer, or of its method where that has none. Methods
    that are not vLLM's say it themselves, by their ``kernel_name``."""
    if named := getattr(layer.quant_method, "kernel_name", None):
        return str(named)
    method = getattr(layer, "scheme", None) or layer.quant_method
    level = [layer.quant_method, method]
    for _ in range(_DEPTH):
        level = [value for owner in level for value in vars(owner).values() if _is_part(value)]
        for value in level:
            if type(value).__name__.endswith("Kernel"):
                return type(value).__name__
    return type(method).__name__


def _is_part(value: Any) -> bool:
    """Whether something that a method of quantization holds may be, or have, its kernel."""
    from vllm.model_executor.layers.quantization import QuantizationConfig

    module = type(value).__module__
    return (
        module.startswith(("vllm.", "vllm_"))
        and hasattr(value, "__dict__")
        and not isinstance(value, QuantizationConfig)
    )


def shapes(layer: Any) -> Mapping[str, tuple[int, ...]]:
    """Of the tensors of a checkpoint that become a layer's parameters; where a parameter is laid
    out in another way, it says so in its ``stored_shape``."""
    return {
        name: tuple(getattr(parameter, "stored_shape", parameter.shape))
        for name, parameter in layer.named_parameters()
    }


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """A tensor-parallel group of one, for parameters that want to know their rank in it."""
    from vllm.distributed import parallel_state

    if parallel_state._TP is not None:
        yield
        return
    parallel_state._TP = SimpleNamespace(rank_in_group=0, world_size=1)
    try:
        yield
    finally:
        parallel_state._TP = None
