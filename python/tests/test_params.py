import dataclasses
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from vllm_bridge.errors import BridgeError
from vllm_bridge.params import SamplingParamsFactory, engine_fields, engine_options

ARGUMENTS = {
    field.name: getattr(AsyncEngineArgs(model="m"), field.name)
    for field in dataclasses.fields(AsyncEngineArgs)
    if field.init and not field.name.startswith("_")
}


def refused(options: dict[str, Any]) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        engine_options(options)
    assert caught.value.reason == "invalid_option"
    return caught.value


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_engine_argument_is_known_and_takes_its_default(name: str) -> None:
    assert engine_options({name: ARGUMENTS[name]}) == {name: ARGUMENTS[name]}


def test_checked_options_make_engine_arguments() -> None:
    checked = engine_options(
        {
            "dtype": "bfloat16",
            "gpu_memory_utilization": 1,
            "tensor_parallel_size": 2,
            "attention_backend": "flash_attn",
            "optimization_level": 1,
            "cpu_offload_params": ["a", "b"],
            "hf_overrides": {"rope_theta": 1.0},
            "compilation_config": {"mode": 0},
            "structured_outputs_config": {"backend": "xgrammar"},
        }
    )
    arguments = AsyncEngineArgs(model="m", **checked)
    assert arguments.dtype == "bfloat16"
    assert arguments.gpu_memory_utilization == 1.0
    assert arguments.attention_backend.name == "FLASH_ATTN"
    assert arguments.optimization_level == 1
    assert arguments.cpu_offload_params == {"a", "b"}
    assert arguments.compilation_config.mode == 0
    assert arguments.structured_outputs_config.backend == "xgrammar"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("quantisation", "quantization"), ("tensor_parallel", "tensor_parallel_size"), ("zz", None)],
)
def test_an_unknown_option_is_refused_with_the_nearest(name: str, suggestion: str | None) -> None:
    error = refused({name: 1})
    assert error.details == {"option": name, "nearest": suggestion}
    assert (f"Did you mean `{suggestion}`?" in error.message) == (suggestion is not None)


def test_internal_arguments_are_unknown() -> None:
    assert refused({"_api_process_count": 2}).details["option"] == "_api_process_count"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("tensor_parallel_size", "2", "valid integer"),
        ("tensor_parallel_size", 2.5, "valid integer"),
        ("tensor_parallel_size", None, "valid integer"),
        ("gpu_memory_utilization", True, "valid number"),
        ("enforce_eager", "yes", "valid boolean"),
        ("enforce_eager", 1, "valid boolean"),
        ("tokenizer", 3, "valid string"),
        ("compilation_config", {"mod": 0}, "Unknown key `mod`. Did you mean `mode`?"),
        ("structured_outputs_config", {"backend": "x"}, "backend: Input should be 'auto'"),
    ],
)
def test_a_wrong_value_says_which_option_what_came_and_what_is_allowed(
    option: str, value: Any, words: str
) -> None:
    error = refused({option: value})
    assert error.details["option"] == option
    assert error.message.startswith(f"`{option}` cannot be {value!r}. ")
    assert words in error.message


def test_the_values_of_a_literal_are_listed() -> None:
    error = refused({"kv_cache_dtype": "fp9"})
    assert {"auto", "fp8", "fp8_e5m2"} <= set(error.details["allowed"])
    assert "Allowed: auto, " in error.message


def test_the_members_of_an_enum_are_listed() -> None:
    error = refused({"attention_backend": "fast"})
    assert {"FLASH_ATTN", "CPU_ATTN"} <= set(error.details["allowed"])


def test_a_token_is_never_shown() -> None:
    error = refused({"hf_token": ["secret"], "dtype": "auto"})
    assert "secret" not in str(error.to_wire())


def test_every_field_has_a_type_that_can_be_checked() -> None:
    unchecked = [name for name, field in engine_fields().items() if field._adapter is None]
    assert unchecked == []


@pytest.fixture(scope="module")
def factory() -> SamplingParamsFactory:
    return SamplingParamsFactory({"temperature": 0.6, "top_p": 0.9})


def test_defaults_of_the_model_then_of_vllm(factory: SamplingParamsFactory) -> None:
    params = factory.make({"top_p": 0.5, "max_tokens": None})
    assert params == SamplingParams(
        temperature=0.6,
        top_p=0.5,
        max_tokens=None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    assert factory.make({}).max_tokens == SamplingParams().max_tokens


def test_every_kind_of_parameter(factory: SamplingParamsFactory) -> None:
    given: dict[str, Any] = {
        "n": 2,
        "temperature": 1,
        "seed": 7,
        "stop": "\n",
        "stop_token_ids": [1, 2],
        "logit_bias": {5: 1.5, 6: -1},
        "bad_words": ["no"],
        "ignore_eos": True,
        "extra_args": {"anything": [1, None]},
    }
    params = factory.make(given)
    assert params.stop == ["\n"]
    assert params.logit_bias == {5: 1.5, 6: -1.0}
    for name in given.keys() - {"stop"}:
        assert getattr(params, name) == given[name]


def test_structured_outputs_come_as_a_map(factory: SamplingParamsFactory) -> None:
    params = factory.make({"structured_outputs": {"choice": ["yes", "no"]}})
    assert params.structured_outputs == StructuredOutputsParams(choice=["yes", "no"])


@pytest.mark.parametrize(
    ("given", "option", "words"),
    [
        ({"temprature": 1}, "temprature", "Did you mean `temperature`?"),
        ({"regex": "a+"}, "regex", "as `structured_outputs: [regex: …]`"),
        ({"json": {}}, "json", "`structured_outputs`"),
        ({"choice": ["a"]}, "choice", "`structured_outputs`"),
        ({"grammar": "root ::= 'a'"}, "grammar", "`structured_outputs`"),
        ({"output_kind": 1}, "output_kind", "Unknown sampling parameter"),
        ({"skip_clone": True}, "skip_clone", "Unknown sampling parameter"),
        ({"_all_stop_token_ids": []}, "_all_stop_token_ids", "Unknown sampling parameter"),
        ({"temperature": "hot"}, "temperature", "`temperature` cannot be 'hot'"),
        ({"n": True}, "n", "`n` cannot be True"),
        ({"max_tokens": 1.5}, "max_tokens", "`max_tokens` cannot be 1.5"),
        ({"stop": [1]}, "stop", "`stop` cannot be [1]"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias", "`logit_bias` cannot be"),
        ({"structured_outputs": {"jsn": "{}"}}, "structured_outputs", "`json`?"),
        ({"structured_outputs": {}}, "structured_outputs", "none are specified"),
    ],
)
def test_wrong_parameters_are_refused(
    factory: SamplingParamsFactory, given: dict[str, Any], option: str, words: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        factory.make(given)
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == option
    assert words in caught.value.message


@pytest.mark.parametrize(
    "given", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"n": 0}]
)
def test_ranges_are_checked_by_vllm(factory: SamplingParamsFactory, given: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError):
        factory.make(given)
