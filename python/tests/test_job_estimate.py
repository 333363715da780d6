"""What jobs are foreseen to take, against what they took: with the demo model, and with larger
ones, as bench/job_sizes.json has it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import headers
from vllm_bridge import versions
from vllm_bridge.checkpoints import models
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import foreseen, measure
from vllm_bridge.jobs.foreseen import Foreseen, Machine
from vllm_bridge.jobs.quantize import estimate
from vllm_bridge.tools import jobs as tools

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "priv" / "models" / "demo")

# The bytes of outputs that producers made of the demo model.
MADE: list[tuple[str, dict[str, Any], int]] = [
    ("gguf", {"ftype": "F16"}, 8172352),
    ("gguf", {"ftype": "Q4_K_M"}, 2483520),
    ("gguf", {"ftype": "Q2_K"}, 1647936),
    ("gguf", {"ftype": "Q8_0"}, 4363072),
    ("gptq", {"bits": 4, "group_size": 128}, 3023216),
    ("gptq", {"bits": 2, "group_size": 32, "sym": False}, 2318204),
    ("gptq", {"bits": 8, "group_size": -1}, 4760448),
    ("awq", {"bits": 4, "group_size": 64}, 3038746),
    ("compressed-tensors", {"scheme": "W4A16", "ignore": ["lm_head"]}, 2955354),
    ("compressed-tensors", {"scheme": "W4A16_ASYM", "group_size": 64}, 3043062),
    ("compressed-tensors", {"scheme": "W8A8", "ignore": ["lm_head", "re:.*down_proj"]}, 5472351),
    ("compressed-tensors", {"scheme": "FP8_DYNAMIC"}, 4689627),
    ("compressed-tensors", {"scheme": "FP8_BLOCK"}, 4665442),
]


@pytest.mark.parametrize(("form", "options", "size"), MADE)
def test_files_are_as_large_as_foreseen(form: str, options: dict[str, Any], size: int) -> None:
    (seen,) = estimate.of(models.check_model(DEMO, {}), DEMO, [(form, options, 1379)], Machine())
    assert seen.bytes == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("form", "options", "kl"),
    [
        ("gguf", {"ftype": "Q4_K_M"}, 0.031273),
        ("gguf", {"ftype": "TQ1_0"}, None),
        ("gptq", {"bits": 8}, 0.001355),
        ("awq", {}, 0.071940),
        ("hqq", {"nbits": 1}, None),
        ("bitsandbytes", {"load_in_8bit": True}, 0.001355),
        ("bitsandbytes", {"bnb_4bit_quant_type": "nf4"}, 0.071940),
        ("compressed-tensors", {"scheme": "W4A16_ASYM"}, 0.071940),
        ("compressed-tensors", {"scheme": "FP8_DYNAMIC"}, 0.020),
        ("compressed-tensors", {"scheme": "NVFP4"}, None),
        ("torchao", {"quant_type": "Int8DynamicActivationInt8WeightConfig"}, 0.020),
    ],
)
def test_what_is_usually_lost_is_known_before(
    form: str, options: dict[str, Any], kl: float | None
) -> None:
    assert estimate.usual_kl(form, options) == kl


def test_what_was_foreseen_is_what_jobs_took() -> None:
    recorded = json.loads((ROOT / "bench" / "job_sizes.json").read_text())
    demo = models.check_model(DEMO, {})
    known = {
        name: demo if sizes is None else headers.plain(headers.config(0, 0, 0, 0) | sizes, "BF16")
        for name, sizes in recorded["models"].items()
    }
    far = []
    for run in recorded["runs"]:
        asked = [(run["format"], run["options"], run["tokens"])]
        (seen,) = estimate.of(known[run["model"]], run["model"], asked, Machine())
        least, most = (60 * minutes for minutes in seen.minutes)
        if (
            abs(seen.bytes / run["bytes"] - 1) > 0.02
            or abs(seen.memory / run["memory"] - 1) > 0.2
            or not least <= run["cpu_seconds"] <= most
        ):
            far.append((run["model"], run["label"], seen))
    assert far == []
    assert len(recorded["runs"]) > 30
    # With the verification of the model and of each output.
    for job in recorded["jobs"]:
        checkpoint = known[job["model"]]
        each = estimate.of(checkpoint, job["model"], job["outputs"], Machine())
        measured = estimate.verification(checkpoint, len(each), Machine())
        least, most = (60 * minutes for minutes in foreseen.together(each, measured).minutes)
        assert least <= job["cpu_seconds"] <= most, (job["labels"], least, most)
    assert len(recorded["jobs"]) > 2


def test_a_gguf_file_is_made_of_one_in_16_bits_and_that_takes_room_too() -> None:
    (seen,) = estimate.of(
        models.check_model(DEMO, {}), DEMO, [("gguf", {"ftype": "Q4_K_M"}, 0)], Machine()
    )
    assert seen.disk - seen.bytes == pytest.approx(8.1e6, rel=0.02)
    (plain,) = estimate.of(
        models.check_model(DEMO, {}), DEMO, [("gguf", {"ftype": "F16"}, 0)], Machine()
    )
    assert plain.disk == plain.bytes


def test_to_measure_a_model_takes_an_engine_and_on_a_processor_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tools.PlanQuantizeParams(DEMO, [("gguf", {"ftype": "Q4_K_M"}, 0)])
    told = asyncio.run(tools.plan_quantize(None, asked))  # type: ignore[arg-type]
    (output,) = told["outputs"]
    engine = measure.memory(0)
    assert 2**30 < engine < 2**31
    assert output["verification"] == engine + output["bytes"]
    files = sum(file.stat().st_size for file in Path(DEMO).glob("*.safetensors"))
    assert told["verification"] == pytest.approx(engine + files, abs=files / 50)
    monkeypatch.setattr(versions, "is_cpu_build", lambda: False)
    assert measure.memory(10**12) == engine


def test_the_time_of_all_together_has_their_verification_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreseen, "here", Machine)
    outputs: list[tuple[str, dict[str, Any], int]] = [
        ("gguf", {"ftype": "Q4_K_M"}, 0),
        ("gguf", {"ftype": "Q8_0"}, 0),
    ]

    def told(verify: bool) -> tuple[float, float]:
        asked = tools.PlanQuantizeParams(DEMO, outputs, verify=verify)
        plan = asyncio.run(tools.plan_quantize(None, asked))  # type: ignore[arg-type]
        made = sum(one["minutes"][0] for one in plan["outputs"])
        least: float = plan["together"]["minutes"][0]
        return made, least

    made, least = told(verify=False)
    assert least == pytest.approx(made, abs=0.02)
    made, least = told(verify=True)
    # The model itself and two outputs: vLLM is imported three times.
    assert least > made + 3 * 0.1


def test_outputs_are_made_one_after_the_other() -> None:
    asked: list[tuple[str, dict[str, Any], int]] = [
        ("gguf", {"ftype": "Q4_K_M"}, 0),
        ("awq", {"bits": 4, "group_size": 128}, 1379),
    ]
    one, other = estimate.of(models.check_model(DEMO, {}), DEMO, asked, Machine())
    both = foreseen.together([one, other])
    assert both.bytes == one.bytes + other.bytes
    assert both.disk == both.bytes + one.disk - one.bytes
    assert both.memory == max(one.memory, other.memory)
    assert both.minutes[0] == one.minutes[0] + other.minutes[0]


def test_what_is_quantized_already_is_refused() -> None:
    quantized = str(ROOT / "test" / "checkpoints" / "gptq-w3")
    with pytest.raises(BridgeError) as caught:
        estimate.of(models.check_model(quantized, {}), quantized, [("awq", {}, 0)], Machine())
    assert caught.value.reason == "unsupported"


def test_time_is_a_range_from_a_machine_of_ones_own_to_one_as_busy_as_now() -> None:
    idle = Machine(cores=2).minutes(serial=60.0, parallel=120.0)
    assert idle == pytest.approx((2 * 0.6, 3 * 2.0))
    busy = Machine(speed=(2.0, 0.5), cores=2, share=0.25).minutes(serial=60.0, parallel=120.0)
    assert busy == pytest.approx((2 * 0.6 / 2, 3 * 2.0 / 0.5 / 0.25))


def test_a_job_gets_what_others_leave_of_the_machine() -> None:
    assert foreseen.share(cores=2, load=0.5, nice=0) == 1.0
    assert foreseen.share(cores=2, load=3.0, nice=0) == 0.5
    assert foreseen.share(cores=2, load=1.5, nice=10) == 0.5
    # One that stands back by ten steps weighs a tenth of another.
    assert foreseen.share(cores=2, load=4.0, nice=10) == pytest.approx(0.0523, rel=0.01)
    here = foreseen.here()
    best, worst = here.speed
    assert best >= worst > 0
    assert here.cores >= 1
    assert 0 < here.share <= 1


def test_memory_goes_by_what_is_held_at_once_and_time_by_the_texts() -> None:
    def seen(form: str, tokens: int = 0, **options: Any) -> Foreseen:
        return estimate.of(
            models.check_model(DEMO, {}), DEMO, [(form, options, tokens)], Machine()
        )[0]

    few, many = (seen("gptq", tokens, bits=4, group_size=128) for tokens in (1_000, 100_000))
    assert few.bytes == many.bytes
    assert few.memory < many.memory
    assert few.minutes[0] < many.minutes[0]
    # Types of GGUF by how long they are looked for.
    plain, k, iq = (seen("gguf", ftype=name).minutes[1] for name in ("Q8_0", "Q4_K_M", "IQ3_S"))
    assert plain < k < iq
    # FP8 whose scales need texts is still rounded, not looked for.
    static = seen("compressed-tensors", 1_000, scheme="FP8")
    assert static.minutes[1] < seen("compressed-tensors", 1_000, scheme="W4A16").minutes[1]
