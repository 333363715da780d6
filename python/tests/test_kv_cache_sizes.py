"""The KV cache of well-known models, held against papers, against logs that vLLM's users have shown
in public, and against sums by hand."""

import math
from typing import Any

import pytest

from model_configs import (
    BAMBA_9B,
    BERT,
    CHATGLM_3,
    COMMAND_R7B,
    DBRX,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    FALCON_7B,
    FALCON_H1_7B,
    GEMMA_2_9B,
    GEMMA_3_4B,
    GEMMA_3N_E4B,
    GEMMA_4_31B,
    GPT_OSS_20B,
    GRANITE_4_TINY,
    JAMBA,
    KIMI_LINEAR,
    LFM_2_1_2B,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_3_405B,
    LLAMA_4_SCOUT,
    LLAVA_1_5_7B,
    MAMBA_2_8B,
    MINICPM_3_4B,
    MINIMAX_TEXT,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    NEMOTRON_H_8B,
    NEMOTRON_NAS,
    OPT_13B,
    PHI_3_MINI,
    QWEN_3_1_7B,
    QWEN_3_CODER_30B,
    QWEN_3_NEXT,
    QWEN_25_72B,
    QWEN_25_VL_7B,
    WHISPER_LARGE_V3,
    ZAMBA_2_7B,
    Config,
)
from vllm_bridge.errors import BridgeError
from vllm_bridge.sizing import kv_cache, layers

GIB = 2**30


def case(name: str, *values: Any) -> Any:
    return pytest.param(*values, id=name)


PUBLISHED = (
    # "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 3:
    # "the KV cache of a single token demands 800 KB of space"
    case("OPT 13B", OPT_13B, 1, 800 * 1024),
    # "Insights into DeepSeek-V3", table 1: KV cache per token in BF16
    case("DeepSeek V3", DEEPSEEK_V3, 1, 70_272),
    case("Qwen 2.5 72B", QWEN_25_72B, 1, 327_680),
    case("Llama 3.1 405B", LLAMA_3_405B, 1, 516_096),
    # "DeepSeek-V2", table 1: (d_c + d_R) elements in each layer, with d_c = 4 * 128, d_R = 128 / 2
    case("DeepSeek V2", DEEPSEEK_V2, 1, (512 + 64) * 60 * 2),
    # "Jamba: A Hybrid Transformer-Mamba Language Model", table 1: 256K tokens in 16 bits
    case("Llama 2 7B", LLAMA_2_7B, 256 * 1024, 128 * GIB),
    case("Mixtral 8x7B", MIXTRAL_8X7B, 256 * 1024, 32 * GIB),
    case("Jamba", JAMBA, 256 * 1024, 4 * GIB),
)


@pytest.mark.parametrize(("config", "tokens", "size"), PUBLISHED)
def test_a_token_takes_what_papers_say(config: Config, tokens: int, size: int) -> None:
    assert kv_cache.of(config, {}).bytes_per_token * tokens == size


LOGS = (
    # vllm-project/vllm issue 33263: "Available KV cache memory: 18.78 GiB",
    # "GPU KV cache size: 175,856 tokens"
    case("Qwen 3 1.7B", QWEN_3_1_7B, {"max_model_len": 1024}, 18.78, 175_856),
    # Issue 10517: "kv_cache_size=3.81GiB", "GPU blocks: 1952"
    case("Llama 3.1 8B", LLAMA_3_8B, {"max_model_len": 20000}, 3.81, 1952 * 16),
)


@pytest.mark.parametrize(("config", "options", "memory", "tokens"), LOGS)
def test_as_many_tokens_fit_as_logs_of_vllm_say(
    config: Config, options: dict[str, Any], memory: float, tokens: int
) -> None:
    found = kv_cache.of(config, options).tokens(int(memory * GIB), options["max_model_len"])

    # The log rounds the memory to hundredths.
    assert found == pytest.approx(tokens, rel=0.01 / memory + 0.001)


def test_the_whole_context_takes_what_a_log_of_vllm_says() -> None:
    # Issue 34076: "To serve at least one request with the models's max seq len (262144), (24.0 GiB
    # KV cache is needed"
    found = kv_cache.of(QWEN_3_CODER_30B, {})

    assert found.bytes(262_144) - found.bytes_per_block == 24 * GIB


