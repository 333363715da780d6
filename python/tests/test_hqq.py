"""HQQ without an engine: what hqq keeps, quantizes and dequantizes, and what is refused.

The answers of hqq itself come from ``scripts/hqq_models``.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import CHECKPOINTS, DEMO, WEIGHTS
from conftest import MODELS
from vllm_bridge import quantization
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.hqq import settings as configs
from vllm_bridge.quantization.hqq.quantize import quantize
from vllm_bridge.quantization.hqq.settings import Settings
from vllm_bridge.quantization.hqq.stored import Stored, cut, scales_shape, stored
from vllm_bridge.quantization.packed import grouped

CASES = load_file(Path(__file__).parent / "hqq_cases.safetensors")
NAMES = sorted({name.rpartition(".")[0] for name in CASES})


def case(name: str) -> tuple[int, int, Settings]:
    rows, columns, group, bits, axis = name.split("-")
    number = float(bits)
    settings = Settings(
        int(number) if number.is_integer() else number, int(group) or None, int(axis)
    )
    return int(rows), int(columns), settings


def of_case(name: str) -> Stored:
    rows, columns, settings = case(name)
    parts = (CASES[f"{name}.{part}"] for part in ("W_q", "scale", "zero"))
    return stored(*parts, rows, columns, settings)  # type: ignore[call-arg]


def weights(of: Stored, bits: int) -> torch.Tensor:
    packed = grouped.pack(of.integers, bits)
    columns = of.integers.shape[1]
    return grouped.dequantize(packed, of.scales, of.zeros, bits, columns, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_hqq_dequantizes(name: str) -> None:
    rows, columns, settings = case(name)
    found = of_case(name)
    assert found.scales.shape == scales_shape(rows, columns, settings)
    assert torch.equal(weights(found, settings.bits), CASES[f"{name}.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_quantized_as_hqq_does_it(name: str) -> None:
    _, _, settings = case(name)
    ours, theirs = quantize(CASES[f"{name}.plain"], settings), of_case(name)
    # A sum that another processor rounds otherwise may move a zero point by its last digit.
    assert (ours.integers != theirs.integers).float().mean() < 0.01
    assert torch.equal(ours.scales, theirs.scales)
    torch.testing.assert_close(ours.zeros, theirs.zeros, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_matrix_is_that_part_of_its_weights(name: str) -> None:
    rows, columns, settings = case(name)
    whole = of_case(name)
    expected = weights(whole, settings.bits)
    own = 1 if settings.axis == 0 else columns // whole.scales.shape[1]
    for first, last in ((0, rows // 2), (rows // 2, rows), (5, 12)):
        for start in (0, columns // 2):
            half = columns // 2
            group = next(size for size in (own, 4, 2, 1) if own % size == half % size == 0)
            part = cut(whole, slice(first, last), slice(start, start + half), group)
            found = weights(part, settings.bits)
            assert torch.equal(found, expected[first:last, start : start + half])


@pytest.mark.parametrize("name", ["hqq", "hqq-qmodel"])
def test_the_references_are_what_hqq_dequantizes(name: str, tmp_path: Path) -> None:
    model = checkpoints.make(name, tmp_path / name)
    unpacked = checkpoints.unpack(model)
    digests = json.loads((CHECKPOINTS / name / "weights.json").read_text())
    assert len(digests) == 42
    for layer, digest in digests.items():
        found = unpacked[f"{layer}.weight"].contiguous().numpy().tobytes()
        assert hashlib.sha256(found).hexdigest() == digest, layer


# -- what a folder says


def test_a_model_of_the_library_is_known_by_its_file(tmp_path: Path) -> None:
    checkpoint = check_model(str(checkpoints.make("hqq-qmodel", tmp_path / "model")), {})
    assert checkpoint.quant_method == "hqq"
    assert checkpoint.load_format == "hqq"
    layers = configs.layers(checkpoint.quantization or {})
    settings = Settings(3, 64, 0)
    assert layers.of("model.layers.3.mlp.down_proj") == settings
    assert layers.of("lm_head") is None
    assert layers.named["self_attn.q_proj"] == settings
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    # In memory three bits are three bits, and 3.2 in the file.
    assert fit.loaded_bytes(checkpoint, {}) == pytest.approx(size * 3.5 / 3.7, rel=0.03)
    quantization.check(checkpoint)


def test_layers_that_differ_are_named_each() -> None:
    found = configs.config(
        {"mlp.up_proj": Settings(2, 16), "model.layers.0.self_attn.q_proj": Settings(8, None, 0)},
        ["lm_head"],
    )
    layers = configs.layers(found)
    assert layers.of("model.layers.7.mlp.up_proj") == Settings(2, 16)
    assert layers.of("language_model.model.layers.7.mlp.up_proj") == Settings(2, 16)
    assert layers.of("model.layers.0.self_attn.q_proj") == Settings(8, None, 0)
    assert layers.of("model.layers.1.self_attn.q_proj") is None
    assert layers.of("lm_head") is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_config": 4},
        {"quant_config": {"weight_quant_params": {"nbits": 7}}},
        {"quant_config": {"weight_quant_params": {"nbits": [4]}}},
        {"quant_config": {"weight_quant_params": {"group_size": 0}}},
        {"quant_config": {"weight_quant_params": {"axis": 2}}},
        {"quant_config": {"mlp.up_proj": {"nbits": 4}}},
        {"quant_config": {"weight_quant_params": {}}, "skip_modules": "lm_head"},
    ],
)
def test_a_config_that_is_none_of_hqqs(config: dict[str, Any]) -> None:
    checkpoint = Checkpoint(config={"quantization_config": {"quant_method": "hqq"} | config})
    with pytest.raises(BridgeError) as caught:
        quantization.check(checkpoint)
    assert caught.value.reason == "invalid_checkpoint"


LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def drop_zero(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.zero"]


def drop_integers(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.W_q"]


def shorten(tensors: Tensors) -> None:
    tensors[f"{LAYER}.W_q"] = tensors[f"{LAYER}.W_q"][1:].contiguous()


def shorten_scale(tensors: Tensors) -> None:
    tensors[f"{LAYER}.scale"] = tensors[f"{LAYER}.scale"][1:].contiguous()


def say_three_bits(tensors: Tensors) -> None:
    tensors[f"{LAYER}.nbits"] = torch.tensor(3, dtype=torch.int32)


def say_another_axis(tensors: Tensors) -> None:
    tensors[f"{LAYER}.axis"] = torch.tensor(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_zero, f"`{LAYER}.zero` is missing"),
        (drop_integers, f"`{LAYER}.W_q` is missing"),
        (shorten, "`W_q` has"),
        (shorten_scale, "`scale` has"),
        (say_three_bits, "nbits 3, and not 4"),
        (say_another_axis, "axis 0, and not 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_their_headers(
    change: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    model = checkpoints.make("hqq", tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(model), {}))
    assert caught.value.reason == "invalid_checkpoint"
    assert words in caught.value.message


def test_a_plain_model_that_is_said_to_be_quantized(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    config = checkpoints.read_config(model) | {"quantization_config": configs.config(Settings())}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(model), {}))
    assert "none of its weights is" in caught.value.message


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    model = checkpoints.make("hqq", tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    for name in [name for name in tensors if name.startswith(LAYER)]:
        tensors[name.replace("mlp.", "mlp.experts.0.")] = tensors.pop(name)
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(model), {}))
    assert caught.value.reason == "unsupported_quantization"
    assert "AWQ or GPTQ variant" in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W_q": torch.zeros(3, 3, dtype=torch.uint8)}, "`W_q` has 9 bytes"),
        ({"shape": [4, 4, 4]}, "its shape is"),
        ({"shape": ("4", "4")}, "its shape is"),
        ({"W_q": 4}, "its `W_q` is no tensor"),
        ({"meta": [4]}, "is no dict"),
        ({"nbits": 5.5}, "`nbits` is 5.5"),
        ({"zero_q": None}, "it has no `zero`"),
    ],
)
def test_a_damaged_layer_of_the_library_is_named(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = checkpoints.make("hqq-qmodel", tmp_path / "model")
    modules = torch.load(model / checkpoints.QMODEL, weights_only=True)
    for name, value in change.items():
        if value is None:
            del modules[LAYER][name]
        else:
            modules[LAYER][name] = value
    torch.save(modules, model / checkpoints.QMODEL)
    with pytest.raises(BridgeError) as caught:
        check_model(str(model), {})
    assert caught.value.reason == "invalid_checkpoint"
    assert LAYER in caught.value.message
    assert words in caught.value.message


def test_integers_of_more_bits_than_are_said() -> None:
    packed = torch.full((4, 8), 63, dtype=torch.uint8)
    scale = torch.ones(4, 1)
    assert stored(packed, scale, scale, 4, 8, Settings(6, 8)).integers.max() == 63
    with pytest.raises(ValueError, match="more than 5 bits"):
        stored(packed, scale, scale, 4, 8, Settings(5, 8))


# -- in flight


NOTHING = Checkpoint()


def take(options: dict[str, Any], checkpoint: Checkpoint = NOTHING) -> str | None:
    return registry.of("hqq").take_settings(checkpoint, options)


def test_settings_of_a_plain_model() -> None:
    options: dict[str, Any] = {"quantization": "hqq"}
    assert take(options) == "integers of 4 bits in groups of 64, axis 1"
    taken = configs.layers(options["hf_overrides"]["quantization_config"])
    assert taken.of("model.layers.0.mlp.up_proj") == Settings(4, 64, 1)
    options = {
        "quantization_config": {"nbits": 3, "group_size": None, "axis": 0},
        "hf_overrides": {"rope_theta": 1.0},
    }
    assert take(options) == "integers of 3 bits in one group for each row, axis 0"
    assert "quantization_config" not in options
    assert options["hf_overrides"]["rope_theta"] == 1.0


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"nbit": 4}, "nbits"),
        ({"nbits": 4, "groupsize": 64}, "group_size"),
        ("int4", None),
        ({"nbits": 7}, None),
        ({"group_size": "64"}, None),
        ({"nbits": True}, None),
        ({"axis": True}, None),
    ],
)
def test_settings_that_hqq_does_not_have(given: Any, nearest: str | None) -> None:
    with pytest.raises(BridgeError) as caught:
        take({"quantization": "hqq", "quantization_config": given})
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "quantization_config"
    assert caught.value.details.get("nearest") == nearest


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_that_a_plain_model_does_not_have(axis: int) -> None:
    plain = check_model(str(MODELS / "demo"), {})
    take({"quantization_config": {"group_size": 32, "axis": axis}}, plain)
    with pytest.raises(BridgeError) as caught:
        take({"quantization_config": {"group_size": 7, "axis": axis}}, plain)
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "quantization_config"
    assert "`model.layers.0.mlp.down_proj` are 512 (" in caught.value.message
    assert "no whole groups of 7" in caught.value.message


@pytest.mark.parametrize(
    ("given", "bits"),
    [(None, 4.5), ({"nbits": 2, "group_size": 16}, 4), ({"nbits": 8, "group_size": None}, 8)],
)
def test_what_it_takes_is_foreseen(given: dict[str, Any] | None, bits: float) -> None:
    plain = check_model(str(MODELS / "demo"), {})
    options: dict[str, Any] = {"quantization": "hqq", "quantization_config": given}
    matrices = 3_538_944
    spared = int(matrices * (2 - bits / 8))
    assert fit.loaded_bytes(plain, {}) - fit.loaded_bytes(plain, options) == spared
    take(options)
    assert fit.loaded_bytes(plain, {}) - fit.loaded_bytes(plain, options) == spared


# -- what vLLM gets


class Layer(torch.nn.Module):  # type: ignore[misc]
    """A layer as vLLM makes it."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, ranks


