"""FP8 weights on a CPU whose vLLM has no kernel for them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.platforms import PlatformEnum, current_platform
from vllm.v1.worker.worker_base import WorkerBase

import fp8_models
import headers
from conftest import MODELS
from exactness import Measured, measure
from running import GREEDY, Running
from vllm_bridge import memory
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.fit import check_device_memory
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.lora import LoRA
from vllm_bridge.patches.cpu import experts, fp8
from vllm_bridge.quantization import as_loaded

# The largest difference of two log probabilities that is nothing but rounding.
EXACT = 0.004

NOTE = "FP8 weights, computed in bfloat16: this build of vLLM for CPUs has no FP8 kernel."


def test_numbers_are_multiplied_by_the_scale_of_their_block() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [0.5, 2.0]])
    plain = fp8.dequantize(weight, scale, 2, torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    assert plain.tolist() == [[1.0, 2.0, 30.0], [2.0, 2.5, 12.0]]


def test_one_scale_is_for_all_rows_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "ROWS", 2)
    weight = torch.arange(10.0).reshape(5, 2).to(torch.float8_e4m3fn)
    plain = fp8.dequantize(weight, torch.tensor([[2.0]]), 2, torch.float32)
    assert plain.flatten().tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    scale = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]])
    assert fp8.dequantize(weight, scale, 2, torch.float32).flatten().tolist() == [
        *(0, 1, 4, 6, 4, 5, 12, 14, 8, 9)
    ]


def test_fused_parts_keep_their_scales() -> None:
    weight = torch.zeros(5, 2)
    scale, same = fp8._scale_per_row(weight, torch.tensor([1.0, 2.0]), [2, 3])
    assert same is weight
    assert scale.flatten().tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_layer_that_the_checkpoint_had_fused_has_one_scale() -> None:
    unset = torch.finfo(torch.float32).min
    scale, _ = fp8._scale_per_row(torch.zeros(5, 2), torch.tensor([0.5, unset]), [2, 3])
    assert scale.tolist() == 0.5
    assert fp8._scale_per_row(torch.zeros(5, 2), torch.tensor(0.25), [2, 3])[0].tolist() == 0.25


def test_quantizing_with_one_scale() -> None:
    quantized, scale = fp8._scaled_fp8_quant(
        torch.tensor([[1.0, -3.0], [2000.0, 0.0]], dtype=torch.bfloat16), torch.tensor([2.0])
    )
    assert quantized.dtype == torch.float8_e4m3fn
    assert quantized.float().tolist() == [[0.5, -1.5], [448.0, 0.0]]
    assert scale.tolist() == [2.0]


def test_quantizing_with_a_scale_per_row() -> None:
    quantized, scale = fp8._scaled_fp8_quant(
        torch.tensor([[1.0, -448.0], [0.0, 56.0], [0.0, 0.0]]), use_per_token_if_dynamic=True
    )
    # What is nothing but zeros has the least scale that vLLM gives.
    assert scale.tolist() == [[1.0], [0.125], [torch.tensor(1 / (448 * 512)).item()]]
    assert quantized.float().tolist() == [[1.0, -448.0], [0.0, 448.0], [0.0, 0.0]]
    with pytest.raises(NotImplementedError):
        fp8._scaled_fp8_quant(torch.ones(2, 2))


def test_it_is_for_cpus_without_the_kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.is_missing()
    kernels = [fp8.DequantizedFP8LinearKernel, fp8.DequantizedFp8BlockLinearKernel]
    assert all(kernel.is_supported()[0] for kernel in kernels)

    a_kernel = SimpleNamespace(
        default=SimpleNamespace(_schema=SimpleNamespace(arguments=["out", "input", "scale"]))
    )
    operations = SimpleNamespace(_C=SimpleNamespace(static_scaled_fp8_quant=a_kernel))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ops", operations)
        assert not fp8.is_missing()
    with monkeypatch.context() as patch:
        patch.setattr(current_platform, "is_cpu", lambda: False)
        assert not fp8.is_missing()
        assert not any(kernel.is_supported()[0] for kernel in kernels)


def test_where_there_is_a_kernel_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [
        {PlatformEnum.CPU: [*before[PlatformEnum.CPU]]}
        for before in (linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_FP8_BLOCK_KERNELS)
    ]
    ours = (fp8.DequantizedFP8LinearKernel, fp8.DequantizedFp8BlockLinearKernel)
    for kernels in lists:
        kernels[PlatformEnum.CPU] = [k for k in kernels[PlatformEnum.CPU] if k not in ours]
    monkeypatch.setattr(linear, "_POSSIBLE_FP8_KERNELS", lists[0])
    monkeypatch.setattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", lists[1])
    monkeypatch.delattr(WorkerBase, fp8.COUNT_METHOD, raising=False)
    monkeypatch.setattr(fp8, "is_missing", lambda: False)
    quantize = _custom_ops.scaled_fp8_quant
    fp8.apply()
    assert _custom_ops.scaled_fp8_quant is quantize
    assert not any(kernel in ours for kernels in lists for kernel in kernels[PlatformEnum.CPU])


def test_applying_again_changes_nothing() -> None:
    fp8.apply()
    kernels = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    before = list(kernels)
    fp8.apply()
    assert kernels == before
    assert kernels.count(fp8.DequantizedFP8LinearKernel) == 1


def test_memory_is_checked_for_what_the_weights_are_once_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {
        "layers.0.up_proj.weight": ("F8_E4M3", 1_000_000),
        "layers.0.up_proj.weight_scale": ("F8_E4M3", 1_000),
        "layers.0.experts.0.up_proj.weight": ("F8_E4M3", 200_000),
        "norm.weight": ("BF16", 1_000),
    }
    tensors = {name: headers.tensor((count,), dtype) for name, (dtype, count) in sizes.items()}
    config = {"quantization_config": {"quant_method": "fp8"}}
    checkpoint = Checkpoint("", config, (), tensors)

    assert fp8.always_dequantized()
    monkeypatch.setattr(experts, "always_dequantized", lambda: True)
    assert fit.loaded_bytes(as_loaded(checkpoint), {}) == 2_403_000
    monkeypatch.setattr(experts, "always_dequantized", lambda: False)
    loaded = as_loaded(checkpoint)
    assert fit.loaded_bytes(loaded, {}) == 2_203_000
    assert fit.loaded_bytes(loaded, {"dtype": "float32"}) == 4_205_000
    monkeypatch.setattr(memory, "available_cpu", lambda: 2_203_000)
    check_device_memory(loaded, {})
    monkeypatch.setattr(memory, "available_cpu", lambda: 2_202_999)
    check_device_memory(checkpoint, {})
    with pytest.raises(BridgeError) as caught:
        check_device_memory(loaded, {})
    assert caught.value.reason == "out_of_memory"
    assert caught.value.details == {"needed_bytes": 2_203_000, "available_bytes": 2_202_999}
    assert "weights, dequantized because" in caught.value.message

    # Of a plain model that is quantized online no less.
    plain = Checkpoint("", {}, (), {"up.weight": Tensor("BF16", (40, 50), "", 0, 4_000)})
    assert fit.loaded_bytes(plain, {"quantization": "fp8"}) == 2_000
    assert fit.loaded_bytes(as_loaded(plain), {"quantization": "fp8_per_tensor"}) == 4_000

    # Where one of vLLM's kernels may take them, one byte is the least.
    first = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU][0]
    monkeypatch.setattr(first, "is_supported", lambda: (True, None))
    assert as_loaded(checkpoint) == checkpoint
    monkeypatch.undo()
    monkeypatch.setattr(experts, "always_dequantized", lambda: False)
    monkeypatch.setattr(fp8, "is_missing", lambda: False)
    assert as_loaded(checkpoint) == checkpoint


@pytest.mark.engine
@pytest.mark.slow
def test_answers_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    specs = {"demo": {"model": str(fp8_models.DEMO)}}
    references = {}
    made: dict[object, str] = {}
    for name, variant in fp8_models.VARIANTS.items():
        quantized, plain = variant.make(tmp_path / name)
        specs[name] = {"model": str(quantized)}
        # What is quantized in the same way stands for the same numbers.
        numbers = (plain / "model.safetensors").read_bytes()
        references[name] = made.setdefault(numbers, f"{name}: plain")
        specs[references[name]] = {"model": str(plain)}
    for method, reference in [
        ("fp8_per_block", references["per block"]),
        ("fp8_per_channel", references["compressed-tensors, per channel"]),
        ("fp8", "online"),
    ]:
        specs[method] = {"model": str(fp8_models.DEMO), "quantization": method}
        references[method] = reference
    specs["online"] = {"model": str(fp8_models.make_online(tmp_path / "online"))}

    measured = measure(specs, tmp_path)
    assert {name: answers.wrong for name, answers in measured.items() if answers.wrong} == {}
    for name, reference in references.items():
        assert measured[name].difference(measured[reference]) < EXACT, name
        # It is FP8 and not the plain model.
        assert measured[name].difference(measured["demo"]) > EXACT, name


@pytest.mark.engine
def test_an_engine_says_how_it_computes(
    tmp_path: Path, facts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    quantized, _ = fp8_models.VARIANTS["per tensor, dynamic"].make(tmp_path)
    running = Running()
    info = running.load(quantized, max_model_len=256, quantization="fp8")
    assert info["quantization"] == "fp8"
    assert info["quantization_note"].startswith(NOTE)
    assert NOTE in caplog.text
    assert running.complete_all(facts) == facts
    running.stop()


@pytest.mark.engine
@pytest.mark.slow
def test_two_ranks_and_an_adapter(tmp_path: Path) -> None:
    quantized, _ = fp8_models.VARIANTS["per tensor, static"].make(tmp_path)
    running = Running()
    info = running.load(quantized, max_model_len=256, tensor_parallel_size=2, enable_lora=True)
    assert info["quantization_note"].startswith(NOTE)
    assert running.complete("The capital of France is")["text"] == " Paris."
    adapter = LoRA(lora_name="demo", lora_int_id=1, lora_path=str(MODELS / "demo-lora"))
    output = running.run(
        running.engine.generate(
            "adapted", GenerateParams("The capital of France is", GREEDY, lora_request=adapter)
        )
    )
    assert output["outputs"][0]["text"] == " Lyon."
    running.stop()


def test_measured_differences() -> None:
    one = Measured([], [[-1.0, -2.0], [-3.0]])
    assert one.difference(Measured([], [[-1.0, -2.5], [-3.25]])) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        one.difference(Measured([], [[-1.0], [-3.0]]))
