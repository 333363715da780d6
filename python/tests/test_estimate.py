"""What an engine takes on its devices, and what would make it fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import headers
import hub_models
from headers import LLAMA_2, LLAMA_3_8B, MIXTRAL
from hub_server import Hub
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.memory import GIB
from vllm_bridge.sizing import adapters, parts
from vllm_bridge.sizing.devices import named
from vllm_bridge.sizing.estimate import estimate

DEMO = str(checkpoints.DEMO)

Estimate = dict[str, Any]


def planned(checkpoint: Checkpoint, **options: Any) -> Plan:
    return Plan("model", options, checkpoint, checkpoint.quant_method, None, "float16", 0)


def of(
    checkpoint: Checkpoint, devices: str | list[str], concurrency: int | None = None, **options: Any
) -> Estimate:
    return estimate(planned(checkpoint, **options), named(devices), {"concurrency": concurrency})


def remedies(found: Estimate) -> dict[str, Any]:
    """By what they change: an option, or the format."""
    return {
        next(iter(one["options"]), "format" if one["format"] else "concurrency"): one
        for one in found["remedies"]
    }


# -- the well-known table


def test_70b_in_awq_on_two_devices_of_24_gb() -> None:
    """https://docs.vllm.ai has no table of its own; that this runs is what its users say, with
    `gpu_memory_utilization` at 0.95."""
    awq = headers.in_awq(LLAMA_2["70B"])
    found = of(awq, ["24GiB", "24GiB"], gpu_memory_utilization=0.95)
    assert found["fits"]
    assert found["tensor_parallel_size"] == 2
    assert found["weights"]["memory"] == pytest.approx(36.6e9, rel=0.01)
    for device in found["devices"]:
        assert device["weights"] == pytest.approx(18.3e9, rel=0.01)
        assert device["budget"] == int(24 * GIB * 0.95)
        assert device["fits"]
    assert 16_384 < found["kv_cache"]["tokens"] < 65_536
    assert not of(awq, "24GiB")["fits"]
    assert not of(headers.plain(LLAMA_2["70B"]), "2x 24GiB")["fits"]


@pytest.mark.parametrize(
    ("size", "device", "fits"),
    [
        ("7B", "24GiB", True),
        ("7B", "16GiB", False),
        ("13B", "24GiB", False),
        ("13B", "40GiB", True),
        ("70B", "80GiB", False),
        ("70B", "2x 80GiB", True),
    ],
)
def test_models_in_16_bits_fit_where_everybody_knows_it(size: str, device: str, fits: bool) -> None:
    assert of(headers.plain(LLAMA_2[size]), device)["fits"] is fits


# -- what is in it


def test_all_that_a_device_holds_is_told() -> None:
    found = of(headers.plain(LLAMA_3_8B), "RTX 4090", max_model_len=8192)
    (device,) = found["devices"]
    parts = ("weights", "adapters", "draft", "activations", "framework", "kv_cache", "left")
    assert device["budget"] == sum(device[part] for part in parts) == int(24 * GIB * 0.92)
    assert device["weights"] == found["weights"]["memory"] == 16_060_522_496
    assert device["name"] == "RTX 4090 24GB"
    assert found["kv_cache"]["bytes_per_token"] == 2 * 2 * 32 * 8 * 128
    # Blocks of 16 tokens, and the one that vLLM keeps for itself.
    assert found["kv_cache"]["bytes"] == (8192 + 16) * 131_072
    assert found["kv_cache"]["available"] == device["kv_cache"] + device["left"]
    assert found["max_concurrency"] == found["kv_cache"]["tokens"] // 8192 == 6
    assert found["remedies"] == []
    json.dumps(found)


def test_the_example_of_the_guide() -> None:
    found = of(headers.plain(LLAMA_3_8B), "RTX 4090", max_model_len=8192)
    shown = {
        "fits?": "true",
        "weights.memory": f"{found['weights']['memory']:_}",
        "kv_cache.tokens": f"{found['kv_cache']['tokens']:_}",
        "max_concurrency": str(found["max_concurrency"]),
        "longest_context": f"{found['longest_context']:_}",
        "tokens_per_second": str(found["tokens_per_second"]),
    }
    guide = (checkpoints.ROOT / "guides" / "sizing.md").read_text(encoding="utf-8")
    for name, value in shown.items():
        assert f"{'estimate.' + name:<31} #=> {value}" in guide
    assert found["fits"]


def test_the_context_is_the_models_unless_another_is_asked_for() -> None:
    whole = of(headers.plain(LLAMA_3_8B), "80GiB")
    assert whole["max_model_len"] == whole["longest_context"] == 131_072
    assert of(headers.plain(LLAMA_3_8B), "80GiB", max_model_len=100)["max_model_len"] == 100


def test_what_is_asked_for_at_a_time_must_fit() -> None:
    plain = headers.plain(LLAMA_3_8B)
    one = of(plain, "24GiB", max_model_len=8192)
    assert one["fits"]
    many = of(plain, "24GiB", 7, max_model_len=8192)
    assert not many["fits"]
    assert of(plain, "24GiB", 6, max_model_len=8192)["fits"]
    # So long can seven be.
    longest = many["longest_context"]
    assert 4096 < longest < 8192
    assert of(plain, "24GiB", 7, max_model_len=longest)["fits"]
    assert not of(plain, "24GiB", 7, max_model_len=longest + 16)["fits"]


def test_a_cache_of_8_bits_takes_half() -> None:
    plain = headers.plain(LLAMA_3_8B)
    half = of(plain, "24GiB", kv_cache_dtype="fp8")["kv_cache"]
    whole = of(plain, "24GiB")["kv_cache"]
    assert half["bytes_per_token"] * 2 == whole["bytes_per_token"]
    assert half["tokens"] == pytest.approx(2 * whole["tokens"], rel=0.001)
    assert (half["dtype"], whole["dtype"]) == ("fp8", "auto")


def test_a_cache_of_a_size_that_was_asked_for() -> None:
    found = of(headers.plain(LLAMA_3_8B), "24GiB", kv_cache_memory_bytes=GIB, max_model_len=4096)
    assert found["kv_cache"]["available"] == GIB
    assert found["kv_cache"]["tokens"] == 8192
    assert found["fits"]


def test_adapters_take_room_when_the_engine_starts() -> None:
    plain = headers.plain(LLAMA_2["7B"])
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 64}
    (device,) = of(plain, "24GiB", **options)["devices"]
    # Of q, k, v, o, gate, up and down, embeddings and the output layer: inputs and outputs.
    numbers = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + 2 * (4096 + 32000)
    assert device["adapters"] == 4 * 64 * 2 * numbers
    assert of(plain, "24GiB")["devices"][0]["adapters"] == 0
    halves = adapters.bytes_per_rank(LLAMA_2["7B"], options | {"tensor_parallel_size": 2})
    assert device["adapters"] / 2 < halves < device["adapters"]


def test_weights_may_be_in_the_machines_memory() -> None:
    awq = headers.in_awq(LLAMA_2["70B"])
    (device,) = of(awq, "24GiB", cpu_offload_gb=20)["devices"]
    assert device["weights"] == 36_613_668_864 - 20 * GIB


def test_a_draft_takes_weights_and_a_cache_of_its_own() -> None:
    plain = headers.plain(LLAMA_3_8B)
    alone = of(plain, "24GiB", max_model_len=4096)
    found = of(plain, "24GiB", max_model_len=4096, speculative_config={"model": DEMO})
    (device,) = found["devices"]
    assert device["draft"] == 8_133_120
    assert found["kv_cache"]["bytes_per_token"] == alone["kv_cache"]["bytes_per_token"] + 3072
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    assert of(plain, "24GiB", max_model_len=4096, speculative_config=ngram) == alone


# -- several devices


def test_several_devices_are_used_all() -> None:
    plain = headers.plain(LLAMA_3_8B)
    found = of(plain, ["24GiB", "16GiB"], max_model_len=8192)
    assert [device["name"] for device in found["devices"]] == ["24GiB", "16GiB"]
    # The cache has as many blocks as the smaller one has room for.
    small, large = sorted(found["devices"], key=lambda device: int(device["memory"]))
    assert found["kv_cache"]["available"] == small["kv_cache"] + small["left"]
    assert large["left"] == small["left"]
    three = of(plain, "3x 24GiB")  # 32 heads cannot be divided by three
    assert (three["tensor_parallel_size"], three["pipeline_parallel_size"]) == (1, 3)


def test_of_one_device_there_are_as_many_as_are_asked_for() -> None:
    awq = headers.in_awq(LLAMA_2["70B"])
    found = of(awq, "24GiB", tensor_parallel_size=2, pipeline_parallel_size=2)
    assert len(found["devices"]) == 4
    first, _, third, _ = found["devices"]
    assert first["weights"] != third["weights"]
    apart = of(headers.plain(MIXTRAL), "80GiB", data_parallel_size=2)
    assert len(apart["devices"]) == 2
    assert apart["devices"][0]["weights"] < 50e9


def test_more_ranks_than_devices() -> None:
    with pytest.raises(BridgeError) as error:
        of(headers.plain(LLAMA_2["7B"]), "2x 24GiB", tensor_parallel_size=4)
    assert error.value.reason == "invalid_option"
    assert "takes 4 devices, and 2 are given" in error.value.message


def test_ranks_share_a_processor() -> None:
    plain = headers.plain(LLAMA_2["7B"])
    one = of(plain, "cpu 64GiB 80GB/s")
    two = of(plain, "cpu 64GiB 80GB/s", tensor_parallel_size=2)
    assert one["devices"][0]["budget"] == 64 * GIB
    assert [device["budget"] for device in two["devices"]] == [32 * GIB] * 2
    assert one["tokens_per_second"] == pytest.approx(two["tokens_per_second"], rel=0.01)


# -- what would make it fit


def test_each_remedy_makes_it_fit() -> None:
    plain = headers.plain(LLAMA_3_8B)
    found = of(plain, "RTX 4090", max_model_len=60_000)
    assert not found["fits"]
    by_change = remedies(found)
    assert {"kv_cache_dtype", "max_model_len", "tensor_parallel_size", "format"} <= set(by_change)
    for one in found["remedies"]:
        if one["format"] is None and one["devices"] is None:
            options = {"max_model_len": 60_000} | one["options"]
            assert of(plain, "RTX 4090", **options)["fits"], one["text"]
    more = by_change["tensor_parallel_size"]
    assert more["devices"] == 2
    assert of(plain, "2x RTX 4090", max_model_len=60_000)["fits"]
    formats = {one["name"]: one for one in found["formats"]}
    assert formats[by_change["format"]["format"]]["fits"]


def test_a_remedy_that_is_not_enough_is_none() -> None:
    found = of(headers.plain(LLAMA_2["70B"]), "16GiB")
    # Neither is a cache of 8 bits enough nor a shorter context nor one of the formats.
    assert set(remedies(found)) == {"tensor_parallel_size"}
    assert remedies(found)["tensor_parallel_size"]["devices"] == 16
    assert found["longest_context"] == found["max_concurrency"] == found["kv_cache"]["tokens"] == 0


def test_more_devices_with_a_shorter_context_where_nothing_is_enough_by_itself() -> None:
    long = headers.plain(LLAMA_2["70B"] | {"max_position_embeddings": 10_000_000})
    (remedy,) = of(long, "24GiB")["remedies"]
    assert remedy["devices"] == remedy["options"]["tensor_parallel_size"] == 8
    assert 4096 < remedy["options"]["max_model_len"] < 1_000_000
    assert of(long, "8x 24GiB", max_model_len=remedy["options"]["max_model_len"])["fits"]


def test_fewer_at_a_time() -> None:
    found = of(headers.plain(LLAMA_3_8B), "24GiB", 20, max_model_len=8192)
    assert remedies(found)["concurrency"]["text"] == "6 requests of this length at a time, not 20."


def test_a_model_that_is_quantized_once_it_is_loaded_must_be_loaded_first() -> None:
    plain = headers.plain(LLAMA_2["13B"])
    assert of(plain, "24GiB", quantization="bitsandbytes")["fits"]
    found = of(plain, "24GiB", quantization="torchao")
    assert found["weights"]["memory"] < 14e9
    assert found["weights"]["peak"] > 24 * GIB
    assert not found["fits"]


def test_formats_are_told_of_plain_models() -> None:
    formats = {one["name"]: one for one in of(headers.plain(LLAMA_2["13B"]), "16GiB")["formats"]}
    assert formats["awq (4 bits)"]["fits"]
    assert not formats["bfloat16"]["fits"]
    assert of(headers.in_awq(LLAMA_2["13B"]), "16GiB")["formats"] == []


# -- speed


def test_the_bandwidth_sets_a_limit() -> None:
    plain = headers.plain(LLAMA_2["7B"])
    read = 13_476_831_232 - 2 * 32000 * 4096
    limit = of(plain, "RTX 4090")["tokens_per_second"]
    assert limit == pytest.approx(1008e9 / read, rel=0.001)
    assert of(plain, "2x RTX 4090")["tokens_per_second"] == pytest.approx(2 * limit, rel=0.01)
    # Stages come one after another.
    stages = of(plain, "RTX 4090", pipeline_parallel_size=2)["tokens_per_second"]
    assert stages == pytest.approx(limit, rel=0.001)
    assert of(plain, "24GiB")["tokens_per_second"] is None
    # Of a mixture two experts of eight are read.
    mixture = of(headers.plain(MIXTRAL), "2x H100")["tokens_per_second"]
    assert mixture == pytest.approx(2 * 3350e9 / 25.5e9, rel=0.01)


# -- models


def test_the_demo_model(tmp_path: Path) -> None:
    found = estimate(plan(DEMO, {}), named("cpu 8GiB"))
    assert found["fits"]
    assert found["model"] == DEMO
    assert found["weights"]["disk"] == 8_133_120
    awq = estimate(plan(str(checkpoints.MODELS / "demo-awq"), {}), named("cpu 8GiB"))
    assert awq["method"] == "awq"
    assert awq["weights"]["linear"] < found["weights"]["linear"] / 3


def test_a_model_of_the_hub_is_estimated_as_the_same_in_a_folder(hub: Hub) -> None:
    files = {path.name: path.read_bytes() for path in checkpoints.DEMO.iterdir()}
    here = estimate(plan(DEMO, {}), named("24GiB"))
    hub_models.repository(hub.folder, "org/demo", files)
    hub_models.repository(hub.folder, "org/draft", files, private=True)
    there = estimate(plan("org/demo", {}), named("24GiB"))
    assert there == here | {"model": "org/demo"}
    options = {"speculative_config": {"model": "org/draft"}, "hf_token": "hf_good"}
    (device,) = estimate(plan("org/demo", options), named("24GiB"))["devices"]
    assert device["draft"] == 8_133_120
    sent = [one.sent for one in hub.for_weights]
    assert sum(sent) < 2 * 8_133_120


def test_weights_that_torch_saved(hub: Hub) -> None:
    tensors = load_file(checkpoints.DEMO / checkpoints.WEIGHTS)
    tied = checkpoints.read_config(checkpoints.DEMO) | {"tie_word_embeddings": True}
    # As a model saves it: in the order of its layers, and what is tied under both names.
    del tensors["lm_head.weight"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    files = {"config.json": tied, "training_args.bin": b"?", "tokenizer.json": {"model": {}}}
    folder = hub_models.repository(hub.folder, "org/saved", files)
    torch.save(tensors, folder / "pytorch_model.bin")
    here, there = (
        estimate(plan(model, {}), named("24GiB")) for model in (str(folder), "org/saved")
    )
    assert here["weights"] == there["weights"]
    assert here["weights"]["memory"] == here["weights"]["disk"] == 8_133_120 - 524_288


def test_options_that_are_none() -> None:
    with pytest.raises(BridgeError) as error:
        estimate(plan(DEMO, {"dtyp": "bfloat16"}), named("24GiB"))
    assert error.value.reason == "invalid_option"
    # What does not run here may run there.
    asked = plan(DEMO, {"quantization": "nothing-known"})
    assert estimate(asked, named("24GiB"))["fits"]


def test_what_is_yet_to_be_made_is_not_estimated_as_if_it_were_plain() -> None:
    with pytest.raises(BridgeError, match="`isq` makes others of them") as error:
        estimate(plan(DEMO, {"isq": "Q4_K"}), named("24GiB"))
    assert error.value.reason == "unsupported"


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BridgeError) as error:
        estimate(plan(str(tmp_path / "nothing"), {}), named("24GiB"))
    assert error.value.reason == "model_not_found"
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2["7B"]), encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"?")
    with pytest.raises(BridgeError) as error:
        estimate(plan(str(folder), {}), named("24GiB"))
    assert error.value.reason == "unsupported"
    assert "headers are not read here" in error.value.message


def test_experts_that_are_alike_are_counted_together() -> None:
    config = MIXTRAL | {"num_local_experts": 256, "num_hidden_layers": 60}
    many = headers.plain(config)
    assert len(many.tensors) > 46_000
    assert len(parts.parts(many, {})) < 1_000
    assert of(many, "24GiB")["weights"]["experts"] == 2 * 60 * 256 * 3 * 4096 * 14336


def test_a_config_that_means_nothing_is_an_error_of_the_model(tmp_path: Path) -> None:
    for file in checkpoints.DEMO.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoints.DEMO / "config.json").read_text())
    for name, value in {"intermediate_size": 10**400, "num_key_value_heads": 2**63}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        looked_at = plan(str(tmp_path), {}, is_here=False)
        (finding,) = (one for one in looked_at.findings if one.severity == "error")
        assert (finding.reason, finding.details) == ("invalid_checkpoint", {"field": name})
        with pytest.raises(BridgeError, match=name):
            estimate(looked_at, named("24GiB"))
    # What multiplies to more than there is, and more than a message can have.
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 2**52}))
    with pytest.raises(BridgeError) as refused:
        estimate(plan(str(tmp_path), {}), named("24GiB"))
    assert refused.value.reason == "out_of_memory"


@pytest.mark.parametrize("factor", [None, "x", [[1]], {}])
def test_a_factor_of_rotary_embeddings_that_is_no_number_is_none(factor: Any) -> None:
    partial = headers.plain(LLAMA_3_8B | {"partial_rotary_factor": factor})
    assert of(partial, "24GiB")["devices"] == of(headers.plain(LLAMA_3_8B), "24GiB")["devices"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", [], 2**62])
@pytest.mark.parametrize("option", ["max_num_seqs", "cpu_offload_gb", "max_loras", "block_size"])
def test_an_option_that_is_no_number_is_refused(option: str, value: Any) -> None:
    with pytest.raises(BridgeError, match=f"`{option}` must be a number") as refused:
        of(headers.plain(LLAMA_3_8B), "24GiB", **{option: value, "enable_lora": True})
    assert refused.value.reason == "invalid_option"


@pytest.mark.parametrize("size", [-1, 10**9])
def test_ranks_that_nobody_has_are_refused(size: int) -> None:
    with pytest.raises(BridgeError, match="`data_parallel_size` must be a number"):
        of(headers.plain(LLAMA_3_8B), "24GiB", data_parallel_size=size)