@pytest.mark.parametrize("settings", [Settings(3, 16, 1), Settings(4, 8, 0), Settings(2, None, 1)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_together_compute_what_one_does(
    settings: Settings, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_bridge.quantization.hqq.layers import HQQLinear
    from vllm_bridge.quantization.packed.shards import Shards

    torch.manual_seed(7)
    plain = {"q": torch.randn(32, 48), "k": torch.randn(16, 48), "v": torch.randn(16, 48)}
    x = torch.randn(5, 48)
    expected = [
        x @ weights(quantize(weight, settings), settings.bits).T for weight in plain.values()
    ]
    monkeypatch.setattr(Shards, "_ranks", lambda self, number: ranks)
    outputs = []
    for rank in range(ranks):
        layer: Any = Layer(rank, ranks)
        method = HQQLinear(settings)
        sizes = [len(weight) // ranks for weight in plain.values()]
        method.create_weights(layer, 48, sizes, 48, 64, torch.float32)
        for shard, weight in plain.items():
            layer.weight.weight_loader(layer.weight, weight, shard)
        method.process_weights_after_loading(layer)
        assert set(dict(layer.named_parameters())) == {"qweight", "scales", "zeros"}
        outputs.append(method.apply(layer, x).split(sizes, -1))
    found = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [Settings(3, 16, 1), Settings(4, 8, 0), Settings(2, None, 1)])
def test_ranks_that_have_columns_add_up(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_bridge.quantization.hqq.layers import HQQLinear
    from vllm_bridge.quantization.packed.shards import Shards

    torch.manual_seed(7)
    plain, x = torch.randn(24, 40), torch.randn(5, 40)
    expected = x @ weights(quantize(plain, settings), settings.bits).T
    monkeypatch.setattr(Shards, "_ranks", lambda self, number: 1)
    total = torch.zeros_like(expected)
    for rank in range(2):
        layer: Any = Layer(rank, 2)
        method = HQQLinear(settings)
        method.create_weights(layer, 20, [24], 40, 24, torch.float32)
        layer.weight.weight_loader(layer.weight, plain)
        total += method.apply(layer, x[:, 20 * rank : 20 * rank + 20])
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("settings", [Settings(3, 16, 1), Settings(4, 8, 0)])
def test_a_compiled_graph_has_it_whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_bridge.quantization.hqq.layers import HQQLinear
    from vllm_bridge.quantization.packed.shards import Shards

    monkeypatch.setattr(Shards, "_ranks", lambda self, number: 1)
    layer: Any = Layer(0, 1)
    method = HQQLinear(settings)
    method.create_weights(layer, 48, [32, 16], 48, 48, torch.float32)
    for number, rows in enumerate((32, 16)):
        layer.weight.weight_loader(layer.weight, torch.randn(rows, 48), number)
    method.process_weights_after_loading(layer)
    compiled = torch.compile(method.apply, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 48)
    assert torch.equal(compiled(layer, x), method.apply(layer, x))


def test_merged_layers_that_differ_are_refused() -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_bridge.quantization.hqq.layers import HQQConfig

    config = HQQConfig.from_config(
        configs.config({"self_attn.q_proj": Settings(4), "self_attn.k_proj": Settings(8)})
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj"]}
    layer = object.__new__(LinearBase)
    with pytest.raises(ValueError, match="quantized in different ways"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert config.get_quant_method(SimpleNamespace(), "lm_head") is None
