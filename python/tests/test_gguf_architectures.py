"""Models of every architecture that is read from GGUF files, with random weights, on the real
engine: they say of a text what transformers says of the same weights.
"""

from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

import gguf_models
from gguf_files import Info, write
from running import Running
from test_gguf_config import CASES, Case, metadata, rope_freqs, taken_apart, tensors
from test_gguf_loader import converted, quantized
from vllm_bridge.checkpoints import gguf

# Of the demo model, whose tokenizer the files have.
VOCABULARY = 1024

# Longer than the windows of the models that have some, and more tokens than those for which
# activations are rounded to 8 bits.
LENGTH = 300

# One of each kind of layer and of positions.
ENGINES = (
    *("llama 3", "mixtral", "qwen2moe", "gemma2", "gemma3"),
    *("phi2", "phi4", "stablelm", "starcoder2", "nemotron"),
)

Array = npt.NDArray[np.float32]


def larger(given: Case) -> Case:
    """With the demo model's vocabulary, and sizes that kernels have."""
    config = given.config.to_dict()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512}
    if config.get("head_dim"):
        sizes["head_dim"] = 64
    if config.get("query_pre_attn_scalar"):
        sizes["query_pre_attn_scalar"] = 64
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if key in config:
            sizes[key] = 128
    rope = dict(config["rope_parameters"])
    for key in ("long_factor", "short_factor"):
        if key in rope:
            rope[key] = [rope[key][0] + index / 10 for index in range(24)]
    return Case(
        given.architecture, type(given.config)(**config | sizes | {"rope_parameters": rope})
    )


def randomize(model: torch.nn.Module) -> None:
    """Weights that attend to few positions, so that it shows where they look, and that are what
    Q8_0 makes of them."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter)
            if "norm" in name:
                values = 0.1 * values + (0.0 if "gemma" in type(model).__name__.lower() else 1.0)
            elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                values /= 6
            else:
                values /= 12
            if is_packed(name, values):
                rows = values.flatten(0, -2).numpy()
                kind = reference.GGMLQuantizationType.Q8_0
                values = torch.from_numpy(reference.dequantize(quantized(rows), kind))
            parameter.copy_(values.view(parameter.shape))


def is_packed(name: str, values: Any) -> bool:
    router = "mlp.gate.weight" in name or "moe.gate.weight" in name or "shared_expert_gate" in name
    return values.ndim > 1 and not router


def write_model(given: Case, model: torch.nn.Module, path: Path) -> None:
    tokenizer = {
        key: list(value) if isinstance(value, tuple) or hasattr(value, "typecode") else value
        for key, value in gguf.read(str(gguf_models.make("F16", path.parent))).metadata.items()
        if key.startswith("tokenizer.")
    }
    parts = taken_apart(given, model.state_dict())
    data: dict[str, Any] = {}
    infos: dict[str, Info] = {}
    for key, name in tensors(given).items():
        values = converted(given, name, parts[name].numpy())
        packed = is_packed(name, values)
        data[key] = quantized(values) if packed else values
        infos[key] = Info(values.shape, "Q8_0" if packed else "F32")
    rope = given.config.rope_parameters
    floats: dict[str, list[float]] = {}
    if rope.get("rope_type") == "llama3":
        floats["rope_freqs.weight"] = rope_freqs(rope, given.config.head_dim)
    if rope.get("rope_type") == "longrope":
        floats["rope_factors_long.weight"] = rope["long_factor"]
        floats["rope_factors_short.weight"] = rope["short_factor"]
    for key, numbers in floats.items():
        infos[key] = Info((len(numbers),))
        data[key] = np.array(numbers, np.float32)
    write(path, metadata(given) | tokenizer, infos)
    found = gguf.read(str(path))
    with path.open("r+b") as file:
        for key, values in data.items():
            file.seek(found.tensors[key].start)
            file.write(np.ascontiguousarray(values).tobytes())


def expected(model: Any, ids: list[int]) -> Array:
    """The log-probability of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    found: Array = logits[range(len(ids) - 1), ids[1:]].float().numpy()
    return found


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_says_what_transformers_says(tmp_path: Path, name: str) -> None:
    given = larger(CASES[name])
    model = transformers.AutoModelForCausalLM.from_config(
        given.config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomize(model)
    path = tmp_path / "model.gguf"
    write_model(given, model, path)
    chosen = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=chosen).tolist()
    prompt = {"prompt_token_ids": np.array(ids, "<u4").tobytes()}
    running = Running()
    running.load(path, dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**26)
    answer = running.run(running.generate(prompt, max_tokens=1, prompt_logprobs=0))
    running.stop()
    said = np.frombuffer(answer["prompt_logprobs"]["logprobs"], "<f4")
    np.testing.assert_allclose(said, expected(model, ids), atol=1e-3)