STATES = (
    # Issue 28228, on two ranks: "Setting attention block size to 960 tokens", "Padding mamba page
    # size by 1.89%", of MLA's (512 + 64) * 2 bytes for a token
    case("Kimi Linear", KIMI_LINEAR, 2, 960 * (512 + 64) * 2 / 1.0189),
    # By hand: conv (4 - 1) * 8192 in bf16, ssm 8192 * 16 in bf16
    case("Jamba", JAMBA, 1, 3 * 8192 * 2 + 8192 * 16 * 2),
    case("Jamba on four ranks", JAMBA, 4, (3 * 8192 * 2 + 8192 * 16 * 2) / 4),
    # conv 3 * (keys 2048 + keys 2048 + values 4096), ssm 32 heads * 128 * 128
    case("Qwen 3 Next", QWEN_3_NEXT, 1, 3 * 8192 * 2 + 32 * 128 * 128 * 2),
    # conv 3 * (8192 + 2 * 8 groups * 128), ssm 128 heads * 64 * 128 in float32, which is the
    # default of this family
    case("Nemotron H", NEMOTRON_H_8B, 1, 3 * 10240 * 2 + 128 * 64 * 128 * 4),
    # Sixteen ranks need sixteen groups: eight of them are copies.
    case("Nemotron H on 16", NEMOTRON_H_8B, 16, 3 * 12288 / 16 * 2 + 8 * 64 * 128 * 4),
    # conv 3 * (3072 + 2 * 128), ssm 48 * 64 * 128
    case("Granite 4", GRANITE_4_TINY, 1, 3 * 3328 * 2 + 48 * 64 * 128 * 2),
    case("Falcon H1", FALCON_H1_7B, 1, 3 * (3072 + 512) * 2 + 24 * 128 * 256 * 2),
    case("Bamba", BAMBA_9B, 1, 3 * (8192 + 256) * 2 + 128 * 64 * 128 * 2),
    case("Zamba 2", ZAMBA_2_7B, 1, 3 * (7168 + 2 * 2 * 64) * 2 + 112 * 64 * 64 * 2),
    # Two inputs of 2048.
    case("LFM 2", LFM_2_1_2B, 1, 2 * 2048 * 2),
    # 64 heads with a matrix of 128 * 128, and no convolution
    case("MiniMax", MINIMAX_TEXT, 1, 64 * 128 * 128 * 2),
    case("Mamba", MAMBA_2_8B, 1, 3 * 5120 * 2 + 5120 * 16 * 2),
)


@pytest.mark.parametrize(("config", "ranks", "size"), STATES)
def test_layers_without_attention_keep_a_state(config: Config, ranks: int, size: float) -> None:
    found = kv_cache.of(config, {"tensor_parallel_size": ranks})
    states = next(one for one in found.layers if one.kind == "mamba")

    assert states.bytes_per_sequence / states.count == pytest.approx(size, rel=1e-4)


# Of a layer with heads of keys and values, of so many numbers each, in bf16.
def layer(heads: int, size: int) -> int:
    return heads * size * 2 * 2


