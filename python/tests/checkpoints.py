"""Quantized variants of the demo model, and their weights unpacked by other code than vLLM's.

What is unpacked are the numbers that a vLLM of bf16 computes with: scales that it rounds to its
dtype are rounded here too.

Those that take the quantizing environment lie in ``test/checkpoints``, made by
``scripts/quantized_models``; those that bitsandbytes makes, or that are a division by a scale,
are made here.

    python checkpoints.py NAME FOLDER

writes one of them.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from emulation import Integers

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "priv" / "models"
DEMO = MODELS / "demo"
CHECKPOINTS = ROOT / "test" / "checkpoints"

WEIGHTS = "model.safetensors"
QMODEL = "qmodel.pt"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
BLOCK = 128

Tensors = dict[str, torch.Tensor]
"""The weights of a model by their names."""


def make(name: str, folder: Path) -> Path:
    """Writes the variant of that name."""
    if (CHECKPOINTS / name / QMODEL).exists():
        return _make_qmodel(folder, CHECKPOINTS / name)
    if (CHECKPOINTS / name).exists():
        tensors = _whole(load_file(CHECKPOINTS / name / WEIGHTS))
        return write(folder, tensors, read_config(CHECKPOINTS / name))
    if name not in MAKERS:
        return Path(shutil.copytree(MODELS / name, folder))
    return MAKERS[name](folder)


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    """Writes a model: these weights and config, and what the demo model has beside them."""
    folder.mkdir(parents=True)
    for name in (*TOKENIZER, "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def write_plain(folder: Path, tensors: Tensors) -> Path:
    """Writes a model that is not quantized, in bf16."""
    return write(folder, {k: v.bfloat16() for k, v in tensors.items()}, read_config(DEMO))


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def is_linear(name: str) -> bool:
    """Whether a weight of the demo model is one that is quantized."""
    return name.endswith("_proj.weight")


def _whole(differing: Tensors) -> Tensors:
    """The tensors of a checkpoint of which only those that are not the demo model's were kept."""
    demo = load_file(DEMO / WEIGHTS)
    return {name: tensor for name, tensor in demo.items() if not is_linear(name)} | differing


def _make_qmodel(folder: Path, kept: Path) -> Path:
    """A model in the format of the library hqq: a dict for each module."""
    modules = torch.load(kept / QMODEL, weights_only=True)
    for name, tensor in _whole({}).items():
        modules[name.removesuffix(".weight")] = {"weight": tensor}
    write(folder, {}, read_config(kept))
    (folder / WEIGHTS).unlink()
    torch.save(modules, folder / QMODEL)
    return folder


# What is made here.


def _make_fp8(folder: Path, block: int | None = None) -> Path:
    """FP8 as vLLM has it of its own: a scale for each matrix, or for each block of it."""
    tensors: Tensors = {}
    for name, tensor in load_file(DEMO / WEIGHTS).items():
        if not is_linear(name):
            tensors[name] = tensor
        elif block is None:
            scale = tensor.float().abs().max() / FP8_MAX
            tensors[name] = (tensor.float() / scale).to(FP8)
            tensors[name + "_scale"] = scale
        else:
            blocks = _blocks(tensor.float(), block)
            scales = blocks.abs().amax((1, 3)) / FP8_MAX
            quantized = (blocks / scales[:, None, :, None]).to(FP8)
            tensors[name] = quantized.reshape(tensor.shape)
            tensors[name + "_scale_inv"] = scales
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block is not None:
        config |= {"weight_block_size": [block, block]}
    return write(folder, tensors, read_config(DEMO) | {"quantization_config": config})


