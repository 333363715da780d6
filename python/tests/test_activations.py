"""What an engine takes beside weights and cache, held against logs that vLLM's users have shown in
public."""

from typing import Any

import pytest

from model_configs import (
    BERT,
    DEEPSEEK_V3,
    GEMMA_4_31B,
    GPT_OSS_20B,
    LLAMA_3_8B,
    QWEN_3_CODER_30B,
    transformer,
)
from vllm_bridge.sizing import activations

GIB = 2**30

LLAMA = LLAMA_3_8B | {"intermediate_size": 14336, "vocab_size": 128256}
QWEN_14B = transformer(48, 40, 8, 128, model_type="qwen2", intermediate_size=13824)

LOGS = (
    # vllm-project/vllm issue 10517: "Loading model weights took 14.9888 GB", then
    # "peak_torch_memory=17.06GiB" with 20000 tokens at a time, and 17.98 with 29000
    pytest.param(LLAMA, {"max_num_batched_tokens": 20000}, 17.06 - 14.99, 0.02, id="20000"),
    pytest.param(LLAMA, {"max_num_batched_tokens": 29000}, 17.98 - 14.99, 0.02, id="29000"),
    # Issue 13061, of the second of two ranks, which then chose no answers: "PyTorch activation peak
    # memory takes 0.19GiB"
    pytest.param(
        QWEN_14B | {"vocab_size": 0}, {"tensor_parallel_size": 2}, 0.19, 0.3, id="two ranks"
    ),
)


@pytest.mark.parametrize(("config", "options", "size", "tolerance"), LOGS)
def test_a_step_takes_what_logs_of_vllm_say(
    config: dict[str, Any], options: dict[str, Any], size: float, tolerance: float
) -> None:
    found = activations.of(config, options).activations

    assert found / GIB == pytest.approx(size, rel=tolerance)


def test_a_step_is_a_sum_by_hand() -> None:
    # 2048 tokens of three streams of 4096 numbers and three of a gate of 14336, in bf16. 16 answers
    # among 128256 tokens take less.
    found = activations.of(LLAMA, {"max_num_seqs": 16})

    assert found.activations == 2048 * 2 * (3 * 4096 + 3 * 14336)


def test_many_answers_take_more_than_the_layers() -> None:
    # The logits of each in bf16, and four tables of float32 and of what is drawn.
    found = activations.of(LLAMA, {"max_num_seqs": 1024})

    assert found.activations == 2048 * 2 * 3 * 4096 + 1024 * 128256 * 14


def test_experts_have_two_workspaces() -> None:
    config = QWEN_3_CODER_30B | {
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "hidden_size": 2048,
    }

    # Of each token eight experts: 2048 for what goes in and comes out, more than their 768 and
    # 1536; and what these come to.
    assert activations.of(config, {}).activations == 2048 * 2 * (
        3 * 2048 + 8 * (2048 + 2048) + 2048
    )


def test_latent_attention_is_computed_in_whole_heads() -> None:
    config = DEEPSEEK_V3 | {"hidden_size": 7168}

    # 128 heads of queries and of what comes of them, and one head of keys and values.
    assert activations.of(config, {}).activations == 2048 * 2 * (
        3 * 7168 + (2 * 128 + 2) * (128 + 64)
    )


def test_ranks_divide_what_is_wide() -> None:
    few = {"max_num_seqs": 16}
    whole = activations.of(LLAMA, few).activations
    divided = activations.of(LLAMA, few | {"tensor_parallel_size": 4}).activations

    assert whole - divided == 2048 * 2 * 3 * 14336 * 3 // 4


def test_an_encoder_chooses_no_tokens() -> None:
    config = BERT | {"intermediate_size": 3072, "vocab_size": 30522}

    assert activations.of(config, {"max_num_seqs": 1024}).activations == 2048 * 2 * (
        3 * 768 + 3 * 3072
    )


def test_graphs_take_memory_unless_there_are_none() -> None:
    eager = activations.of(LLAMA, {"enforce_eager": True}).framework
    graphs = activations.of(LLAMA, {}).framework

    # What users' logs say of either.
    assert 0.15 * GIB < eager < 0.36 * GIB
    assert 0.2 * GIB < graphs - eager < 0.4 * GIB


@pytest.mark.parametrize(
    ("width", "tokens", "size"),
    # What a worker of the CPU engine had more of the system while it computed a prompt, in MiB.
    [(8192, 2048, 219.6), (8192, 4096, 442.7), (2048, 2048, 103.8), (2048, 4096, 219.6)],
)
def test_on_a_cpu_a_step_takes_what_was_measured(width: int, tokens: int, size: float) -> None:
    config = transformer(2, 16, 4, 64, intermediate_size=width, vocab_size=1088)
    found = activations.of(config, {"max_num_batched_tokens": tokens}, "cpu")

    assert found.activations / 2**20 == pytest.approx(size, rel=0.06)


def test_positions_have_a_table_of_sines_and_cosines() -> None:
    rope = LLAMA | {"rope_theta": 500_000.0}

    # 131072 positions of 128 numbers in bf16.
    assert activations.rotary_table(rope, {}) == 2 * 128 * 131_072
    assert activations.rotary_table(LLAMA, {}) == 0
    with_table = activations.of(rope, {}).framework
    assert with_table - activations.of(LLAMA, {}).framework == 2 * 128 * 131_072


def test_windows_have_a_table_of_their_own() -> None:
    config = GEMMA_4_31B["text_config"] | {
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10_000.0},
            "full_attention": {"rope_theta": 1_000_000.0},
        },
    }

    assert activations.rotary_table(config, {}) == 2 * (256 + 512) * 262_144


def test_tables_are_as_long_as_positions_are_stretched() -> None:
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}

    # Of gpt-oss they are in float32.
    config = GPT_OSS_20B | {"rope_scaling": yarn}
    assert activations.rotary_table(config, {}) == 4 * 64 * 131_072


def test_only_a_part_of_a_head_may_be_turned() -> None:
    config = LLAMA | {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

    assert activations.rotary_table(config, {"dtype": "float32"}) == 4 * 64 * 131_072
