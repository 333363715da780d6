"""Configs of well-known models as they are published, of what counts for a KV cache."""

from typing import Any

Config = dict[str, Any]


def transformer(count: int, heads: int, kv_heads: int, head: int, **others: Any) -> Config:
    return {
        "model_type": "llama",
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head,
        "max_position_embeddings": 131072,
    } | others


LLAMA_2_7B = transformer(32, 32, 32, 128)
LLAMA_3_8B = transformer(32, 32, 8, 128)
LLAMA_3_405B = transformer(126, 128, 8, 128)
MISTRAL_7B = transformer(32, 32, 8, 128, model_type="mistral", sliding_window=4096)
MIXTRAL_8X7B = transformer(32, 32, 8, 128, model_type="mixtral", sliding_window=None)
QWEN_25_72B = transformer(
    80, 64, 8, 128, model_type="qwen2", sliding_window=131072, use_sliding_window=False
)
QWEN_3_1_7B = transformer(28, 16, 8, 128, model_type="qwen3", head_dim=128)
QWEN_3_CODER_30B = transformer(48, 32, 4, 64, model_type="qwen3_moe", head_dim=128)
OPT_13B = {
    "model_type": "opt",
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "hidden_size": 5120,
    "max_position_embeddings": 2048,
}
FALCON_7B = {
    "model_type": "falcon",
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "hidden_size": 4544,
    "multi_query": True,
    "new_decoder_architecture": False,
}
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 5120,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {"model_type": "deepseek_v3", "num_hidden_layers": 61}
DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
MINICPM_3_4B = {
    "model_type": "minicpm3",
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "hidden_size": 2560,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
}
JAMBA = {
    "model_type": "jamba",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "max_position_embeddings": 262144,
}
QWEN_3_NEXT = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_size": 2048,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "hidden_size": 2304,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "hidden_size": 3584,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
# As it is published: what it leaves out is in transformers' classes.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
}
GEMMA_3N_E4B = {
    "model_type": "gemma3n",
    "text_config": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "head_dim": 256,
        "hidden_size": 2048,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
}
# Its layers without a window have heads of another size, fewer of them, and no keys but values.
GEMMA_4_31B: Config = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size": 5376,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
    },
}
GPT_OSS_20B = transformer(
    24,
    64,
    8,
    45,
    model_type="gpt_oss",
    head_dim=64,
    sliding_window=128,
    layer_types=["sliding_attention", "full_attention"] * 12,
)
COMMAND_R7B = transformer(
    32, 32, 8, 128, model_type="cohere2", sliding_window=4096, sliding_window_pattern=4
)
PHI_3_MINI = transformer(
    32, 32, 32, 96, model_type="phi3", sliding_window=2047, max_position_embeddings=4096
)
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "text_config": transformer(
        48,
        40,
        8,
        128,
        model_type="llama4_text",
        head_dim=128,
        attention_chunk_size=8192,
        no_rope_layers=[],
        max_position_embeddings=10485760,
    ),
}
NEMOTRON_H_8B = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-",
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "conv_kernel": 4,
    "mamba_head_dim": 64,
    "mamba_num_heads": 128,
    "n_groups": 8,
    "ssm_state_size": 128,
    "max_position_embeddings": 8192,
}
GRANITE_4_TINY = {
    "model_type": "granitemoehybrid",
    "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    "num_hidden_layers": 40,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "hidden_size": 1536,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
}
FALCON_H1_7B = {
    "model_type": "falcon_h1",
    "num_hidden_layers": 44,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_size": 3072,
    "mamba_d_conv": 4,
    "mamba_d_head": 128,
    "mamba_d_ssm": 3072,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
}
BAMBA_9B = {
    "model_type": "bamba",
    "attn_layer_indices": [9, 18, 27],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
}
ZAMBA_2_7B = {
    "model_type": "zamba2",
    "layers_block_type": ["mamba"] * 68 + ["hybrid"] * 13,
    "num_hidden_layers": 81,
    "num_attention_heads": 32,
    "hidden_size": 3584,
    "mamba_d_conv": 4,
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_headdim": 64,
    "mamba_ngroups": 2,
    "n_mamba_heads": 112,
}
LFM_2_1_2B = {
    "model_type": "lfm2",
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 2048,
    "conv_L_cache": 3,
    "conv_dim": 2048,
}
MINIMAX_TEXT = {
    "model_type": "minimax_text_01",
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 6144,
}
MAMBA_2_8B = {
    "model_type": "mamba",
    "num_hidden_layers": 64,
    "hidden_size": 2560,
    "intermediate_size": 5120,
    "state_size": 16,
    "conv_kernel": 4,
}
WHISPER_LARGE_V3 = {
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "d_model": 1280,
    "decoder_attention_heads": 20,
    "decoder_layers": 32,
    "encoder_layers": 32,
    "num_hidden_layers": 32,
    "max_source_positions": 1500,
    "max_target_positions": 448,
}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "max_position_embeddings": 512,
}
DBRX = {
    "model_type": "dbrx",
    "n_layers": 40,
    "n_heads": 48,
    "d_model": 6144,
    "attn_config": {"kv_n_heads": 8},
}
CHATGLM_3 = {
    "model_type": "chatglm",
    "num_layers": 28,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 8192,
}
NEMOTRON_NAS = {
    "model_type": "nemotron-nas",
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "hidden_size": 8192,
    "block_configs": [
        {"attention": {"no_op": False, "n_heads_in_group": 8}},
        {"attention": {"no_op": True}},
        {"attention": {"no_op": False, "n_heads_in_group": 16}},
        {"attention": {"no_op": True}},
    ],
}
LLAVA_1_5_7B = {"model_type": "llava", "text_config": {"model_type": "llama"}}
QWEN_25_VL_7B = transformer(
    28,
    28,
    4,
    128,
    model_type="qwen2_5_vl",
    use_sliding_window=False,
    sliding_window=32768,
    vision_config={"depth": 32, "hidden_size": 1280, "num_heads": 16},
)
