"""Whether the layers of a model in GPTQ's format can be divided among the ranks of an engine."""

from typing import Any

from vllm_bridge.errors import BridgeError


def check(config: Any, layer: Any) -> None:
    """Looks at the layers whose inputs are divided: those that the model's others lead to.

    Args:
        config: vLLM's config of the engine
        layer: the one of the MLP, as vLLM makes it for one rank

    Raises:
        BridgeError: ``unsupported_quantization``
    """
    ranks = config.parallel_config.tensor_parallel_size
    settings = config.quant_config.settings_of(layer.prefix)
    model = config.model_config
    heads = model.hf_text_config.num_attention_heads * model.get_head_size()
    try:
        for columns in (layer.input_size, heads):
            settings.check_columns(columns, ranks)
    except ValueError as error:
        raise BridgeError(
            "unsupported_quantization",
            f"This GPTQ checkpoint does not run with `tensor_parallel_size: {ranks}`: {error}.",
            {"quantization": "gptq", "option": "tensor_parallel_size", "ranks": ranks},
            remedy=(
                "Leave the option out, or take `replicas` or `pipeline_parallel_size` to use more "
                "of the machine."
            ),
        ) from error
