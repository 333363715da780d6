"""Quantized experts on a CPU whose vLLM has no kernel for them. What whole mixtures answer is
measured by ``matrix.py``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.oracle import fp8 as choice_of_fp8
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, fp8

import checkpoints
import fp8_models
import mixtures
from running import Running
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.patches.cpu import experts

EXPERTS, INNER, HIDDEN = 3, 128, 256


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    experts.apply()


def layer_of(quantize: mixtures.Quantize, dims: dict[str, int]) -> tuple[Any, torch.Tensor]:
    """The gates and ups of some experts as vLLM has them once they are loaded, and what they stand
    for.

    Args:
        dims: the parts of each, and along which of their dimensions vLLM puts gate and up
            together; -1 for one beside the other
    """
    torch.manual_seed(3)
    loaded: dict[str, list[torch.Tensor]] = {name: [] for name in dims}
    plain = []
    for _ in range(EXPERTS):
        halves = [quantize(torch.randn(INNER, HIDDEN)) for _ in ("gate", "up")]
        plain.append(torch.cat([stands_for for _, stands_for in halves]))
        for name, dim in dims.items():
            parts = [saved[name] for saved, _ in halves]
            loaded[name].append(torch.stack(parts) if dim < 0 else torch.cat(parts, dim))
    tensors = {f"w13_{name}": torch.stack(parts) for name, parts in loaded.items()}
    layer = SimpleNamespace(local_num_experts=EXPERTS, params_dtype=torch.bfloat16, **tensors)
    return layer, torch.stack(plain)


def method(**settings: Any) -> Any:
    return SimpleNamespace(moe=SimpleNamespace(w13_num_shards=2), **settings)


AUTO = {"qweight": 1, "qzeros": 1, "scales": 1}
PACKED = {"weight_packed": 0, "weight_scale": 0}
SCALED = {"weight": 0, "weight_scale": 0}
GPTQ = method(quant_config=SimpleNamespace(weight_bits=4, is_sym=True))


@pytest.mark.parametrize(
    ("quantize", "parts", "unpack", "settings"),
    [
        (
            mixtures.awq,
            AUTO,
            experts._awq,
            method(quant_config=SimpleNamespace(zero_point=True)),
        ),
        (mixtures.w4a16, PACKED, experts._packed, method(num_bits=4)),
        (
            mixtures.w4a16_asymmetric,
            PACKED | {"weight_zero_point": 0},
            experts._packed,
            method(num_bits=4),
        ),
        (mixtures.w8a8, SCALED, experts._scaled, method()),
        (fp8_models.per_channel, SCALED, experts._scaled, method(weight_block_size=None)),
        (
            fp8_models.per_tensor,
            SCALED | {"weight_scale": -1},
            experts._scaled,
            method(weight_block_size=None),
        ),
        (
            fp8_models.per_block,
            {"weight": 0, "weight_scale_inv": 0},
            experts._scaled,
            method(moe_block_shape=[128, 128], weight_scale_name="weight_scale_inv"),
        ),
    ],
    ids=["awq", "w4a16", "w4a16 with zero points", "w8a8", "channel", "tensor", "block"],
)
def test_weights_are_what_they_stand_for(
    quantize: mixtures.Quantize,
    parts: dict[str, int],
    unpack: Callable[[Any, Any, str], torch.Tensor],
    settings: Any,
) -> None:
    layer, plain = layer_of(quantize, parts)
    unpacked = unpack(settings, layer, "w13")
    assert unpacked.dtype == torch.bfloat16
    assert torch.equal(unpacked, plain)


REAL = {
    "demo-awq": (AUTO, experts._awq, method(quant_config=SimpleNamespace(zero_point=True))),
    "demo-gptq": (AUTO, experts._gptq, GPTQ),
    "auto-round": (AUTO, experts._gptq, GPTQ),
    "w4a16": (PACKED, experts._packed, method(num_bits=4)),
    "w4a16-asym": (PACKED | {"weight_zero_point": 0}, experts._packed, method(num_bits=4)),
    "w8a8": (SCALED, experts._scaled, method()),
    "fp8-dynamic": (SCALED, experts._scaled, method(weight_block_size=None)),
}


@pytest.mark.parametrize("name", REAL)
def test_weights_that_the_formats_own_tools_have_packed(name: str, tmp_path: Path) -> None:
    # The layers of the demo model stand for experts.
    parts, unpack, settings = REAL[name]
    model = checkpoints.make(name, tmp_path / name)
    plain = checkpoints.unpack(model)
    saved, _ = checkpoints.layers(load_file(model / checkpoints.WEIGHTS))
    for tensors in saved.values():
        if "scales" in tensors:  # the unpackers round them, as vLLM does those of linear layers
            tensors["scales"] = tensors["scales"].bfloat16()
    halves = [
        [f"model.layers.{expert}.mlp.{part}_proj" for part in ("gate", "up")]
        for expert in range(EXPERTS)
    ]
    layer = SimpleNamespace(
        local_num_experts=EXPERTS,
        params_dtype=torch.bfloat16,
        moe_config=SimpleNamespace(has_bias=True),
        _loaded_expert_biases=set(),
    )
    for part, dim in parts.items():
        fused = [torch.cat([saved[half][part] for half in pair], dim) for pair in halves]
        setattr(layer, f"w13_{part}", torch.stack(fused))
    expected = [torch.cat([plain[f"{half}.weight"] for half in pair]) for pair in halves]
    unpacked = unpack(settings, layer, "w13")
    assert torch.equal(unpacked, torch.stack(expected).bfloat16())


def gptq_layer() -> tuple[Any, torch.Tensor]:
    layer, plain = layer_of(mixtures.gptq, AUTO)
    bias = torch.zeros(EXPERTS, 2 * INNER)
    layer._parameters = {"w13_bias": bias}
    layer._loaded_expert_biases = set()
    layer.moe_config = SimpleNamespace(has_bias=False)
    layer.w13_bias = bias
    return layer, plain


def test_gptq() -> None:
    layer, plain = gptq_layer()
    assert torch.equal(experts._gptq(GPTQ, layer, "w13"), plain)
    # Biases that were not in the checkpoint are none.
    assert not hasattr(layer, "w13_bias")
    assert not layer.moe_config.has_bias


def test_gptqs_biases_that_the_architecture_does_not_have() -> None:
    layer, _ = gptq_layer()
    layer._loaded_expert_biases = {"w13_bias"}
    experts._gptq(GPTQ, layer, "w13")
    assert hasattr(layer, "w13_bias")
    assert layer.moe_config.has_bias


def test_gptq_with_zero_points_is_not_guessed() -> None:
    layer, _ = gptq_layer()
    settings = method(quant_config=SimpleNamespace(weight_bits=4, is_sym=False))
    with pytest.raises(NotImplementedError, match="zero points"):
        experts._gptq(settings, layer, "w13")


def test_a_block_may_be_a_part_of_one() -> None:
    # Gate and up of three rows, in blocks of two: the second block of each has one row.
    weight = torch.ones(1, 6, 2).to(torch.float8_e4m3fn)
    scale = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    plain = experts.scaled(weight, scale, 2, [2, 2], torch.float32)
    assert plain[0, :, 0].tolist() == [1, 1, 2, 3, 3, 4]


def test_numbers_of_8_bits_in_words() -> None:
    packed = torch.tensor([[0x04030201, -1]], dtype=torch.int32)
    assert experts.unpack(packed, 8).tolist() == [[1, 2, 3, 4, 255, 255, 255, 255]]


def mixture(**settings: Any) -> Any:
    """vLLM's config of a layer of experts."""
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    defaults: dict[str, Any] = {
        "num_experts": EXPERTS,
        "experts_per_token": 2,
        "hidden_dim": HIDDEN,
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "num_logical_experts": EXPERTS,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.bfloat16,
    }
    return FusedMoEConfig(**defaults | settings)