def _make_w8a16(folder: Path) -> Path:
    """Integers of 8 bits in groups, packed by compressed-tensors' own compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = read_config(CHECKPOINTS / "w4a16")
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"]["num_bits"] = 8
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors: Tensors = {}
    for name, tensor in load_file(DEMO / WEIGHTS).items():
        if not is_linear(name):
            tensors[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, group["weights"]["group_size"]))
        scale = groups.abs().amax(-1) / 127.5
        parts = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    return write(folder, tensors, config)


def _blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = matrix.shape
    return matrix.reshape(rows // size, size, columns // size, size)


def _make_bitsandbytes(folder: Path, kind: str, double: bool = False) -> Path:
    """What transformers saves of a model with layers of bitsandbytes."""
    import bitsandbytes as bnb

    tensors: Tensors = {}
    for name, tensor in load_file(DEMO / WEIGHTS).items():
        if not is_linear(name):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        layer: Any
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(
                tensor, requires_grad=False, quant_type=kind, compress_statistics=double
            )
        # Moving a layer to its device is what quantizes it.
        saved = layer.to("cpu").state_dict()
        prefix = name.removesuffix("weight")
        tensors |= {prefix + part: value for part, value in saved.items()}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": kind == "int8",
        "load_in_4bit": kind != "int8",
        "bnb_4bit_quant_type": kind if kind != "int8" else "fp4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    return write(folder, tensors, read_config(DEMO) | {"quantization_config": config})


# The wide model: so large that what a process holds beside its weights does not count.
WIDE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def _make_wide(folder: Path) -> Path:
    """A Llama of random numbers."""
    return write(folder, _wide(lambda *shape: {"weight": torch.randn(shape).bfloat16() / 50}), WIDE)


def _make_wide_awq(folder: Path) -> Path:
    """The same in AWQ's packing, of random numbers too."""

    def layer(rows: int, columns: int) -> Tensors:
        words = torch.iinfo(torch.int32)
        groups = columns // 128
        return {
            "qweight": torch.randint(words.min, words.max, (columns, rows // 8), dtype=torch.int32),
            "qzeros": torch.randint(words.min, words.max, (groups, rows // 8), dtype=torch.int32),
            "scales": torch.rand(groups, rows).half() / 1000,
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    return write(folder, _wide(layer), WIDE | {"quantization_config": config | {"version": "gemm"}})


def _wide(layer: Callable[[int, int], Tensors]) -> Tensors:
    torch.manual_seed(7)
    hidden, inner = WIDE["hidden_size"], WIDE["intermediate_size"]
    half = hidden // 2  # of keys and values: half as many heads
    tensors = {
        "model.embed_tokens.weight": torch.randn(WIDE["vocab_size"], hidden).bfloat16(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for number in range(WIDE["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden).bfloat16()
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", half, hidden),
            ("self_attn.v_proj", half, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            for part, tensor in layer(rows, columns).items():
                tensors[f"{prefix}{name}.{part}"] = tensor
    return tensors


def _make_squeezellm(folder: Path, is_sparse: bool) -> Path:
    import squeezellm_models  # needs this module

    return (
        squeezellm_models.make_sparse(folder) if is_sparse else squeezellm_models.make_dense(folder)
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    "fp8-tensor": _make_fp8,
    "fp8-block": lambda folder: _make_fp8(folder, BLOCK),
    "w8a16": _make_w8a16,
    "bnb-nf4": lambda folder: _make_bitsandbytes(folder, "nf4"),
    "bnb-fp4": lambda folder: _make_bitsandbytes(folder, "fp4"),
    "bnb-nf4-double": lambda folder: _make_bitsandbytes(folder, "nf4", double=True),
    "bnb-int8": lambda folder: _make_bitsandbytes(folder, "int8"),
    "squeezellm": lambda folder: _make_squeezellm(folder, is_sparse=False),
    "squeezellm-sparse": lambda folder: _make_squeezellm(folder, is_sparse=True),
    "wide": _make_wide,
    "wide-awq": _make_wide_awq,
}


# The same weights, unpacked.


def unpack(folder: Path) -> Tensors:
    """The weights of a quantized model as plain numbers."""
    if (folder / QMODEL).exists():
        return _unpack_qmodel(torch.load(folder / QMODEL, weights_only=True))
    config = read_config(folder)["quantization_config"]
    unpacked = UNPACKERS[config["quant_method"]](load_file(folder / WEIGHTS), config)
    shapes = {name: tensor.shape for name, tensor in load_file(DEMO / WEIGHTS).items()}
    assert {name: tensor.shape for name, tensor in unpacked.items()} == shapes
    return unpacked


def layers(tensors: Tensors) -> tuple[dict[str, Tensors], Tensors]:
    """The tensors of each quantized layer by their own names, and the others."""
    quantized: dict[str, Tensors] = {}
    others: Tensors = {}
    for name, tensor in tensors.items():
        head, found, part = name.partition("_proj.")
        if found:
            quantized.setdefault(head + "_proj", {})[part] = tensor
        else:
            others[name] = tensor
    return quantized, others


def _unpack_each(tensors: Tensors, unpack_layer: Callable[[Tensors], torch.Tensor]) -> Tensors:
    quantized, others = layers(tensors)
    return others | {f"{name}.weight": unpack_layer(parts) for name, parts in quantized.items()}


def _unpack_compressed_tensors(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """By compressed-tensors' own decompression."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    return _unpack_each(
        tensors,
        lambda parts: compressor.decompress(
            {
                name: part.float() if name == "weight_scale" else part
                for name, part in parts.items()
            },
            scheme,
        )["weight"],
    )


def _unpack_gptq(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """GPTQ's packing, which auto-round has too: bits of the weights of an output one after another,
    the first in the lowest bits of the first number. Unless the format is ``gptq_v2``, zero points
    are stored less one; that was subtracted from whole numbers where none is divided."""
    bits = config["bits"]

    def unpack_layer(parts: Tensors) -> torch.Tensor:
        weights = _integers(parts["qweight"].T, bits).T
        qzeros = parts["qzeros"]
        is_less = config.get("checkpoint_format") != "gptq_v2"
        if is_less and bits != 3:
            ones = int("1".zfill(bits) * (32 // bits), 2)
            qzeros = ((qzeros.long() + ones) % 2**32).to(torch.uint32).view(torch.int32)
        zeros = _integers(qzeros, bits)
        if is_less and bits == 3:
            zeros = (zeros + 1) % 8
        group = parts.get("g_idx")
        if group is None:
            group = torch.arange(len(weights)) // config["group_size"]
        return ((weights - zeros[group]) * parts["scales"].bfloat16().float()[group]).T

    return _unpack_each(tensors, unpack_layer)


def _integers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of so many bits in the rows of integers of 32."""
    octets = words.contiguous().numpy().view(np.uint8)
    fields = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return torch.from_numpy(fields @ (1 << np.arange(bits)))


def _unpack_awq(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """AWQ's packing: each number of 32 bits holds the weights of eight outputs for one input."""
    # The output that each four bits belong to, lowest first.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).argsort()

    def unpack_layer(parts: Tensors) -> torch.Tensor:
        weights = _nibbles(parts["qweight"])[..., order].flatten(1)
        zeros = _nibbles(parts["qzeros"])[..., order].flatten(1)
        group = torch.arange(len(weights)) // config["group_size"]
        return ((weights - zeros[group]) * parts["scales"].bfloat16().float()[group]).T

    return _unpack_each(tensors, unpack_layer)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight numbers of four bits in each of 32, lowest first, in a dimension of their own."""
    return packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15


def _unpack_fp8(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    def unpack_layer(parts: Tensors) -> torch.Tensor:
        weight = parts["weight"].float()
        if "weight_scale" in parts:
            return weight * parts["weight_scale"]
        blocks = _blocks(weight, BLOCK) * parts["weight_scale_inv"][:, None, :, None]
        return blocks.reshape(weight.shape)

    return _unpack_each(tensors, unpack_layer)


def _unpack_bitsandbytes(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """By bitsandbytes' own dequantization."""
    from bitsandbytes import functional

    def unpack_layer(parts: Tensors) -> torch.Tensor:
        weight = parts.pop("weight")
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        if state.nested:
            state.offset = state.offset.bfloat16()
        return functional.dequantize_4bit(weight, state)

    return _unpack_each(tensors, unpack_layer)


def _unpack_hqq(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """HQQ with 4 bits in groups along rows: the first half of the groups is in the upper bits."""

    def unpack_layer(parts: Tensors) -> torch.Tensor:
        packed = parts["W_q"]
        integers = torch.cat([packed >> 4, packed & 15]).float()
        groups = (integers - parts["zero"].float()) * parts["scale"].float()
        return groups.reshape(tuple(parts["shape"]))

    return _unpack_each(tensors, unpack_layer)


def _unpack_qmodel(modules: dict[str, Any]) -> Tensors:
    """HQQ with 3 bits in groups across rows, and scales and zero points of 8 bits: ten rows of
    integers are in one of 32 bits, the first in the highest."""

    def numbers(packed: torch.Tensor, meta: Mapping[str, Any]) -> torch.Tensor:
        groups = meta["group_size"]
        values = packed.float() if groups is None else packed.float().reshape(groups, -1)
        scale, zero = meta["scale"].float(), meta["zero"].float()
        return ((values - zero) * scale).reshape(meta["shape"]).half().float()

    def unpack_layer(parts: Mapping[str, Any]) -> torch.Tensor:
        words = parts["W_q"].view(torch.int32)
        rows = torch.cat([words >> shift & 7 for shift in range(27, -1, -3)])
        scale, zero = (numbers(parts[f"{n}_q"], parts[f"meta_{n}"]) for n in ("scale", "zero"))
        return ((rows[: parts["group_size"]] - zero) * scale).reshape(parts["shape"])

    return {
        f"{name}.weight": unpack_layer(parts) if "W_q" in parts else parts["weight"]
        for name, parts in modules.items()
    }


def hqq_weights(_model: Path) -> Tensors:
    """The demo model's weights as the library hqq has quantized them, by its defaults."""
    return _unpack_hqq(_whole(load_file(CHECKPOINTS / "hqq" / WEIGHTS)), {})


def nf4_weights(model: Path) -> Tensors:
    """The weights of a plain model as bitsandbytes has them once vLLM's loader has had them
    quantized, and their scales too."""
    from bitsandbytes import functional

    tensors = load_file(model / WEIGHTS)
    for name, tensor in tensors.items():
        if is_linear(name):
            packed, state = functional.quantize_4bit(
                tensor, compress_statistics=True, quant_type="nf4"
            )
            tensors[name] = functional.dequantize_4bit(packed, state)
    return tensors


def torchao_weights(model: Path, config: str) -> Tensors:
    """The weights of a plain model as torchao has them once it has quantized its linear layers,
    those of experts left out."""
    tensors = load_file(model / WEIGHTS)
    quantized = _torchao_layers(model, config)
    return tensors | {f"{name}.weight": layer.dequantize() for name, layer in quantized.items()}


def torchao_integers(model: Path, config: str) -> dict[str, Integers]:
    """The linear layers of a plain model in eight bits, as torchao quantizes them."""
    quantized = _torchao_layers(model, config)
    return {name: Integers(layer.qdata, layer.scale.flatten()) for name, layer in quantized.items()}


def _torchao_layers(model: Path, config: str) -> dict[str, Any]:
    from torchao import quantization

    quantized = {}
    for name, tensor in load_file(model / WEIGHTS).items():
        if is_linear(name):
            layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
            quantization.quantize_(layer, getattr(quantization, config)())
            quantized[name.removesuffix(".weight")] = layer.weight
    return quantized


def integers(folder: Path) -> dict[str, Integers]:
    """The linear layers of a model that is stored in integers of eight bits."""
    quantized, _ = layers(load_file(folder / WEIGHTS))
    return {
        name: Integers(
            parts["weight"], parts["SCB" if "SCB" in parts else "weight_scale"].float().flatten()
        )
        for name, parts in quantized.items()
    }


def numbers(folder: Path) -> dict[str, Integers]:
    """The linear layers of a quantized model as plain numbers."""
    unpacked = unpack(folder).items()
    return {
        name.removesuffix(".weight"): Integers(weight, torch.ones(len(weight)))
        for name, weight in unpacked
        if is_linear(name)
    }


UNPACKERS: dict[str, Callable[[Tensors, Mapping[str, Any]], Tensors]] = {
    "awq": _unpack_awq,
    "gptq": _unpack_gptq,
    "auto-round": _unpack_gptq,
    "compressed-tensors": _unpack_compressed_tensors,
    "fp8": _unpack_fp8,
    "bitsandbytes": _unpack_bitsandbytes,
    "hqq": _unpack_hqq,
}


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