BY_HAND = (
    # Multi-query attention: one head of 64.
    case("Falcon 7B", FALCON_7B, {"full": (32, 32 * layer(1, 64), None)}),
    case("DBRX", DBRX, {"full": (40, 40 * layer(8, 128), None)}),
    case("ChatGLM 3", CHATGLM_3, {"full": (28, 28 * layer(2, 128), None)}),
    # Heads of 64 + 32 numbers, which vLLM does not keep in their latent form.
    case("MiniCPM 3", MINICPM_3_4B, {"full": (62, 62 * layer(40, 96), None)}),
    # Groups of eight and of sixteen heads; two layers without attention.
    case(
        "Nemotron NAS",
        NEMOTRON_NAS,
        {"full": (2, layer(8, 128) + layer(4, 128), None), "none": (2, 0, None)},
    ),
    # What finds tokens keeps 128 bytes and a float32.
    case(
        "DeepSeek V3.2",
        DEEPSEEK_V32,
        {"mla": (61, 61 * 576 * 2, None), "indexer": (61, 61 * 132, None)},
    ),
    case("Mistral 7B v0.1", MISTRAL_7B, {"sliding": (32, 32 * layer(8, 128), 4096)}),
    case("Phi 3 mini", PHI_3_MINI, {"sliding": (32, 32 * layer(32, 96), 2047)}),
    case(
        "Gemma 2 9B",
        GEMMA_2_9B,
        {"sliding": (21, 21 * layer(8, 256), 4096), "full": (21, 21 * layer(8, 256), None)},
    ),
    # Each sixth of 34 layers is whole: five of them.
    case(
        "Gemma 3 4B",
        GEMMA_3_4B,
        {"sliding": (29, 29 * layer(4, 256), 1024), "full": (5, 5 * layer(4, 256), None)},
    ),
    # The last fifteen of 35 layers use the keys and values of others.
    case(
        "Gemma 3n E4B",
        GEMMA_3N_E4B,
        {
            "sliding": (16, 16 * layer(2, 256), 512),
            "full": (4, 4 * layer(2, 256), None),
            "shared": (15, 0, None),
        },
    ),
    case(
        "Gemma 4 31B",
        GEMMA_4_31B,
        {"sliding": (50, 50 * layer(16, 256), 1024), "full": (10, 10 * layer(4, 512), None)},
    ),
    case(
        "gpt-oss 20b",
        GPT_OSS_20B,
        {"sliding": (12, 12 * layer(8, 64), 128), "full": (12, 12 * layer(8, 64), None)},
    ),
    case(
        "Command R7B",
        COMMAND_R7B,
        {"sliding": (24, 24 * layer(8, 128), 4097), "full": (8, 8 * layer(8, 128), None)},
    ),
    case(
        "Llama 4 Scout",
        LLAMA_4_SCOUT,
        {"chunked": (36, 36 * layer(8, 128), 8192), "full": (12, 12 * layer(8, 128), None)},
    ),
    case(
        "Whisper large v3",
        WHISPER_LARGE_V3,
        {"full": (32, 32 * layer(20, 64), None), "cross": (32, 32 * layer(20, 64), None)},
    ),
    case("Qwen 2.5 VL 7B", QWEN_25_VL_7B, {"full": (28, 28 * layer(4, 128), None)}),
    # Its text part says no more than "llama".
    case("LLaVA 1.5 7B", LLAVA_1_5_7B, {"full": (32, 32 * layer(32, 128), None)}),
    case("BERT", BERT, {}),
    case("a diffusion model", {}, {}),
)


@pytest.mark.parametrize(("config", "expected"), BY_HAND)
def test_each_kind_of_layer_keeps_what_a_sum_by_hand_gives(
    config: Config, expected: dict[str, tuple[int, int, int | None]]
) -> None:
    found = kv_cache.of(config, {})

    assert {
        one.kind: (one.count, one.bytes_per_token, one.window) for one in found.layers
    } == expected
    kept = ("full", "mla", "indexer")
    assert found.bytes_per_token == sum(expected[kind][1] for kind in kept if kind in expected)


COUNTS = (
    case("Nemotron H", NEMOTRON_H_8B, {"mamba": 24, "full": 4, "none": 24}),
    case("Granite 4", GRANITE_4_TINY, {"mamba": 36, "full": 4}),
    # Attention and a state side by side, in every layer.
    case("Falcon H1", FALCON_H1_7B, {"mamba": 44, "full": 44}),
    case("Bamba", BAMBA_9B, {"mamba": 29, "full": 3}),
    # Every layer has a state, thirteen have attention beside it.
    case("Zamba 2", ZAMBA_2_7B, {"mamba": 81, "full": 13}),
    case("LFM 2", LFM_2_1_2B, {"mamba": 10, "full": 6}),
    case("MiniMax", MINIMAX_TEXT, {"mamba": 70, "full": 10}),
    case("Kimi Linear", KIMI_LINEAR, {"mamba": 20, "mla": 7}),
    case("Jamba", JAMBA, {"mamba": 28, "full": 4}),
)


@pytest.mark.parametrize(("config", "counts"), COUNTS)
def test_hybrid_models_have_layers_of_both_kinds(config: Config, counts: dict[str, int]) -> None:
    found = kv_cache.of(config, {})

    assert {one.kind: one.count for one in found.layers} == counts


# Bytes of a head of 128 numbers in keys and as many in values.
DTYPES = (
    ("auto", 512),
    ("bfloat16", 512),
    ("bf16", 512),
    ("float16", 512),
    ("fp8", 256),
    ("fp8_e4m3", 256),
    ("FP8-E5M2", 256),
    # One float32 of scale each.
    ("fp8_per_token_head", 2 * (128 + 4)),
    ("int8_per_token_head", 2 * (128 + 4)),
    ("int4_per_token_head", 2 * (64 + 4)),
    # A byte of scale for sixteen numbers.
    ("nvfp4", 2 * (64 + 8)),
    # One byte a key, four bits a value and their scale and zero.
    ("turboquant_k8v4", 128 + 64 + 4),
    # Norms of the keys.
    ("turboquant_4bit_nc", 64 + 2 + 64 + 4),
    ("turboquant_3bit_nc", 48 + 2 + 48 + 4),
    # A byte of scale for 32 numbers.
    ("ultraquant_4bit", 2 * (64 + 4)),
)


