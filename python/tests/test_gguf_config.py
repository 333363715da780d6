"""What GGUF files say of models, against the configs and models of transformers that were written
into them, and what transformers reads of the same files.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf as reference
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import gguf_files as raw
from conftest import ROOT
from gguf_files import Info, write
from vllm_bridge.checkpoints import gguf, gguf_config, gguf_names
from vllm_bridge.errors import BridgeError

VOCABULARY = 96

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Case(NamedTuple):
    """A model of transformers.

    Args:
        architecture: llama.cpp's name
        config: of the model
    """

    architecture: str
    config: Any


def case(architecture: str, name: str, **own: Any) -> Case:
    sizes = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}} | SIZES | own
    return Case(architecture, getattr(transformers, name)(**sizes))


EXPERTS = {"num_experts_per_tok": 2}
QWEN_EXPERTS = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32}

CASES = {
    "llama": case("llama", "LlamaConfig"),
    "tied": case("llama", "LlamaConfig", tie_word_embeddings=True, head_dim=32),
    "biased": case("llama", "LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama 3": case("llama", "LlamaConfig", rope_parameters=LLAMA3, head_dim=64),
    "llama with other bounds": case(
        "llama",
        "LlamaConfig",
        head_dim=128,
        rope_parameters=LLAMA3
        | {"factor": 8.0, "high_freq_factor": 5.5, "original_max_position_embeddings": 4096},
    ),
    "linear": case(
        "llama",
        "LlamaConfig",
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "mixtral": case("llama", "MixtralConfig", num_local_experts=4, **EXPERTS),
    "qwen2": case("qwen2", "Qwen2Config", rms_norm_eps=1e-6),
    "yarn": case(
        "qwen2",
        "Qwen2Config",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "qwen2moe": case(
        "qwen2moe", "Qwen2MoeConfig", shared_expert_intermediate_size=96, **QWEN_EXPERTS
    ),
    "qwen3": case("qwen3", "Qwen3Config", head_dim=32),
    "qwen3moe": case(
        "qwen3moe", "Qwen3MoeConfig", head_dim=32, norm_topk_prob=True, **QWEN_EXPERTS
    ),
    "gemma": case("gemma", "GemmaConfig", head_dim=32, tie_word_embeddings=True),
    "gemma2": case("gemma2", "Gemma2Config", sliding_window=128, **GEMMA),
    "gemma3": case(
        "gemma3",
        "Gemma3TextConfig",
        sliding_window=128,
        **GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    "phi2": case(
        "phi2",
        "PhiConfig",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        intermediate_size=256,
        num_key_value_heads=4,
    ),
    "phi3": case("phi3", "Phi3Config", sliding_window=200, original_max_position_embeddings=512),
    "phi4": case(
        "phi3",
        "Phi3Config",
        sliding_window=None,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "original_max_position_embeddings": 128,
        },
    ),
    "stablelm": case(
        "stablelm",
        "StableLmConfig",
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "starcoder2": case("starcoder2", "Starcoder2Config", tie_word_embeddings=True),
    "nemotron": case(
        "nemotron",
        "NemotronConfig",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
}


def metadata(given: Case) -> dict[str, Any]:
    """What llama.cpp's converter writes."""
    config = given.config
    rope = config.rope_parameters
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    named = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next(
            (
                value
                for name in ("layer_norm_eps", "norm_epsilon", "norm_eps")
                if (value := getattr(config, name, None)) is not None
            ),
            None,
        ),
        "attention.key_length": head if getattr(config, "head_dim", None) else None,
        "attention.value_length": head if getattr(config, "head_dim", None) else None,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope["rope_theta"],
        "rope.freq_base_swa": local.get("rope_theta"),
        "expert_count": getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(
            config, "shared_expert_intermediate_size", None
        ),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        named["rope.scaling.type"] = rope["rope_type"]
        named["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn" or given.architecture == "phi3":
        named["rope.scaling.original_context_length"] = rope.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
    if given.architecture in ("gemma2", "gemma3", "phi3"):
        named["attention.sliding_window"] = config.sliding_window or 0
    said = {
        f"{given.architecture}.{key}": value for key, value in named.items() if value is not None
    }
    return {
        "general.architecture": given.architecture,
        "general.name": "a model",
        **said,
        "tokenizer.ggml.tokens": [f"token{number}" for number in range(VOCABULARY)],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }


def state(given: Case) -> dict[str, tuple[int, ...]]:
    """The tensors of the model and their shapes, as the converter takes them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(given.config)
    taken = taken_apart(given, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in taken.items()}


def taken_apart(given: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of transformers' model as the converter takes them: experts are stacked, and
    their gates by themselves."""
    mlp, gate, up, down = ("mlp", "gate_proj", "up_proj", "down_proj")
    if given.config.model_type == "mixtral":
        mlp, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        stem = stem.replace(".mlp", f".{mlp}")
        if leaf == "gate_up_proj":
            found[f"{stem}.{gate}.weight"], found[f"{stem}.{up}.weight"] = tensor.chunk(2, dim=1)
        elif leaf == "down_proj":
            found[f"{stem}.{down}.weight"] = tensor
        elif name.endswith("shared_expert_gate.weight"):
            found[name] = tensor[0]
        else:
            found[f"{stem}.{leaf}"] = tensor
    if given.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def tensors(given: Case) -> dict[str, str]:
    """The names on Hugging Face by those in the file, by gguf-py."""
    architecture = next(
        key for key, name in reference.MODEL_ARCH_NAMES.items() if name == given.architecture
    )
    mapped = reference.get_tensor_name_map(architecture, given.config.num_hidden_layers)
    found = {}
    for name in state(given):
        key = mapped.get_name(name, (".weight", ".bias"))
        assert key is not None, name
        found[key] = name
    return found


def written(given: Case, path: Path) -> Path:
    shapes = state(given)
    infos = {key: Info(shapes[name]) for key, name in tensors(given).items()}
    floats: dict[str, list[float]] = {}
    rope = given.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        floats["rope_freqs.weight"] = rope_freqs(rope, given.config.head_dim)
    if rope.get("rope_type") == "longrope":
        floats["rope_factors_long.weight"] = rope["long_factor"]
        floats["rope_factors_short.weight"] = rope["short_factor"]
    infos |= {name: Info((len(values),)) for name, values in floats.items()}
    write(path, metadata(given), infos)
    found = gguf.read(str(path))
    with path.open("r+b") as file:
        for name, values in floats.items():
            file.seek(found.tensors[name].start)
            file.write(struct.pack(f"<{len(values)}f", *values))
    return path


def rope_freqs(rope: dict[str, Any], dimensions: int) -> list[float]:
    """As llama.cpp's converter computes them."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for index in range(0, dimensions, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (index / dimensions)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as files."""
    found = tmp_path_factory.mktemp("models")
    for name, given in CASES.items():
        written(given, found / f"{name}.gguf")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_config_is_that_of_the_model(folder: Path, name: str) -> None:
    given = CASES[name]
    found = gguf_config.config(gguf.read(str(folder / f"{name}.gguf")))
    assert found.pop("quantization_config") == {
        "quant_method": "gguf",
        "architecture": given.architecture,
        "types": {"F32": 1.0},
    }
    assert found.pop("dtype") == "bfloat16"
    assert found.pop("model_type") == given.config.model_type
    (architecture,) = found.pop("architectures")
    assert hasattr(transformers, architecture)
    ours = type(given.config)(**found)
    if given.config.to_dict().get("head_dim") is None:  # it follows from others
        del found["head_dim"]
    if given.architecture == "gemma":  # what vLLM reads, beside what transformers does
        assert found.pop("hidden_activation") == given.config.hidden_act
    for key in found:
        assert getattr(ours, key) == getattr(given.config, key), key


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gemma", "phi2")])
def test_transformers_reads_the_same(folder: Path, name: str) -> None:
    path = folder / f"{name}.gguf"
    ours = gguf_config.config(gguf.read(str(path)))
    theirs = load_gguf_checkpoint(str(path))["config"]
    del theirs["_model_name_or_path"]
    if ours["model_type"] == "mixtral":  # for which it takes no Llama
        assert theirs.pop("model_type") == "llama"
    rope = ours["rope_parameters"]
    ours["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_the_model(folder: Path, name: str) -> None:
    file = gguf.read(str(folder / f"{name}.gguf"))
    names = gguf_names.names(file, gguf_config.config(file))
    assert names == tensors(CASES[name])
    found = {names[key]: tensor for key, tensor in file.tensors.items() if key in names}
    gguf_names.check(file.path, gguf_config.config(file), found)
    # No other shape, and nothing left out
    for missing in sorted(found):
        others = {key: tensor for key, tensor in found.items() if key != missing}
        other = others | {missing: found[missing]._replace(shape=(7, *found[missing].shape))}
        for wrong in (others, other):
            if missing.endswith(".bias") and wrong is others:
                continue
            with pytest.raises(BridgeError) as caught:
                gguf_names.check(file.path, gguf_config.config(file), wrong)
            assert caught.value.details["tensor"] == missing


def test_every_architecture_has_its_case_and_is_in_the_guide() -> None:
    assert {given.architecture for given in CASES.values()} == set(gguf_config.architectures())
    guide = (ROOT / "guides" / "quantization.md").read_text(encoding="utf-8")
    section = guide.partition("\n## GGUF\n")[2].partition("\n## ")[0]
    for architecture in gguf_config.architectures():
        assert f"`{architecture}`" in section


# -- what does not describe a model


def refused(path: Path) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        look_at(path)
    assert str(path) in caught.value.message
    return caught.value


def look_at(path: Path) -> None:
    file = gguf.read(str(path))
    names = gguf_names.names(file, gguf_config.config(file))
    by_name = {names[key]: tensor for key, tensor in file.tensors.items() if key in names}
    gguf_names.check(file.path, gguf_config.config(file), by_name)


def test_a_small_llama(tmp_path: Path) -> None:
    file = gguf.read(str(raw.write_llama(tmp_path / "m.gguf")))
    found = gguf_config.config(file)
    assert found["quantization_config"]["types"] == {"Q8_0": 1.0}
    assert found["rms_norm_eps"] == 1e-5
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert "pad_token_id" not in found
    assert found["tie_word_embeddings"] is False


def test_the_part_of_each_type_is_told(tmp_path: Path) -> None:
    tensors = raw.llama_tensors("Q4_0") | {
        "output.weight": Info((raw.VOCABULARY, raw.HIDDEN), "Q8_0")
    }
    path = write(tmp_path / "m.gguf", raw.LLAMA, tensors)
    types = gguf_config.config(gguf.read(str(path)))["quantization_config"]["types"]
    assert list(types) == ["Q4_0", "Q8_0"]
    head = raw.VOCABULARY * raw.HIDDEN
    matrices = 2 * head + raw.LAYERS * raw.HIDDEN * (
        2 * raw.HIDDEN + 2 * raw.KEYS + 3 * raw.INTERMEDIATE
    )
    assert types["Q8_0"] == pytest.approx(head / matrices, abs=1e-4)


def test_an_architecture_that_is_not_known_is_told_with_those_that_are(tmp_path: Path) -> None:
    error = refused(raw.write_llama(tmp_path / "m.gguf", general__architecture="falcon"))
    assert error.reason == "unsupported_model"
    assert "falcon" in error.message
    assert set(error.details["allowed"]) == set(gguf_config.architectures())
    for architecture in gguf_config.architectures():
        assert architecture in error.message
    error = refused(raw.write_llama(tmp_path / "m.gguf", general__architecture="x" * 100_000))
    assert len(f"{error.message}{error.details}") < 1500


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general__architecture": None}, "of which architecture"),
    "an architecture that is a number": ({"general__architecture": 3}, "of which architecture"),
    "no size": ({"llama__embedding_length": None}, "lacks `llama.embedding_length`"),
    "a size of none": ({"llama__embedding_length": 0}, "`llama.embedding_length` is 0"),
    "a size in words": ({"llama__feed_forward_length": "big"}, "is 'big'"),
    "a size that is a fraction": ({"llama__context_length": 0.5}, "is 0.5"),
    "no heads": ({"llama__attention__head_count": 0}, "head_count` is 0"),
    "heads that do not go together": (
        {"llama__attention__head_count_kv": 3},
        "4 heads of queries for 3 of keys",
    ),
    "an epsilon that is none": (
        {"llama__attention__layer_norm_rms_epsilon": math.inf},
        "epsilon` is inf",
    ),
    "a base that is none": ({"llama__rope__freq_base": 0.0}, "freq_base` is 0.0"),
    "more than there is to rotate": (
        {"llama__rope__dimension_count": 64},
        "dimension_count` is 64",
    ),
    "a layer too many": ({"llama__block_count": 3}, "3 layers, and holds weights of 2"),
    "a layer too few": ({"llama__block_count": 1}, "1 layers, and holds weights of 2"),
    "billions of layers": ({"llama__block_count": 2**31}, "is 2147483648"),
    "a larger vocabulary": (
        {"tokenizer__ggml__tokens": ["a"] * 97},
        "has 97 tokens, and `token_embd.weight` 96 rows",
    ),
    "no vocabulary": ({"tokenizer__ggml__tokens": 5}, "tokenizer has 5 tokens"),
    "a token that there is not": ({"tokenizer__ggml__eos_token_id": 96}, "is 96, which is no"),
    "another hidden size": ({"llama__embedding_length": 128}, "has the shape"),
    "another intermediate size": ({"llama__feed_forward_length": 64}, "has the shape"),
    "another size of heads": ({"llama__attention__key_length": 32}, "has the shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_describes_no_model_is_told(tmp_path: Path, name: str) -> None:
    said, words = WRONG[name]
    error = refused(raw.write_llama(tmp_path / "m.gguf", **said))
    assert error.reason == "invalid_checkpoint"
    assert words in error.message
    assert len(error.message) < 400


def test_layers_of_different_sizes_are_told(tmp_path: Path) -> None:
    error = refused(raw.write_llama(tmp_path / "m.gguf", llama__attention__head_count_kv=[2, 1]))
    assert error.reason == "unsupported_model"
    assert error.details["key"] == "llama.attention.head_count_kv"
    path = raw.write_llama(tmp_path / "m.gguf", llama__attention__head_count_kv=[2, 2])
    assert gguf_config.config(gguf.read(str(path)))["num_key_value_heads"] == 2


def test_keys_and_values_of_different_sizes_are_told(tmp_path: Path) -> None:
    error = refused(raw.write_llama(tmp_path / "m.gguf", llama__attention__value_length=32))
    assert error.reason == "unsupported_model"
    assert "different sizes" in error.message


def test_biases_of_some_layers_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kinds = {
        "attn_q": raw.HIDDEN,
        "attn_k": raw.KEYS,
        "attn_v": raw.KEYS,
        "attn_output": raw.HIDDEN,
    }
    biases = {
        f"blk.{number}.{kind}.bias": Info((size,))
        for number in range(raw.LAYERS)
        for kind, size in kinds.items()
    }
    look_at(write(path, raw.LLAMA, raw.llama_tensors() | biases))
    for missing in biases:
        others = {key: info for key, info in biases.items() if key != missing}
        refused(write(path, raw.LLAMA, raw.llama_tensors() | others))


def test_a_vocabulary_is_no_model(tmp_path: Path) -> None:
    assert "holds no weights" in refused(write(tmp_path / "m.gguf", raw.LLAMA)).message


def test_a_tensor_that_models_do_not_have_is_told(tmp_path: Path) -> None:
    for key in (
        "blk.0.ssm_a",
        "blk.0.attn_q_norm.weight",
        "blk.00.attn_q.weight",
        "x.weight",
        "output.bias",
    ):
        tensors = raw.llama_tensors() | {key: Info((raw.HIDDEN,))}
        error = refused(write(tmp_path / "m.gguf", raw.LLAMA, tensors))
        assert error.reason == "unsupported_model"
        assert error.details["tensor"] == key


def test_factors_of_another_kind_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, raw.LLAMA, raw.llama_tensors() | {"rope_freqs.weight": Info((8,))})
    assert "does not hold 8 factors" in refused(path).message  # they are zeros
    found = gguf.read(str(path)).tensors["rope_freqs.weight"]
    for factors in ((3, 1, 2, 1, 3, 1, 2, 1), (8, 7, 6, 5, 4, 3, 2, 1)):
        with path.open("r+b") as file:
            file.seek(found.start)
            file.write(struct.pack("<8f", *factors))
        error = refused(path)
        assert error.reason == "unsupported_model"
        assert "rope_freqs.weight" in error.message
