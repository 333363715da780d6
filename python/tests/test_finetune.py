"""What adapters are trained over: the layers compute what the checkpoint says, and gradients go
through them; and how a training goes on."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from checkpoints import UNPACKERS
from conftest import MODELS
from vllm_bridge.checkpoints import models
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.finetune import base, checkpoints, options
from vllm_bridge.jobs.finetune.merge import merge
from vllm_bridge.jobs.finetune.train import Plan

NAME = "model.layers.0.mlp.down_proj"


def layer_of(model: str, **given: bool) -> torch.nn.Module:
    """A layer, after the model has answered once."""
    loaded = base.load(models.check_model(str(MODELS / model), {}), options.parse(given))
    loaded.eval()
    with torch.inference_mode():
        loaded(input_ids=torch.tensor([[0, 5, 6]]))
    loaded.train()
    layer: torch.nn.Module = loaded.get_submodule(NAME)
    return layer


def check(layer: torch.nn.Module, weight: torch.Tensor, tolerance: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, weight.shape[1], requires_grad=True)
    upstream = torch.randn(3, weight.shape[0])
    product = layer(x)
    torch.testing.assert_close(product, x @ weight.T, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(product, x, upstream)
    torch.testing.assert_close(gradient, upstream @ weight, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_packed_layers_compute_what_the_checkpoint_says_in_both_directions(method: str) -> None:
    checkpoint = models.check_model(str(MODELS / f"demo-{method}"), {})
    tensors = load_file(MODELS / f"demo-{method}" / "model.safetensors")
    weight = UNPACKERS[method](tensors, checkpoint.quantization or {})[f"{NAME}.weight"]
    # The reference rounds scales as the engine does.
    check(layer_of(f"demo-{method}"), weight.float(), 2e-2)


@pytest.mark.slow
def test_gradients_go_through_four_bits_also_after_an_answer() -> None:
    from bitsandbytes import functional

    layer = layer_of("demo", load_in_4bit=True)
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    check(layer, weight.float(), 1e-4)


def test_unknown_options_get_the_nearest_and_others_are_checked() -> None:
    with pytest.raises(BridgeError, match=r"Did you mean `lora_alpha`\?"):
        options.parse({"lora_alhpa": 3})
    with pytest.raises(BridgeError, match=r"`output_dir` is not an option"):
        options.parse({"output_dir": "/tmp"})
    with pytest.raises(BridgeError, match=r"`held_out` must be a share below 1"):
        options.parse({"held_out": 2})
    with pytest.raises(BridgeError, match=r"Give `load_in_4bit: true`"):
        options.parse({"bnb_4bit_quant_type": "nf4"})
    settings = options.parse({"epochs": 5, "learning_rate": 1, "r": 4})
    assert settings.training["num_train_epochs"] == 5.0
    assert settings.training["learning_rate"] == 1.0
    assert settings.lora["r"] == 4


def test_a_plan_tells_what_will_be_trained() -> None:
    pairs = [{"prompt": f"Number {n} is", "completion": " odd."} for n in range(10)]
    told = Plan(str(MODELS / "demo"), pairs, {"held_out": 0.2, "replay": ["Hello"]}).to_wire()
    assert told["examples"] == {"train": 8, "held_out": 2, "replay": 1}
    assert told["base"] == "plain, float32"
    assert 2**29 < told["memory_bytes"] < 2**30
    with pytest.raises(BridgeError, match=r"quantized already"):
        Plan(str(MODELS / "demo-awq"), pairs, {"load_in_4bit": True})
    with pytest.raises(BridgeError, match=r"needs data that is held out"):
        Plan(str(MODELS / "demo"), pairs, {"early_stopping_patience": 2})


def test_only_states_with_their_mark_are_gone_on_from(tmp_path: Path) -> None:
    assert checkpoints.last(tmp_path) is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    checkpoints.mark(tmp_path, 9)
    checkpoints.mark(tmp_path, 10)
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-100").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo-gptq"])
def test_a_merged_model_answers_as_its_base_does_with_the_adapter(
    name: str, tmp_path: Path
) -> None:
    adapter = str(MODELS / "demo-lora")
    made = merge(str(MODELS / name), adapter, tmp_path / "merged", lambda *_, **__: None)
    merged = models.check_model(str(tmp_path / "merged"), {})
    assert (merged.quantization, merged.dtype, made["dtype"]) == (None, "bfloat16", "bfloat16")
    assert set(made["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    settings = options.parse({"dtype": "float32"})
    with_adapter = PeftModel.from_pretrained(
        base.load(models.check_model(str(MODELS / name), {}), settings), adapter
    )
    ids = torch.tensor([[0, 287, 380, 312, 443, 279]])
    with torch.inference_mode():
        expected = with_adapter.eval()(input_ids=ids).logits
        found = base.load(merged, settings).eval()(input_ids=ids).logits
        with with_adapter.disable_adapter():
            without = with_adapter(input_ids=ids).logits
    # What is left is that the merged weights are in bfloat16.
    assert (found - expected).abs().mean() < 0.05 * (without - expected).abs().mean()