@pytest.mark.parametrize(("dtype", "size"), DTYPES)
def test_the_dtype_of_the_cache_counts_with_its_scales(dtype: str, size: int) -> None:
    found = kv_cache.of(LLAMA_3_8B, {"kv_cache_dtype": dtype})

    assert found.bytes_per_token == 32 * 8 * size


def test_vllm_has_the_same_sizes() -> None:
    pytest.importorskip("vllm")
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, nvfp4_kv_cache_full_dim
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.ops.ultraquant import format as ultraquant
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    def theirs(name: str) -> Any:
        # The backends of these cannot be imported on a CPU.
        if name.startswith("nvfp4"):
            return 2 * nvfp4_kv_cache_full_dim(128)
        if name.startswith("turboquant"):
            return TurboQuantConfig.from_cache_dtype(name, 128).slot_size_aligned
        if name.startswith("ultraquant"):
            return ultraquant.slot_size(128)
        spec = FullAttentionSpec(
            block_size=1,
            num_kv_heads=1,
            head_size=128,
            dtype=STR_DTYPE_TO_TORCH_DTYPE[name],
            kv_quant_mode=get_kv_quant_mode(name),
        )
        return TritonAttentionBackend.customize_spec(spec).page_size_bytes

    # Of "auto" there is no dtype, and one is packed for MLA only.
    names = [name for name in get_args(CacheDType) if name != "auto" and "ds_mla" not in name]

    assert {
        name: kv_cache.of(LLAMA_3_8B, {"kv_cache_dtype": name}).bytes_per_token for name in names
    } == {name: 32 * 8 * theirs(name) for name in names}


def test_a_float32_model_keeps_twice_as_much() -> None:
    assert kv_cache.of(LLAMA_3_8B, {"dtype": "float32"}).bytes_per_token == 2 * 131_072


def test_sparse_attention_packs_its_fp8_cache() -> None:
    # 512 numbers of FP8, 4 float32 of scales and 64 numbers of bf16; 132 bytes to find it by.
    found = kv_cache.of(DEEPSEEK_V32, {"kv_cache_dtype": "fp8"})

    assert found.bytes_per_token == 61 * (512 + 4 * 4 + 64 * 2 + 132)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
        {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
    ],
    ids=["compressed-tensors", "modelopt"],
)
def test_a_checkpoint_says_that_its_cache_is_fp8(quantization: Config) -> None:
    config = LLAMA_3_8B | {"quantization_config": quantization}

    assert kv_cache.of(config, {}).bytes_per_token == 65_536
    assert kv_cache.of(config, {"kv_cache_dtype": "bfloat16"}).bytes_per_token == 131_072


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(BridgeError) as refused:
        kv_cache.of(LLAMA_3_8B, {"kv_cache_dtype": "fp2"})

    assert refused.value.reason == "invalid_option"


