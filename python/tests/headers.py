"""What the headers of well-known models' files say, written from what their papers and configs say:
tensors of the right names and shapes, without a weight."""

import math
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import WIDTH, Tensor

Shapes = dict[str, tuple[int, ...]]


def config(hidden: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **others,
    }


# https://arxiv.org/abs/2307.09288, table 1, and the `config.json` of their repositories
LLAMA_2 = {
    "7B": config(4096, 11008, 32, 32),
    "13B": config(5120, 13824, 40, 40),
    "70B": config(8192, 28672, 80, 64, num_key_value_heads=8),
}
LLAMA_3_8B = config(
    4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072
)
MIXTRAL = config(
    4096,
    14336,
    32,
    32,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    model_type="mixtral",
)


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Of the tensors of a Llama or a Mixtral."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        found |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
        }
        experts = config.get("num_local_experts")
        if experts is None:
            found |= {
                f"{layer}.mlp.gate_proj.weight": (inner, hidden),
                f"{layer}.mlp.up_proj.weight": (inner, hidden),
                f"{layer}.mlp.down_proj.weight": (hidden, inner),
            }
            continue
        found[f"{layer}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            found |= {
                f"{name}.w1.weight": (inner, hidden),
                f"{name}.w2.weight": (hidden, inner),
                f"{name}.w3.weight": (inner, hidden),
            }
    return found


def awq(shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of the same model as AutoAWQ writes it, in groups of 128."""
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if "_proj." not in name:
            found[name] = tensor(shape, "F16")
            continue
        rows, columns = shape
        module = name.removesuffix("weight")
        found |= {
            f"{module}qweight": tensor((columns, rows // 8), "I32"),
            f"{module}qzeros": tensor((columns // 128, rows // 8), "I32"),
            f"{module}scales": tensor((columns // 128, rows), "F16"),
        }
    return found


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def plain(config: Mapping[str, Any], dtype: str = "F16") -> Checkpoint:
    tensors = {name: tensor(shape, dtype) for name, shape in shapes(config).items()}
    return Checkpoint("", config, (), tensors)


def in_awq(config: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint("", {**config, "quantization_config": AWQ}, (), awq(shapes(config)))


def tensor(shape: tuple[int, ...], dtype: str) -> Tensor:
    return Tensor(dtype, shape, "", 0, math.prod(shape) * WIDTH[dtype] // 8)
