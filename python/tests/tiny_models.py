"""Small models of random numbers from a seed, with the tokenizer of the demo model: of families
whose KV cache has a form of its own.

    python tiny_models.py NAME FOLDER
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = Path(__file__).resolve().parents[2] / "priv" / "models" / "demo"

_SIZES: dict[str, Any] = {
    "vocab_size": 1088,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64},
    "gemma2": {"sliding_window": 64, "tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 64,
        "num_hidden_layers": 8,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {
        "sliding_window": 64,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 1088,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "attention_chunk_size": 128,
        "no_rope_layer_interval": 2,
        "intermediate_size_mlp": 256,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "cohere2": {"sliding_window": 64, "tie_word_embeddings": True},
    "deepseek_v2": {
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_dim": 128,
        "block_ff_dim": 256,
        "block_auto_adjust_ff_dim": False,
        "conv_dim": 128,
        "conv_dim_out": 128,
        "tie_word_embeddings": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M-*M-*",
        "num_hidden_layers": 6,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 32,
        "mamba_d_state": 64,
        "adapter_rank": 8,
    },
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
}


def make(name: str, folder: Path) -> Path:
    torch.manual_seed(3)
    sizes = _SIZES | CONFIGS[name]
    if name in ("falcon", "zamba2"):
        del sizes["head_dim"]  # which they work out themselves
    config = AutoConfig.for_model(name, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2])))