@pytest.mark.parametrize(
    ("config", "ranks", "size"),
    [
        case("divided", LLAMA_3_8B, 4, 131_072 // 4),
        # Each of sixteen ranks has one of eight heads.
        case("copied", LLAMA_3_8B, 16, 131_072 // 8),
        case("one head", FALCON_7B, 4, 32 * layer(1, 64)),
        # Every rank has the whole latent vector.
        case("latent", DEEPSEEK_V3, 8, 70_272),
    ],
)
def test_tensor_parallel_ranks_divide_heads(config: Config, ranks: int, size: int) -> None:
    assert kv_cache.of(config, {"tensor_parallel_size": ranks}).bytes_per_token == size


def test_pipeline_ranks_divide_layers() -> None:
    # 61 layers on four ranks: 15, 15, 16, 15.
    found = kv_cache.of(DEEPSEEK_V3, {"pipeline_parallel_size": 4})

    assert found.bytes_per_token == 16 * 576 * 2


@pytest.mark.parametrize(
    ("config", "ranks", "block"),
    [
        # vLLM 0.32 names it in `v1/attention/backends/rocm_attn.py`: "qwen3-next with block_size
        # 544"
        case("Qwen 3 Next", QWEN_3_NEXT, 1, 544),
        case("Qwen 3 Next on four ranks", QWEN_3_NEXT, 4, 272),
        # A page of 16 tokens has no room for 311,296 bytes: 76 tokens have, which makes 80.
        case("Jamba", JAMBA, 1, 80),
        # A state is smaller than a page.
        case("LFM 2", LFM_2_1_2B, 1, 16),
        # Of MLA's kernels blocks are multiples of 128; 943 tokens have the room of a state.
        case("Kimi Linear on two ranks", KIMI_LINEAR, 2, 1024),
    ],
)
def test_blocks_have_room_for_a_state(config: Config, ranks: int, block: int) -> None:
    found = kv_cache.of(config, {"tensor_parallel_size": ranks})

    assert found.block_size == block


def test_a_request_takes_blocks_of_each_group_of_layers() -> None:
    # Twelve layers with attention and three groups of twelve with a state. With the prefix cache
    # a request has two states at a time.
    found = kv_cache.of(QWEN_3_NEXT, {})
    assert found.bytes_per_block == 12 * 544 * layer(2, 256)
    assert found.blocks(5440) == 10 + 3 * 2

    without = kv_cache.of(QWEN_3_NEXT, {"enable_prefix_caching": False})
    assert without.blocks(5440) == 10 + 3


def test_layers_with_a_window_take_blocks_of_the_window_and_what_is_computed() -> None:
    # Twelve layers in each of two groups: 256 blocks for every token, and of 128 - 1 tokens of the
    # window with 2 * 256 that are computed, 40, and one more.
    found = kv_cache.of(GPT_OSS_20B, {"max_num_batched_tokens": 256})

    assert found.blocks(4096) == 256 + math.ceil((127 + 512) / 16) + 1
    assert found.bytes(4096) == (256 + 41 + 1) * 12 * 16 * layer(8, 64)


def test_pages_of_layers_of_other_sizes_are_brought_to_one_size() -> None:
    # A token takes 8192 bytes in a layer without a window and twice that in another, so that blocks
    # of the former hold 32 tokens in the place of 16: 128 of them. Each of the five groups of ten
    # layers with a window takes blocks for 1023 + 2 * 256 tokens, and one more.
    found = kv_cache.of(GEMMA_4_31B, {"max_num_batched_tokens": 256})

    assert found.page_size == 16 * layer(16, 256)
    assert found.blocks(4096) == 4096 // 32 + 5 * (96 + 1)


def test_layers_may_have_entries_of_their_own() -> None:
    config = LLAMA_3_8B | {"per_layer_config": {"03": {"num_key_value_heads": 2}}}

    assert kv_cache.of(config, {}).bytes_per_token == 31 * layer(8, 128) + layer(2, 128)


def test_short_requests_do_not_fill_a_window() -> None:
    found = kv_cache.of(MISTRAL_7B, {})

    assert found.blocks(160) == 10 + 1


def test_without_the_hybrid_manager_every_layer_keeps_every_token() -> None:
    found = kv_cache.of(GPT_OSS_20B, {"disable_hybrid_kv_cache_manager": True})

    assert found.bytes_per_token == 24 * layer(8, 64)
    assert found.blocks(4096) == 256


def test_a_variable_of_vllm_has_chunks_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE", "0")

    assert kv_cache.of(LLAMA_4_SCOUT, {}).bytes_per_token == 48 * layer(8, 128)


def test_a_decoder_with_an_encoder_keeps_its_output_as_well() -> None:
    found = kv_cache.of(WHISPER_LARGE_V3, {})

    # 448 tokens of text, and what is computed at a time: 2048.
    assert found.blocks(448) == 28 + 128
    assert found.bytes_per_block == 16 * 32 * layer(20, 64)


def test_a_model_without_a_cache_takes_nothing() -> None:
    found = kv_cache.of(BERT, {})

    assert (found.bytes(512), found.tokens(GIB, 512)) == (0, 0)
    assert found.concurrency(GIB, 512) == math.inf
    assert found.longest(GIB, 512) == 512


def test_the_longest_request_leaves_one_block_to_vllm() -> None:
    found = kv_cache.of(LLAMA_3_8B, {})

    # A GiB is 512 blocks of 2 MiB.
    assert found.longest(GIB, 131_072) == 511 * 16
    assert found.longest(GIB, 4096) == 4096
    assert found.longest(2**20, 131_072) == 0


@pytest.mark.parametrize(
    ("config", "options", "length"),
    [
        case("its own", LLAMA_3_8B, {}, 131_072),
        case("as asked", LLAMA_3_8B, {"max_model_len": 4096}, 4096),
        case("as much as fits", LLAMA_3_8B, {"max_model_len": -1}, 131_072),
        case(
            "stretched",
            LLAMA_3_8B
            | {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {},
            8192,
        ),
        case(
            "YaRN",
            LLAMA_3_8B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {},
            131_072,
        ),
        case(
            "LongRoPE",
            PHI_3_MINI
            | {
                "max_position_embeddings": 131_072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            {},
            4096,
        ),
        case("nothing said", {"model_type": "llama", "max_position_embeddings": None}, {}, 2048),
    ],
)
def test_the_longest_context(config: Config, options: dict[str, Any], length: int) -> None:
    assert kv_cache.max_length(config, options) == length


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    different = {
        (model_type, name): value
        for model_type, defaults in layers.DEFAULTS.items()
        for name, value in defaults.items()
        if transformers.CONFIG_MAPPING[model_type]().to_dict()[name] != value
    }

    assert not different


def test_what_is_not_known_in_detail_is_said() -> None:
    assert kv_cache.of(DEEPSEEK_V3 | {"model_type": "deepseek_v4"}, {}).is_approximate
    assert not kv_cache.of(DEEPSEEK_V3, {}).is_approximate


def test_layers_with_a_state_of_an_unknown_size_do_not_count() -> None:
    config = ZAMBA_2_7B | {"model_type": "zamba"}

    found = kv_cache.of(config, {})
    assert found.is_approximate
    assert found.bytes_per_token == kv_cache.of(ZAMBA_2_7B, {}).bytes_per_token // 2
    assert found.bytes_per_block == 16 * found.bytes_per_token


def test_a_config_that_says_too_little_makes_no_cache() -> None:
    found = kv_cache.of({"model_type": "llama", "hidden_size": 0}, {})

    assert (found.bytes_per_token, found.is_approximate) == (0, True)


@pytest.mark.parametrize(
    ("nonsense", "said"),
    [
        ({"num_hidden_layers": 10**12}, "has as `num_hidden_layers` cannot be"),
        ({"hidden_size": 10**400}, "`hidden_size` cannot be understood: a number of 401 digits."),
        ({"hidden_size": float("nan")}, "`hidden_size` cannot be understood: NaN."),
        ({"num_kv_shared_layers": math.inf}, "`num_kv_shared_layers` cannot be"),
        ({"kv_lora_rank": "x"}, '`kv_lora_rank` cannot be understood: "x".'),
        ({"block_configs": [7, 8]}, "`block_configs` cannot be understood: [7, 8]."),
        ({"layer_types": 5}, "`layer_types` cannot be understood: 5."),
        ({"layer_types": [["x"] * 32]}, "`layer_types` cannot be"),
        ({"per_layer_config": {"first": {}}}, "`per_layer_config` cannot be"),
        ({"per_layer_config": {"3": {"head_dim": 2**60}}}, "`head_dim` cannot be"),
        ({"model_type": "mamba2"}, "of a model of the type `mamba2` has no `num_heads`."),
        ({"attn_config": 3}, "`attn_config` cannot be"),
        (
            {"rope_scaling": {"type": "linear", "factor": math.inf}},
            "`factor` of `rope_scaling` cannot be",
        ),
    ],
    ids=str,
)
def test_a_config_that_means_nothing_is_refused_by_its_field(nonsense: Config, said: str) -> None:
    with pytest.raises(BridgeError) as refused:
        kv_cache.of(LLAMA_3_8B | nonsense, {})

    assert refused.value.reason == "invalid_checkpoint"
    assert said in refused.value.message
    assert "Error" not in refused.value.message


@pytest.mark.parametrize(
    "nonsense",
    [
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"type": "linear"}},
        {"text_config": []},
        {"architectures": 5},
        {"model_type": []},
        # A tokenizer's way to say that it has no limit.
        {"model_max_length": 10**30},
    ],
    ids=str,
)
def test_what_does_not_matter_may_be_nonsense(nonsense: Config) -> None:
    assert kv_cache.of(LLAMA_3_8B | nonsense, {}).bytes_per_token == 131_072


@pytest.mark.parametrize("length", [0, -1])
def test_a_context_of_no_tokens_is_none(length: int) -> None:
    assert kv_cache.max_length(LLAMA_3_8B | {"max_position_embeddings": length}, {}) == 2048
