"""What weights take, of models whose headers are known and of the demo model's variants."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import gguf_models
import headers
from headers import LLAMA_2, LLAMA_3_8B, MIXTRAL
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.sizing.weights import Weights, weights

GB = 10**9


def of(config: dict[str, Any], kind: str = "cuda", **options: Any) -> Weights:
    return weights(headers.plain(config), options, kind)


def test_a_plain_model() -> None:
    found = of(LLAMA_2["7B"])
    assert found.disk == found.memory == found.peak == 13_476_831_232  # as its index says
    assert found.per_rank == (found.memory,)
    assert found.embeddings == 2 * 2 * 32000 * 4096
    assert found.others == 2 * 65 * 4096
    assert found.linear == found.memory - found.embeddings - found.others
    assert found.experts == 0
    # A row of the embeddings is read for a token, and the whole output layer.
    assert found.read == (found.memory - 2 * 32000 * 4096,)


def test_the_dtype_is_the_engines() -> None:
    single = headers.plain(LLAMA_2["7B"], "F32")
    assert weights(single, {}).disk == 2 * of(LLAMA_2["7B"]).disk
    assert weights(single, {}).memory == of(LLAMA_2["7B"]).memory
    assert weights(single, {"dtype": "float32"}).memory == 2 * of(LLAMA_2["7B"]).memory
    assert of(LLAMA_2["7B"], dtype="float32").memory == 2 * of(LLAMA_2["7B"]).memory


def test_a_vocabulary_is_rounded_up() -> None:
    config = LLAMA_2["7B"] | {"vocab_size": 32001}
    assert of(config).embeddings == 2 * 2 * 32064 * 4096


def test_a_tied_output_layer_is_kept_once() -> None:
    tied = LLAMA_3_8B | {"tie_word_embeddings": True}
    once = 2 * 128256 * 4096
    assert of(tied).embeddings == once
    assert of(tied).read == (of(tied).memory,)
    # Some files have it nevertheless.
    both = headers.plain(LLAMA_3_8B)
    both = dataclasses.replace(both, config=tied)
    assert weights(both, {}).embeddings == once
    assert weights(both, {}).disk == of(LLAMA_3_8B).disk


def test_what_a_config_does_not_say_of_the_output_layer_is_what_its_class_says() -> None:
    both = headers.plain(LLAMA_3_8B)
    unsaid = {name: value for name, value in LLAMA_3_8B.items() if name != "tie_word_embeddings"}
    for model_type, count in {"llama": 2, "falcon": 1}.items():
        config = unsaid | {"model_type": model_type}
        found = weights(dataclasses.replace(both, config=config), {})
        assert found.embeddings == count * 2 * 128256 * 4096


def test_processors_have_embeddings_and_the_output_layer_twice() -> None:
    once = 2 * 128256 * 4096
    assert of(LLAMA_3_8B, "cpu").embeddings == 4 * once
    assert of(LLAMA_3_8B | {"tie_word_embeddings": True}, "cpu").embeddings == 3 * once
    # The embeddings themselves compute the output.
    tied = LLAMA_3_8B | {"tie_word_embeddings": True, "model_type": "gemma2"}
    assert of(tied, "cpu").embeddings == 2 * once


def test_embeddings_of_single_layers_compute_no_output() -> None:
    model = headers.plain(LLAMA_3_8B | {"tie_word_embeddings": True})
    size = 2 * 128256 * 64
    own = {"model.embed_tokens_per_layer.weight": Tensor("BF16", (128256, 64), "", 0, size)}
    more = dataclasses.replace(model, tensors={**model.tensors, **own})

    found = weights(more, {}, "cpu").embeddings - weights(model, {}, "cpu").embeddings
    assert found == 2 * size
    assert of(LLAMA_3_8B, "cpu").read == of(LLAMA_3_8B).read


def test_layers_of_a_draft_are_kept_where_they_are_used() -> None:
    config = LLAMA_2["7B"] | {"num_hidden_layers": 33}
    drafting = dataclasses.replace(headers.plain(config), config=LLAMA_2["7B"])
    assert weights(drafting, {}).memory == of(LLAMA_2["7B"]).memory
    options = {"speculative_config": {"method": "deepseek_mtp"}}
    assert weights(drafting, options).memory == of(config).memory


@pytest.mark.parametrize(("blocks", "kept"), [(None, 1), (1, 1), (2, 2), (4, 3)])
def test_blocks_that_layers_share_are_kept_once(blocks: int | None, kept: int) -> None:
    tensors = {
        f"model.layers.{number}.shared_transformer.self_attn.q_proj.weight": headers.tensor(
            (100, 10), "BF16"
        )
        for number in (10, 2, 6)
    }
    zamba = Checkpoint("", {"model_type": "zamba2", "num_mem_blocks": blocks}, (), tensors)
    assert weights(zamba, {}).linear == kept * 2000
    assert weights(zamba, {}).disk == 3 * 2000


# -- ranks


def test_tensor_parallel_ranks_divide_matrices_and_have_all_norms() -> None:
    whole, (first, second) = of(LLAMA_2["70B"]), of(LLAMA_2["70B"], tensor_parallel_size=2).per_rank
    assert first == second == (whole.memory - whole.others) // 2 + whole.others


def test_keys_and_values_of_fewer_heads_than_ranks_are_on_several() -> None:
    config = LLAMA_2["70B"]
    keys = 2 * 80 * 2 * 8192 * 1024
    eight, sixteen = (of(config, tensor_parallel_size=ranks) for ranks in (8, 16))
    whole = of(config)
    rest = whole.linear - keys + whole.embeddings
    assert eight.per_rank[0] == rest // 8 + keys // 8 + whole.others
    assert sixteen.per_rank[0] == rest // 16 + keys // 8 + whole.others
    assert sixteen.memory == sum(sixteen.per_rank)


def test_fused_matrices_are_divided_as_their_parts() -> None:
    shapes = {"model.layers.0.self_attn.qkv_proj.weight": ((32 + 2 * 2) * 128, 4096)}
    config = headers.config(4096, 0, 1, 32, num_key_value_heads=2)
    tensors = {name: headers.tensor(shape, "BF16") for name, shape in shapes.items()}
    found = weights(Checkpoint("", config, (), tensors), {"tensor_parallel_size": 8})
    assert found.per_rank == ((4 + 2) * 128 * 4096 * 2,) * 8


def test_heads_of_keys_are_counted_by_the_name_that_the_config_has_for_them() -> None:
    fused = {
        "transformer.h.0.self_attention.query_key_value.weight": headers.tensor(
            ((32 + 2 * 2) * 128, 4096), "BF16"
        )
    }
    config = {"num_layers": 1, "num_attention_heads": 32, "multi_query_group_num": 2}  # ChatGLM
    found = weights(Checkpoint("", config, (), fused), {"tensor_parallel_size": 8})
    assert found.per_rank == ((4 + 2) * 128 * 4096 * 2,) * 8


def test_pipeline_ranks_have_layers_of_their_own() -> None:
    config = LLAMA_2["7B"]
    layer = (
        of(config | {"num_hidden_layers": 1}).memory - of(config | {"num_hidden_layers": 0}).memory
    )
    embeddings, norm = 2 * 32000 * 4096, 2 * 4096
    found = of(config, pipeline_parallel_size=3)
    # vLLM gives the ranks 10, 11 and 11 of 32 layers, the last one least where it does not go up.
    assert found.per_rank == (
        11 * layer + embeddings,
        11 * layer,
        10 * layer + embeddings + norm,
    )
    assert found.memory == of(config).memory


def test_a_tied_output_layer_is_on_the_first_and_the_last_stage() -> None:
    tied = LLAMA_3_8B | {"tie_word_embeddings": True}
    found = of(tied, pipeline_parallel_size=2)
    assert found.memory == of(tied).memory + 2 * 128256 * 4096
    assert sum(found.read) == of(tied).memory


def test_experts() -> None:
    found = of(MIXTRAL)
    assert found.memory == 93_405_585_408  # as its index says
    assert found.experts == 2 * 32 * 8 * 3 * 4096 * 14336
    # Two of eight are read for a token.
    assert found.read == (found.memory - found.experts * 6 // 8 - found.embeddings // 2,)
    routers = 2 * 32 * 8 * 4096
    ranks = of(MIXTRAL, tensor_parallel_size=2).per_rank
    assert ranks[0] == (found.memory - routers - found.others) // 2 + routers + found.others
    apart = of(MIXTRAL, data_parallel_size=2)
    assert apart.per_rank == (found.memory - found.experts // 2,)


def test_a_part_for_pictures_is_divided_unless_it_is_said_otherwise() -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": headers.tensor((100, 10), "BF16"),
        "vision_tower.encoder.layers.7.mlp.fc1.weight": headers.tensor((60, 10), "BF16"),
        "vision_tower.encoder.layers.7.layer_norm.weight": headers.tensor((10,), "BF16"),
    }
    pictures = Checkpoint("", {"text_config": LLAMA_2["7B"]}, (), tensors)
    found = weights(pictures, {})
    assert (found.linear, found.others, found.read) == (2000, 1220, (2000,))
    options: dict[str, Any] = {"tensor_parallel_size": 2}
    assert weights(pictures, options).per_rank == (1620, 1620)
    options["mm_encoder_tp_mode"] = "data"
    assert weights(pictures, options).per_rank == (2220, 2220)


# -- quantized


def test_a_model_that_is_quantized_while_it_loads() -> None:
    plain = of(LLAMA_2["7B"])
    nf4 = of(LLAMA_2["7B"], quantization="bitsandbytes")
    assert nf4.linear == plain.linear // 2 * 0.5625
    assert nf4.peak == nf4.memory == nf4.linear + plain.embeddings + plain.others
    # torchao quantizes what is loaded already.
    int8 = of(LLAMA_2["7B"], quantization="torchao")
    assert int8.linear == plain.linear // 2
    assert int8.peak == plain.memory


def test_experts_are_quantized_online_where_the_method_does_it() -> None:
    plain = of(MIXTRAL)
    assert of(MIXTRAL, quantization="fp8").experts == plain.experts // 2
    assert of(MIXTRAL, quantization="torchao").experts == plain.experts
    routers = 2 * 32 * 8 * 4096
    assert of(MIXTRAL, quantization="fp8").linear == (plain.linear + routers) // 2


# The bytes of linear layers that vLLM holds of each variant on a CPU, as `weighing.py` weighed them
# for test_matrix.py.
HELD = {
    "demo": 7_078_080,
    "demo-awq": 1_880_064,
    "demo-gptq": 1_824_816,
    "gptq-w2": 1_327_104,
    "gptq-w3": 1_382_448,
    "gptq-w4-act": 1_855_536,
    "gptq-w4-asym-act": 2_021_376,
    "gptq-w8": 3_563_568,
    "w4a16": 1_825_200,
    "w4a16-asym": 1_880_448,
    "w8a16": 3_594_672,
    "w8a8": 3_637_440,
    "auto-round": 1_824_816,
    "auto-round-w3": 1_382_448,
    "hqq": 1_990_656,
    "hqq-qmodel": 1_548_288,
}
HELD_FLOATS = {"fp8-dynamic": 7_127_232, "fp8-tensor": 7_127_232, "fp8-block": 7_078_944}
HELD_BITSANDBYTES = {"bnb-nf4": 1_993_872, "bnb-nf4-double": 1_993_872, "bnb-int8": 3_588_624}
HELD_GGUF = {
    "Q8_0": 3_760_128,
    "Q4_0": 1_990_656,
    "Q4_K_M": 2_075_136,
    "Q3_K_M": 1_711_616,
    "Q2_K": 1_300_992,
    "F16": 7_078_080,
}


def made(name: str, folder: Path) -> Checkpoint:
    return check_model(str(checkpoints.make(name, folder / name)), {})


# Made by libraries that take their time to be imported.
SLOW = ("w8a16", "bnb-nf4-double", "bnb-int8")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in (*HELD, *HELD_FLOATS, *HELD_BITSANDBYTES)
    ],
)
def test_linear_layers_take_what_vllm_holds_of_them(tmp_path: Path, name: str) -> None:
    checkpoint = made(name, tmp_path)
    found = weights(dataclasses.replace(checkpoint, is_dequantized=name in HELD_FLOATS), {})
    held = (HELD | HELD_FLOATS | HELD_BITSANDBYTES)[name]
    assert found.linear == pytest.approx(held, rel=0.05)
    files = [tmp_path / name / file for file in checkpoint.files]
    assert found.disk == pytest.approx(sum(file.stat().st_size for file in files), rel=0.05)


def test_what_auto_round_has_of_its_output_layer_on_processors(tmp_path: Path) -> None:
    matrix = 2 * 1024 * 256
    assert weights(made("demo-gptq", tmp_path), {}, "cpu").embeddings == 4 * matrix
    assert weights(made("auto-round", tmp_path), {}, "cpu").embeddings == 3 * matrix


@pytest.mark.parametrize("type", HELD_GGUF)
def test_gguf_files_take_what_is_held_of_them(tmp_path: Path, type: str) -> None:
    file = gguf_models.make(type, tmp_path)
    found = weights(check_model(str(file), {}), {}, "cpu")
    assert found.linear == pytest.approx(HELD_GGUF[type], rel=0.001)
    assert found.disk == pytest.approx(file.stat().st_size, rel=0.03)


def test_experts_of_gguf_files_stay_packed(tmp_path: Path) -> None:
    file = gguf_models.write(gguf_models.mixture(), "Q8_0", tmp_path)
    checkpoint = check_model(str(file), {})
    found = weights(dataclasses.replace(checkpoint, are_experts_dequantized=True), {}, "cpu")
    # 34 bytes for 32 weights.
    assert found.experts == 10_027_008
    assert found == weights(checkpoint, {}, "cpu")


@pytest.mark.parametrize("config", LLAMA_2.values(), ids=LLAMA_2)
def test_awq(config: dict[str, Any]) -> None:
    # As the repositories TheBloke/Llama-2-*-AWQ say.
    published = {32: 3.89, 40: 7.25, 80: 36.61}[config["num_hidden_layers"]]
    found = weights(headers.in_awq(config), {})
    assert found.memory / GB == pytest.approx(published, rel=0.002)
    assert found.disk == found.memory
    half, _ = weights(headers.in_awq(config), {"tensor_parallel_size": 2}).per_rank
    assert half == pytest.approx(found.memory / 2, rel=0.001)


def test_without_headers_nothing_is_known() -> None:
    assert weights(Checkpoint("", LLAMA_2["7B"]), {}) == Weights(0, 0, 0, 0, 0, 0, 0, (0,), (0,))


def test_what_a_config_says_wrong_does_not_matter_here() -> None:
    checkpoint = headers.in_awq(LLAMA_2["7B"])
    wrong = headers.AWQ | {"bits": "four"}
    config = {**checkpoint.config, "quantization_config": wrong}
    found = weights(dataclasses.replace(checkpoint, config=config), {})
    assert found == weights(checkpoint, {})
