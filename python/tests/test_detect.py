"""How models are quantized, without their weights."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import gguf_files
import gguf_models
from checkpoints import CHECKPOINTS, DEMO, MODELS
from vllm_bridge.checkpoints import adapter, detect, gguf_config
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry, scheme

# Of the demo model, and of what its linear layers have of them.
PARAMETERS = 4_066_560
LINEAR = 3_538_944

_COMPRESSED = "compressed-tensors 0.19.0"


def said(found: detect.Detected) -> dict[str, Any]:
    """What was detected of a quantization, without what there is nothing of."""
    wire = found.to_wire()
    for name in ("dtype", "architecture", "model_type", "bytes", "bits_per_weight", "parameters"):
        del wire[name]
    return {name: value for name, value in wire.items() if value not in (None, ())}


def gptq(bits: int, group: int, sym: bool = True, act: bool = False, form: str = "gptq") -> Any:
    return {
        "method": "gptq",
        "title": "GPTQ",
        "format": form,
        "bits": bits,
        "group_size": group,
        "strategy": "group" if group > 0 else "channel",
        "symmetric": sym,
        "desc_act": act,
    }


def compressed(form: str, bits: int, strategy: str, **more: Any) -> Any:
    return {
        "method": "compressed-tensors",
        "title": "compressed-tensors",
        "format": form,
        "bits": bits,
        "strategy": strategy,
        "symmetric": True,
        "desc_act": False,
        "ignored": ("lm_head",),
        "producer": _COMPRESSED,
    } | more


AWQ = {
    "method": "awq",
    "title": "AWQ",
    "format": "gemm",
    "bits": 4,
    "group_size": 128,
    "strategy": "group",
    "symmetric": False,
}
# Of GPTQModel's variants of the demo model, beside how it quantized them.
GPTQMODEL = {"ignored": ("lm_head",), "producer": "GPTQModel 7.6.0"}
BITSANDBYTES = {
    "method": "bitsandbytes",
    "title": "bitsandbytes",
    "symmetric": True,
    "ignored": ("lm_head",),
    "producer": "transformers",
}
NF4 = BITSANDBYTES | {"bits": 4, "group_size": 64, "strategy": "group"}
FP8 = {
    "method": "fp8",
    "title": "FP8",
    "format": "e4m3",
    "bits": 8,
    "symmetric": True,
    "activation_bits": 8,
    "activations": "dynamic",
}
AUTO_ROUND = {
    "method": "inc",
    "title": "AutoRound",
    "format": "auto_round:auto_gptq",
    "group_size": 128,
    "strategy": "group",
    "symmetric": True,
    "producer": "AutoRound 0.14.2",
}
HQQ = {
    "method": "hqq",
    "title": "HQQ",
    "group_size": 64,
    "strategy": "group",
    "symmetric": False,
    "producer": "hqq",
}
SQUEEZELLM = {
    "method": "squeezellm",
    "title": "SqueezeLLM",
    "strategy": "channel",
    "producer": "SqueezeLLM",
}
DYNAMIC = {"activation_bits": 8, "activations": "dynamic"}

# The variants of the demo model.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "demo": {},
    "demo-awq": AWQ | {"desc_act": False, **GPTQMODEL},
    "demo-gptq": gptq(4, 128) | GPTQMODEL,
    "gptq-w2": gptq(2, 32, sym=False) | GPTQMODEL,
    "gptq-w3": gptq(3, 128) | GPTQMODEL,
    "gptq-w4-act": gptq(4, 128, act=True) | GPTQMODEL,
    "gptq-w4-asym-act": gptq(4, 64, sym=False, act=True, form="gptq_v2") | GPTQMODEL,
    "gptq-w8": gptq(8, -1) | GPTQMODEL,
    "auto-round": AUTO_ROUND | {"bits": 4},
    "auto-round-w3": AUTO_ROUND | {"bits": 3},
    "w4a16": compressed("pack-quantized", 4, "group", group_size=128),
    "w4a16-asym": compressed("pack-quantized", 4, "group", group_size=128, symmetric=False),
    "w8a16": compressed("pack-quantized", 8, "group", group_size=128),
    "w8a8": compressed("int-quantized", 8, "channel", group_size=-1, **DYNAMIC),
    "fp8-dynamic": compressed("float-quantized", 8, "channel", group_size=-1, **DYNAMIC),
    "fp8-static": compressed(
        "float-quantized", 8, "tensor", activation_bits=8, activations="static"
    ),
    "fp8-tensor": FP8 | {"strategy": "tensor"},
    "fp8-block": FP8 | {"strategy": "block", "group_size": 128},
    "bnb-nf4": NF4 | {"format": "nf4"},
    "bnb-fp4": NF4 | {"format": "fp4"},
    "bnb-nf4-double": NF4 | {"format": "nf4 double"},
    "bnb-int8": BITSANDBYTES
    | {"format": "int8", "bits": 8, "strategy": "channel", "activation_bits": 8},
    "hqq": HQQ | {"format": "axis 1", "bits": 4, "ignored": ("lm_head",)},
    "hqq-qmodel": HQQ | {"format": "axis 0", "bits": 3},
    "squeezellm": SQUEEZELLM | {"bits": 4},
    "squeezellm-sparse": SQUEEZELLM | {"bits": 3},
}


# What is not stored is made, and takes seconds.
MADE = [
    pytest.param(name, marks=pytest.mark.slow)
    if not ((MODELS / name).exists() or (CHECKPOINTS / name).exists())
    else name
    for name in VARIANTS
]


@pytest.mark.parametrize("name", MADE)
def test_variants_of_the_demo_model_are_what_they_are(name: str, tmp_path: Path) -> None:
    stored = next(
        (folder for folder in (MODELS / name, CHECKPOINTS / name) if folder.exists()), None
    )
    folder = stored or checkpoints.make(name, tmp_path / name)
    found = detect.detect(str(folder), {})
    assert said(found) == VARIANTS[name]
    # Of some only what differs from the demo model is kept.
    assert found.parameters == (LINEAR if CHECKPOINTS in folder.parents else PARAMETERS)
    assert (found.dtype, found.architecture) == ("bfloat16", "LlamaForCausalLM")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.pt")]
    stored_bytes = sum(file.stat().st_size for file in files)
    assert found.bytes == pytest.approx(stored_bytes, rel=0.05)
    assert found.bits_per_weight == round(8 * (found.bytes or 0) / found.parameters, 2)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_files_are_what_llama_cpp_calls_them(type: str, tmp_path: Path) -> None:
    found = detect.detect(str(gguf_models.make(type, tmp_path)), {})
    assert (found.method, found.title, found.scheme.format) == ("gguf", "GGUF", type)
    assert found.parameters == PARAMETERS
    assert found.bits == {"F16": 16, "Q8_0": 8}.get(type, pytest.approx(4, abs=0.5))
    assert found.scheme.group_size == (None if type == "F16" else 32)


def test_a_gguf_file_says_who_made_it_and_of_what(tmp_path: Path) -> None:
    path = gguf_files.write_llama(
        tmp_path / "small.gguf",
        general__file_type=gguf_config._GUESSED + 15,
        general__quantized_by="Unsloth",
        general__base_model__0__repo_url="https://huggingface.co/meta-llama/Llama-3.2-1B",
    )
    found = detect.detect(str(path), {})
    assert found.base_model == "meta-llama/Llama-3.2-1B"
    assert (found.scheme.format, found.scheme.producer, found.bits) == ("Q4_K_M", "Unsloth", 8)
    for said in (
        {"general__file_type": 99, "general__base_model__0__repo_url": "https://example.com/a/b"},
        {"general__file_type": "15", "general__quantized_by": ""},
    ):
        found = detect.detect(str(gguf_files.write_llama(path, **said)), {})
        assert (found.base_model, found.scheme.producer) == (None, None)
        assert found.scheme.format == "Q8_0"


def test_a_mixture_of_ggufs_types_has_the_bits_of_all() -> None:
    types = {"Q4_K": 0.75, "Q6_K": 0.25}
    config = {"quant_method": "gguf", "types": types, "file_type": "Q4_K_M", "quantized_by": "me"}
    found = registry.of("gguf").scheme(config)
    assert (found.format, found.bits, found.group_size) == ("Q4_K_M", 4, 256)
    assert found.producer == "me"


def test_the_names_of_gguf_mixtures_are_those_of_gguf_py() -> None:
    from gguf import LlamaFileType

    theirs = {
        one.value: one.name.removeprefix("MOSTLY_").removeprefix("ALL_") for one in LlamaFileType
    }
    assert theirs.pop(gguf_config._GUESSED) == "GUESSED"
    assert theirs == gguf_config.FILE_TYPES


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    found = detect.detect(str(MODELS / "demo-lora"), {})
    assert found.adapter is not None
    assert found.adapter._asdict() == {
        "type": "lora",
        "base_model": "demo",
        "rank": 8,
        "alpha": 16,
        "target_modules": ("k_proj", "o_proj", "q_proj", "v_proj"),
        "dora": False,
        "rslora": False,
        "modules_to_save": (),
    }
    assert found.method is None
    assert found.base_model == "demo"
    assert (found.parameters, found.bytes) == (86016, 172032)

    config = {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 32}, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ".*_proj"})
    )
    other = detect.detect(str(tmp_path), {}).adapter
    assert other is not None
    assert (other.rank, other.dora, other.target_modules) == (32, True, (".*_proj",))
    assert (other.alpha, other.base_model) == (None, None)

    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(BridgeError, match="Download the adapter again") as caught:
        detect.detect(str(tmp_path), {})
    assert caught.value.reason == "invalid_checkpoint"


# Configs as they stand in the wild: what is written where in `config.json`, and what it means.
WILD: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    # TheBloke/Mistral-7B-Instruct-v0.2-AWQ
    "AutoAWQ": (
        {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        AWQ | {"producer": "AutoAWQ"},
    ),
    # TheBloke/Llama-2-7B-GPTQ
    "AutoGPTQ": (
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.1,
            "desc_act": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        },
        gptq(4, 128) | {"producer": "AutoGPTQ"},
    ),
    # Qwen/Qwen1.5-7B-Chat-GPTQ-Int8
    "transformers' GPTQ": (
        {
            "batch_size": 1,
            "bits": 8,
            "cache_block_outputs": True,
            "damp_percent": 0.01,
            "dataset": None,
            "desc_act": False,
            "exllama_config": {"version": 1},
            "group_size": 128,
            "quant_method": "gptq",
            "sym": True,
            "true_sequential": True,
            "use_cuda_fp16": False,
        },
        gptq(8, 128) | {"producer": "transformers"},
    ),
    # ModelCloud's, with rules by layer
    "GPTQModel": (
        {
            "bits": 4,
            "group_size": 32,
            "desc_act": True,
            "sym": False,
            "lm_head": False,
            "checkpoint_format": "gptq_v2",
            "quant_method": "gptq",
            "dynamic": {"-:.*mlp\\.gate$": {}, "+:.*down_proj": {"bits": 8}},
            "meta": {"quantizer": ["gptqmodel:1.7.3"]},
        },
        gptq(4, 32, sym=False, act=True, form="gptq_v2")
        | {"ignored": ("lm_head", ".*mlp\\.gate$"), "producer": "GPTQModel 1.7.3"},
    ),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-KV-like, of llm-compressor
    "llm-compressor, FP8 with its KV cache": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "strategy": "tensor",
                        "symmetric": True,
                        "type": "float",
                    },
                }
            },
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            "quant_method": "compressed-tensors",
            "version": "0.9.3",
        },
        compressed(
            "float-quantized",
            8,
            "tensor",
            activation_bits=8,
            activations="static",
            kv_cache="fp8",
            producer="compressed-tensors 0.9.3",
        ),
    ),
    # RedHatAI/Llama-3.3-70B-Instruct-NVFP4
    "llm-compressor, NVFP4": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "dynamic": "local",
                        "group_size": 16,
                        "num_bits": 4,
                        "strategy": "tensor_group",
                        "type": "float",
                    },
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "dynamic": False,
                        "group_size": 16,
                        "num_bits": 4,
                        "strategy": "tensor_group",
                        "symmetric": True,
                        "type": "float",
                    },
                }
            },
            "format": "nvfp4-pack-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "version": "0.19.0",
        },
        compressed(
            "nvfp4-pack-quantized",
            4,
            "group",
            group_size=16,
            activation_bits=4,
            activations="dynamic",
        ),
    ),
    # nvidia/Llama-3.1-8B-Instruct-NVFP4, in config.json
    "ModelOpt, NVFP4": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 4, "type": "float"},
                    "weights": {"dynamic": False, "num_bits": 4, "type": "float"},
                    "targets": ["Linear"],
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.37.0"},
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        },
        {
            "method": "modelopt_fp4",
            "title": "NVFP4",
            "format": "NVFP4",
            "bits": 4,
            "group_size": 16,
            "strategy": "group",
            "symmetric": True,
            "activation_bits": 4,
            "kv_cache": "fp8",
            "ignored": ("lm_head",),
            "producer": "ModelOpt 0.37.0",
        },
    ),
    # unsloth/Meta-Llama-3.1-8B-bnb-4bit
    "bitsandbytes": (
        {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
        {
            "method": "bitsandbytes",
            "title": "bitsandbytes",
            "format": "nf4 double",
            "bits": 4,
            "group_size": 64,
            "strategy": "group",
            "symmetric": True,
            "producer": "transformers",
        },
    ),
    "bitsandbytes of old": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        {
            "method": "bitsandbytes",
            "title": "bitsandbytes",
            "format": "int8",
            "bits": 8,
            "strategy": "channel",
            "symmetric": True,
            "activation_bits": 8,
            "producer": "transformers",
        },
    ),
    # pytorch/Qwen3-8B-INT4
    "torchao": (
        {
            "include_input_output_embeddings": False,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "torchao",
            "quant_type": {
                "default": {
                    "_data": {"group_size": 128, "layout": {}, "use_hqq": True},
                    "_type": "Int4WeightOnlyConfig",
                    "_version": 1,
                }
            },
        },
        {
            "method": "torchao",
            "title": "torchao",
            "format": "Int4WeightOnlyConfig",
            "bits": 4,
            "group_size": 128,
            "strategy": "group",
            "ignored": ("lm_head",),
            "producer": "torchao",
        },
    ),
    "torchao, with activations": (
        {
            "quant_method": "torchao",
            "quant_type": {
                "default": {"_data": {}, "_type": "Int8DynamicActivationInt4WeightConfig"}
            },
        },
        {
            "method": "torchao",
            "title": "torchao",
            "format": "Int8DynamicActivationInt4WeightConfig",
            "bits": 4,
            "strategy": "channel",
            "activation_bits": 8,
            "activations": "dynamic",
            "producer": "torchao",
        },
    ),
    # openai/gpt-oss-20b
    "MXFP4": (
        {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        {
            "method": "mxfp4",
            "title": "MXFP4",
            "format": "mxfp4",
            "bits": 4,
            "group_size": 32,
            "strategy": "group",
            "symmetric": True,
            "ignored": (
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ),
        },
    ),
    # deepseek-ai/DeepSeek-V3
    "FP8 in blocks": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        FP8 | {"strategy": "block", "group_size": 128},
    ),
    # meta-llama/Llama-3.1-405B-Instruct-FP8
    "FBGEMM": (
        {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ["model.layers.0.mlp.down_proj"],
            "quant_method": "fbgemm_fp8",
        },
        {
            "method": "fbgemm_fp8",
            "title": "FBGEMM FP8",
            "format": "e4m3",
            "bits": 8,
            "group_size": -1,
            "strategy": "channel",
            "symmetric": True,
            "activation_bits": 8,
            "activations": "dynamic",
            "ignored": ("model.layers.0.mlp.down_proj",),
        },
    ),
    # amd/Llama-3.1-8B-Instruct-FP8-KV
    "Quark": (
        {
            "exclude": ["lm_head"],
            "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "pack_method": "reorder"},
            "global_quant_config": {
                "bias": None,
                "input_tensors": {"dtype": "fp8_e4m3", "is_dynamic": False, "symmetric": None},
                "output_tensors": None,
                "weight": {"dtype": "fp8_e4m3", "group_size": None, "qscheme": "per_tensor"},
            },
            "layer_quant_config": {
                "*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}},
                "*v_proj": {"output_tensors": {"dtype": "fp8_e4m3"}},
            },
            "quant_method": "quark",
        },
        {
            "method": "quark",
            "title": "Quark",
            "format": "fp8_e4m3",
            "bits": 8,
            "strategy": "tensor",
            "activation_bits": 8,
            "activations": "static",
            "kv_cache": "fp8",
            "ignored": ("lm_head",),
            "producer": "Quark",
        },
    ),
    # amd/Llama-3.3-70B-Instruct-MXFP4-Preview
    "Quark, MXFP4": (
        {
            "exclude": ["lm_head"],
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {
                "input_tensors": {"dtype": "fp4", "group_size": 32, "is_dynamic": True},
                "weight": {"dtype": "fp4", "group_size": 32, "qscheme": "per_group"},
            },
            "layer_quant_config": {},
            "quant_method": "quark",
        },
        {
            "method": "quark",
            "title": "Quark",
            "format": "fp4",
            "bits": 4,
            "group_size": 32,
            "strategy": "group",
            "activation_bits": 4,
            "activations": "dynamic",
            "ignored": ("lm_head",),
            "producer": "Quark",
        },
    ),
    # Intel/Qwen2.5-7B-Instruct-int4 of 2024
    "auto-round": (
        {
            "autoround_version": "0.4.2",
            "bits": 4,
            "data_type": "int",
            "group_size": 128,
            "quant_method": "auto-round",
            "sym": False,
            "extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}},
        },
        {
            "method": "inc",
            "title": "AutoRound",
            "bits": 4,
            "group_size": 128,
            "strategy": "group",
            "symmetric": False,
            "ignored": ("model.layers.0.mlp.gate",),
            "producer": "AutoRound 0.4.2",
        },
    ),
    # turboderp/Llama-3.1-8B-Instruct-exl2
    "EXL2": (
        {
            "quant_method": "exl2",
            "version": "0.1.8",
            "bits": 4.25,
            "head_bits": 6,
            "calibration": {"rows": 115, "length": 2048, "dataset": "(default)"},
        },
        {
            "method": "exl2",
            "title": "EXL2",
            "made_for": "ExLlamaV2",
            "format": "exl2",
            "bits": 4.25,
            "producer": "ExLlamaV2 0.1.8",
        },
    ),
    # Of which nothing is known here.
    "another": (
        {"quant_method": "aqlm", "nbits_per_codebook": 16, "linear_weights_not_to_quantize": []},
        {"method": "aqlm", "title": "aqlm"},
    ),
}


@pytest.mark.parametrize("name", WILD)
def test_configs_as_they_stand_in_the_wild(name: str) -> None:
    config, expected = WILD[name]
    found = detect.of(Checkpoint(config={"quantization_config": config}))
    assert said(found) == expected


@pytest.mark.parametrize("name", WILD)
def test_a_config_with_damage_is_detected_as_far_as_it_is_whole(name: str) -> None:
    config, expected = WILD[name]
    for damage in (None, "?", -1, 0.5, True, [], {}, [None], {"a": None}):
        for key in config.keys() - {"quant_method", "quant_algo", "load_in_8bit"}:
            damaged = {"quantization_config": {**config, key: damage}}
            assert detect.of(Checkpoint(config=damaged)).method == expected["method"]


def test_models_of_mlx_are_named_and_refused() -> None:
    own = {"group_size": 64, "bits": 4, "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}}
    for config in ({"quantization": own}, {"quantization": own, "quantization_config": own}):
        checkpoint = Checkpoint(config=config)
        assert said(detect.of(checkpoint)) == {
            "method": "mlx",
            "title": "MLX",
            "made_for": "MLX",
            "format": "affine",
            "bits": 4,
            "group_size": 64,
            "strategy": "group",
            "symmetric": False,
            "producer": "mlx-lm",
        }
        with pytest.raises(BridgeError, match="is in the format of MLX, which vLLM") as caught:
            registry.of(checkpoint.quant_method).check(checkpoint)
        assert caught.value.reason == "unsupported_quantization"
    with pytest.raises(BridgeError, match="is in EXL2, the format of ExLlamaV2, which vLLM does"):
        registry.of("exl2").check(Checkpoint())
    # Not what Mistral has by that name.
    assert Checkpoint(config={"quantization": {"qformat_weight": "fp8_e4m3"}}).quant_method is None


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
        },
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    assert said(detect.detect(str(folder), {})) == {
        "method": "modelopt",
        "title": "ModelOpt",
        "format": "FP8",
        "bits": 8,
        "strategy": "tensor",
        "symmetric": True,
        "activation_bits": 8,
        "kv_cache": "fp8",
        "ignored": ("lm_head",),
        "producer": "ModelOpt 0.23.0",
    }


@pytest.mark.parametrize(
    ("source", "file", "settings", "producer"),
    [
        (
            "demo-gptq",
            "quantize_config.json",
            {
                "bits": 4,
                "group_size": 128,
                "damp_percent": 0.01,
                "desc_act": False,
                "sym": True,
                "true_sequential": True,
                "model_name_or_path": None,
                "model_file_base_name": "model",
            },
            "AutoGPTQ",
        ),
        (
            "demo-awq",
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            "AutoAWQ",
        ),
    ],
)
def test_tools_of_old_said_it_in_files_of_their_own(
    source: str, file: str, settings: Mapping[str, Any], producer: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / source, folder)
    config = checkpoints.read_config(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(settings))
    found = detect.detect(str(folder), {})
    assert found.method == source.removeprefix("demo-")
    assert (found.bits, found.scheme.group_size, found.scheme.producer) == (4, 128, producer)
    assert found.parameters == PARAMETERS

    # One that another tool or another model has left says nothing.
    for content in ("{", "[]", "{}", json.dumps({"bits": 4})):
        (folder / file).write_text(content)
        assert detect.detect(str(folder), {}).method is None
    plain = tmp_path / "plain"
    shutil.copytree(DEMO, plain)
    (plain / file).write_text(json.dumps(settings))
    assert detect.detect(str(plain), {}).method is None


def test_layers_of_several_widths_have_the_average(tmp_path: Path) -> None:
    checkpoint = check_model(str(CHECKPOINTS / "gptq-w3"), {})
    wider = check_model(str(CHECKPOINTS / "gptq-w8"), {})
    tensors = {
        name: wider.tensors[name] if "down_proj" in name else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    found = detect.of(dataclasses.replace(checkpoint, tensors=tensors))
    assert found.parameters == LINEAR
    down = sum(
        tensor.size for name, tensor in wider.tensors.items() if name.endswith("down_proj.qweight")
    )
    assert found.bits == round((8 * down + 3 * (LINEAR - down)) / LINEAR, 2)


def test_who_made_it_and_of_what() -> None:
    config = {"quantization_config": WILD["bitsandbytes"][0], "unsloth_version": "2024.9"}
    assert detect.of(Checkpoint(config=config)).scheme.producer == "Unsloth 2024.9"
    assert detect.of(Checkpoint(config={"unsloth_version": "2024.9"})).scheme.producer is None
    for source, base in (
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("/home/somebody/model", None),
        ("./model", None),
        ("model", None),
    ):
        assert detect.of(Checkpoint(config={"_name_or_path": source})).base_model == base


@pytest.mark.parametrize("number", [10**30, float("nan"), float("inf")])
def test_numbers_that_mean_nothing_are_as_if_they_were_not_there(number: float) -> None:
    found = adapter.of({"peft_type": "LORA", "r": number, "lora_alpha": number})
    assert (found.rank, found.alpha) == (None, None)
    assert scheme.usual({"bits": number, "group_size": number}).bits is None
