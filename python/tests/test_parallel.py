"""Which sizes of parallelism a model can be divided by."""

from typing import Any

import pytest
from vllm.model_executor.layers import vocab_parallel_embedding

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.engine import parallel
from vllm_bridge.errors import BridgeError

TENSOR = Tensor("I32", (1,), "model.safetensors", 0, 4)

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "intermediate_size": 1536,
    "vocab_size": 32000,
}


def refused(config: dict[str, Any], *tensors: str, **options: Any) -> BridgeError:
    checkpoint = Checkpoint(config=config, tensors=dict.fromkeys(tensors, TENSOR))
    with pytest.raises(BridgeError) as caught:
        parallel.check(checkpoint, options)
    assert caught.value.reason == "invalid_option"
    return caught.value


@pytest.mark.parametrize(
    ("changes", "ranks", "words", "allowed"),
    [
        ({}, 5, "it has 24 attention heads", [1, 2, 4, 8]),
        ({}, 12, "it has 8 heads of keys and values", [1, 2, 4, 8]),
        ({"num_key_value_heads": 3}, 2, "it has 3 heads of keys", [1]),
        # 256,000 and 24 padded are 256,064, which 3 does not divide.
        ({"vocab_size": 256001, "num_key_value_heads": 24}, 3, "padded to 256064", [1, 2, 4, 8]),
        ({"num_key_value_heads": None}, 5, "it has 24 attention heads", [1, 2, 4, 8]),
    ],
)
def test_what_does_not_divide_a_model(
    changes: dict[str, Any], ranks: int, words: str, allowed: list[int]
) -> None:
    error = refused(LLAMA | changes, tensor_parallel_size=ranks)
    assert words in error.what
    assert error.details == {
        "option": "tensor_parallel_size",
        "value": ranks,
        "allowed": allowed,
    }
    assert f"It can be {', '.join(map(str, allowed))}." in error.remedy


def test_parts_of_models_that_see_are_looked_at() -> None:
    refused({"model_type": "llava", "text_config": LLAMA}, tensor_parallel_size=5)


def test_a_group_of_quantized_weights_lies_on_one_rank() -> None:
    name = "model.layers.0.mlp.down_proj.qweight"
    settings = {"quant_method": "awq", "bits": 4, "group_size": 512}
    config = LLAMA | {"quantization_config": settings}
    error = refused(config, name, tensor_parallel_size=2)
    assert "768 of the 1536 columns" in error.what
    assert error.details["allowed"] == [1]
    for left in (settings | {"group_size": 128}, settings | {"group_size": -1}):
        fine = Checkpoint(
            config=LLAMA | {"quantization_config": left},
            tensors={name: TENSOR},
        )
        parallel.check(fine, {"tensor_parallel_size": 2})


def test_each_stage_has_a_layer() -> None:
    error = refused(LLAMA, pipeline_parallel_size=5)
    assert error.details["num_hidden_layers"] == 4
    assert error.remedy == "Give 4 at most."


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {}),
        (LLAMA, {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}),
        # More ranks than heads of keys and values: several hold the same.
        (LLAMA | {"num_key_value_heads": 2}, {"tensor_parallel_size": 8}),
        # A latent vector is on every rank.
        (LLAMA | {"num_key_value_heads": 3, "kv_lora_rank": 512}, {"tensor_parallel_size": 2}),
        ({}, {"tensor_parallel_size": 3, "pipeline_parallel_size": 9}),
        ({"model_type": "mamba"}, {"tensor_parallel_size": 2}),
        # vLLM's to say.
        (LLAMA, {"tensor_parallel_size": "5", "pipeline_parallel_size": None}),
    ],
)
def test_what_divides_a_model(config: dict[str, Any], options: dict[str, Any]) -> None:
    parallel.check(Checkpoint(config=config), options)


def test_the_vocabulary_is_padded_as_vllm_does() -> None:
    assert parallel.VOCABULARY_PADDING == vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE


def test_nodes_have_equal_shares() -> None:
    parallel.check(Checkpoint(), {"nnodes": 2, "tensor_parallel_size": 2})
    parallel.check(Checkpoint(), {"nnodes": 4, "data_parallel_size": 2, "tensor_parallel_size": 2})
    error = refused({}, nnodes=2, pipeline_parallel_size=3)
    assert error.what == "2 nodes cannot have equal shares of 3 processes."
    assert error.details == {"option": "nodes", "nodes": 2, "processes": 3}
    assert "of 1 process." in refused({}, nnodes=2).what