BITS = {bits: SimpleNamespace(dtype=SimpleNamespace(size_bits=bits)) for bits in (3, 4)}


def refuse(config: Any, weight_key: Any) -> Any:
    raise NotImplementedError("no backend")


def find_none(config: Any, weight_key: Any) -> Any:
    return choice_of_fp8.Fp8MoeBackend.NONE, None


@pytest.mark.parametrize("select", [refuse, find_none])
def test_what_vllm_has_no_kernel_for_is_dequantized(select: Callable[..., Any]) -> None:
    select = experts._last_of_all(select)
    assert select(mixture(), weight_key=BITS[4])[1] is experts.DequantizedExperts


def test_a_kernel_of_vllm_comes_first() -> None:
    select = experts._last_of_all(lambda config, weight_key: ("a backend", "its kernel"))
    assert select(mixture(), weight_key=BITS[4]) == ("a backend", "its kernel")


@pytest.mark.parametrize(
    ("config", "bits"),
    [({}, 3), ({"is_lora_enabled": True}, 4), ({"hidden_dim": 100}, 4)],
    ids=["bits that do not fill words", "adapters", "sizes that no kernel takes"],
)
def test_vllms_word_stands_where_plain_experts_would_not_run(
    config: dict[str, Any], bits: int
) -> None:
    with pytest.raises(NotImplementedError, match="no backend"):
        experts._last_of_all(refuse)(mixture(**config), BITS[bits])
    with pytest.raises(NotImplementedError, match="no kernel"):
        experts._last_of_all(find_none)(mixture(**config), BITS[bits])


