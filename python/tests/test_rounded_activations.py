"""How users say whether products with packed weights round activations, and where that gets to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from vllm_bridge import quantization
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.engine import config
from vllm_bridge.errors import BridgeError
from vllm_bridge.patches.cpu.packed_linear import PackedLinearKernel
from vllm_bridge.quantization import activations, online
from vllm_bridge.quantization.packed import grouped, native

W4A16 = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}
W8A8 = {
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}},
    }
}
# What checkpoints say of themselves.
TAKING: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq"},
    "gptq": {"quant_method": "gptq"},
    "auto-round": {"quant_method": "auto-round"},
    "W4A16": {"quant_method": "compressed-tensors", **W4A16},
}
OTHERS: dict[str, dict[str, Any] | None] = {
    "W8A8": {"quant_method": "compressed-tensors", **W8A8},
    "fp8": {"quant_method": "fp8"},
    "plain": None,
}
INT8 = {"quantization_config": {"activations": "int8"}}


def prepared(said: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """The arguments of the engine that vLLM gets."""
    checkpoint = Checkpoint(config={} if said is None else {"quantization_config": said})
    config._prepared(SimpleNamespace(checkpoint=checkpoint, model="."), arguments)  # type: ignore[arg-type]
    online.check_settings(checkpoint, arguments)
    return arguments


@pytest.mark.parametrize("said", TAKING.values(), ids=TAKING)
@pytest.mark.parametrize(("value", "are_rounded"), [("int8", True), ("exact", False)])
def test_what_the_user_says_is_in_vllms_config(
    said: dict[str, Any], value: str, are_rounded: bool
) -> None:
    arguments = prepared(
        said,
        quantization_config={"activations": value, "ignore": ["lm_head"]},
        additional_config={"theirs": 1},
    )
    # What else there is stays what it is.
    assert arguments["quantization_config"] == {"ignore": ["lm_head"]}
    assert arguments["additional_config"]["theirs"] == 1
    assert len(arguments["additional_config"]) == 2
    assert activations.are_rounded(SimpleNamespace(**arguments)) is are_rounded


@pytest.mark.parametrize("said", TAKING.values(), ids=TAKING)
def test_nothing_is_rounded_unless_it_is_asked_for(said: dict[str, Any]) -> None:
    given: dict[str, Any] = {"quantization_config": {"ignore": []}}
    assert prepared(said, **given) == given
    assert not activations.are_rounded(SimpleNamespace(additional_config={}))


def test_other_values_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(BridgeError) as caught:
        prepared(TAKING["awq"], quantization_config={"activations": "int4"})
    assert caught.value.reason == "invalid_option"
    assert "'int4'. Give `activations` as one of 'int8', 'exact'." in caught.value.message


@pytest.mark.parametrize("said", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("value", activations.VALUES)
def test_models_whose_products_do_not_round_take_no_such_setting(
    said: dict[str, Any] | None, value: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        prepared(said, quantization_config={"activations": value})
    assert caught.value.reason == "invalid_option"
    assert (
        "`activations` is for GGUF, and for AWQ, compressed-tensors, GPTQ, AutoRound whose "
        "activations have 16 bits. Leave it out."
    ) in caught.value.message


def test_on_gpus_activations_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    with pytest.raises(BridgeError) as caught:
        prepared(TAKING["gptq"], **INT8)
    assert caught.value.reason == "invalid_option"
    assert "on CPUs only" in caught.value.message
    exact = prepared(TAKING["gptq"], quantization_config={"activations": "exact"})
    assert not activations.are_rounded(SimpleNamespace(**exact))


@pytest.mark.parametrize("asked", [False, True])
def test_layers_ask_for_what_the_config_says(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def matmul(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return x[:, :64]

    monkeypatch.setattr(grouped, "matmul", matmul)
    layer = torch.nn.Module()
    layer.qweight = torch.nn.Parameter(torch.zeros(16, 64, dtype=torch.int32), requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.ones(1, 64).bfloat16(), requires_grad=False)
    layer.qweight.output_dim = layer.scales.output_dim = 1
    of_layer = MPLinearLayerConfig(
        full_weight_shape=(128, 64),
        partition_weight_shape=(128, 64),
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=128,
        zero_points=False,
    )
    given = prepared(TAKING["gptq"], **(INT8 if asked else {}))
    more = given.get("additional_config") or {}
    with set_current_vllm_config(VllmConfig(additional_config=more)):
        kernel = PackedLinearKernel(of_layer, "qweight", "scales")
        kernel.process_weights_after_loading(layer)
        kernel.apply_weights(layer, torch.zeros(1, 128).bfloat16())
    ((_, _, _, bits, rounded),) = calls
    assert (bits, rounded) == (4, asked)


def test_users_are_told_whether_activations_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(kernel: str, arguments: dict[str, Any]) -> str | None:
        return quantization._of_activations(
            kernel,
            SimpleNamespace(
                additional_config=arguments.get("additional_config") or {},
                model_config=SimpleNamespace(dtype=torch.bfloat16),
            ),
        )

    asked = prepared(TAKING["awq"], **INT8)
    assert note("PackedLinearKernel", prepared(TAKING["awq"])) is None
    for ours in ("PackedLinearKernel", native.kernel()):
        assert note(ours, asked) == native.rounding_note(torch.bfloat16)
    others = "Activations are not rounded to 8 bits: another kernel computes the layers."
    assert note("CPUWNA16LinearKernel", asked) == others