def test_applying_again_changes_nothing() -> None:
    selects = [module.__dict__[name] for module, name in SELECTS]
    experts.apply()
    assert [module.__dict__[name] for module, name in SELECTS] == selects


SELECTS = [
    (fp8, "select_fp8_moe_backend"),
    (auto_awq, "select_wna16_moe_backend"),
    (auto_gptq, "select_wna16_moe_backend"),
]


def dequantized(checkpoint: Checkpoint, linear: bool, experts: bool) -> Checkpoint:
    return dataclasses.replace(checkpoint, is_dequantized=linear, are_experts_dequantized=experts)


def test_memory_of_dequantized_experts() -> None:
    def checkpoint(name: str, dtype: str, **settings: Any) -> Checkpoint:
        tensors = {
            f"layers.0.experts.1.up_proj.{name}": Tensor(dtype, (1000,), "", 0, 1000),
            "layers.0.experts.1.up_proj.scales": Tensor("F16", (10,), "", 1000, 20),
        }
        return Checkpoint("", {"quantization_config": settings}, (), tensors)

    groups = {"group_0": {"weights": {"num_bits": 4}}}
    for one, count, packed in (
        (checkpoint("weight", "F8_E4M3", quant_method="fp8"), 1000, 1020),
        (checkpoint("weight", "I8", quant_method="compressed-tensors"), 1000, 1020),
        (checkpoint("weight", "U8", quant_method="bitsandbytes"), 2000, 1020),
        (checkpoint("qweight", "I32", quant_method="awq", bits=4), 2000, 1020),
        # Of groups of 128, whose zero points are the same and not kept.
        (checkpoint("qweight", "I32", quant_method="gptq", bits=8), 1000, 1013),
        (
            checkpoint(
                "weight_packed", "I32", quant_method="compressed-tensors", config_groups=groups
            ),
            2000,
            1020,
        ),
    ):
        assert fit.loaded_bytes(dequantized(one, True, False), {}) == packed
        assert fit.loaded_bytes(dequantized(one, False, True), {}) == 20 + 2 * count
        assert (
            fit.loaded_bytes(dequantized(one, False, True), {"dtype": "float32"}) == 40 + 4 * count
        )


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": "four"}, {"bits": 0}, {"config_groups": [1]}, {"config_groups": {"a": 4}}],
)
def test_packed_weights_of_which_a_config_does_not_tell(settings: dict[str, Any]) -> None:
    tensors = {"layers.0.experts.1.up_proj.qweight": Tensor("I32", (10,), "", 0, 40)}
    checkpoint = Checkpoint("", {"quantization_config": settings}, (), tensors)
    assert fit.loaded_bytes(dequantized(checkpoint, True, True), {}) == 40


@pytest.mark.engine
@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    model = mixtures.make("w4a16", tmp_path).quantized
    running = Running()
    info = running.load(model, max_model_len=256, tensor_parallel_size=2)
    assert info["quantization"] == "compressed-tensors"
    if experts.always_dequantized():
        assert info["quantization_note"].startswith("Quantized experts, computed in bfloat16:")
    assert running.complete("The capital of France is")["text"] == " Paris."
    running.stop()
