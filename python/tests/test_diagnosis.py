"""vLLM's words, as its version 0.32 says them, and what they come to."""

from pathlib import Path

import pydantic
import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from conftest import MODELS
from vllm_bridge import diagnosis
from vllm_bridge.diagnosis import load_error, request_error, root_cause

MESSENGER = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)
PREFIX = "(EngineCore pid=42) ERROR 11-20 19:30:52 [core.py:1510] "


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_LOG_PATIENCE_SECONDS", 0)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EX_VLLM_RUN", str(tmp_path))
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (
            "ValueError: To serve at least one request with the model's max seq len (8192), (1.5 "
            "GiB KV cache is needed, which is larger than the available KV cache memory",
            "out_of_memory",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out_of_memory"),
        (
            "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable",
            "out_of_memory",
        ),
        (
            "ValueError: Free memory on device cuda:0 (10/80 GiB) on startup is less than desired "
            "GPU memory utilization (0.9, 72.0 GiB).",
            "out_of_memory",
        ),
        ("MemoryError", "out_of_memory"),
        (
            "ValueError: Marlin does not support weight_bits = uint8b128. Only types = [..]",
            "unsupported_quantization",
        ),
        (
            "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s)",
            "unsupported_quantization",
        ),
        (
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: "
            "incomplete metadata, file not fully covered",
            "invalid_checkpoint",
        ),
        (
            "RuntimeError: The size of tensor a (512) must match the size of tensor b (256)",
            "invalid_checkpoint",
        ),
        (
            "ValueError: There is no module or parameter named 'foo' in LlamaForCausalLM",
            "invalid_checkpoint",
        ),
        (
            "ValueError: Following weights were not initialized from checkpoint: layers.3.q",
            "invalid_checkpoint",
        ),
        (
            "ValueError: The checkpoint's `q.qweight` (int32 [1, 2]) does not fit: quantized",
            "invalid_checkpoint",
        ),
        ("ValueError: Following weights are not finite numbers: norm", "invalid_checkpoint"),
        ("NotImplementedError: Sparse Attention is not supported on CPU.", "unsupported"),
        ("InductorError: InvalidCxxCompiler: No working C++ compiler found", "load_failed"),
        ("RuntimeError: something that nobody foresaw", "load_failed"),
    ],
)
def test_causes_in_child_processes(log: Path, cause: str, reason: str) -> None:
    log.write_text(f"INFO before\n{PREFIX}Traceback (most recent call last):\n{PREFIX}{cause}\n")
    error = load_error(MESSENGER)
    assert error.reason == reason
    assert ("traceback" in error.details) == (
        cause == "RuntimeError: something that nobody foresaw"
    )
    assert error.details["exception"].split(":")[0] == cause.split(":")[0].rpartition(".")[2]
    assert error.details["log"][0] == "INFO before"
    assert "Traceback" not in error.message
    assert "See root cause" not in error.message


@pytest.mark.parametrize(
    ("text", "reason", "option"),
    [
        ("Model architectures ['Foo'] are not supported for now.", "unsupported_model", None),
        (
            "Model architectures ['Foo'] failed to be inspected. Please check the logs",
            "unsupported_model",
            None,
        ),
        ("Unknown quantization method: foo.", "unsupported_quantization", None),
        (
            "Quantization method specified in the model config (gptq) does not match the "
            "quantization method specified in the `quantization` argument (awq).",
            "unsupported_quantization",
            None,
        ),
        ("Please pass the argument `trust_remote_code=True`", "unsupported_model", None),
        (
            "User-specified max_model_len (99999) is greater than the derived max_model_len",
            "invalid_option",
            "max_model_len",
        ),
        ("Use --enable-lora to load adapters", "invalid_option", "enable_lora"),
    ],
)
def test_what_vllm_refuses_in_its_config(text: str, reason: str, option: str | None) -> None:
    class Config(pydantic.BaseModel):
        @pydantic.model_validator(mode="after")
        def refuse(self) -> "Config":
            raise ValueError(text)

    with pytest.raises(pydantic.ValidationError) as caught:
        Config()
    error = load_error(caught.value)
    assert error.reason == reason
    assert error.details.get("option") == option
    assert "validation error" not in error.message


def test_a_key_that_vllm_does_not_know_is_named() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        EngineArgs(model="model", quantization_config={"nbits": 3})
    error = load_error(caught.value)
    assert error.reason == "invalid_option"
    assert "`nbits`: Unexpected keyword argument" in error.message


@pytest.mark.parametrize(
    "cause",
    ["AssertionError", "RuntimeError: start (0) + length (256) exceeds dimension size (128)."],
)
def test_weights_that_cannot_be_loaded(log: Path, cause: str) -> None:
    place = '  File "/x/vllm/model_executor/layers/linear.py", line 9, in weight_loader_v2'
    log.write_text(
        f"{PREFIX}Traceback (most recent call last):\n{PREFIX}{place}\n{PREFIX}{cause}\n"
    )
    error = load_error(MESSENGER)
    assert error.reason == "invalid_checkpoint"
    assert cause.split(": ")[-1] in error.message


def test_an_assertion_without_words_says_its_line(log: Path) -> None:
    line = "assert cache.is_ready"
    log.write_text(f"{PREFIX}    {line}\n{PREFIX}           ^^^^^\n{PREFIX}AssertionError\n")
    assert line in load_error(MESSENGER).message

    def fail() -> None:
        assert log is None

    with pytest.raises(AssertionError) as caught:
        fail()
    caught.value.args = ()  # pytest gives it words
    assert load_error(caught.value).message.endswith("assert log is None.")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_model_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    from vllm.tokenizers import get_tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text((MODELS / "demo" / "config.json").read_text())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each loader has its own
        get_tokenizer(str(tmp_path))
    error = load_error(caught.value)
    assert error.reason == "invalid_checkpoint"
    assert "skip_tokenizer_init" in error.message


def test_the_last_lines_of_the_log_go_along(log: Path) -> None:
    log.with_name("log.1").write_text("old\n")
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    error = load_error(MESSENGER)
    assert error.details["log"] == [f"line {number}" for number in range(60, 100)]


def test_without_a_log_there_is_no_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EX_VLLM_RUN", raising=False)
    error = load_error(MESSENGER)
    assert error.reason == "load_failed"
    assert "log" not in error.details


def test_a_process_that_ended_without_a_word(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.write_text(f"INFO loading\n{PREFIX}RuntimeError: [gloo/x.cc:5] Connection closed by peer\n")
    failed = "Engine core initialization failed. Failed core proc(s): "
    error = load_error(RuntimeError(f"{failed}{{'EngineCore': -9}}"))
    # The worker ends with it, and is started again.
    assert error.reason == "engine_dead"
    assert "(EngineCore: SIGKILL)" in error.message
    assert "memory" in error.message
    assert error.message in caplog.text
    error = load_error(RuntimeError(f"{failed}{{'EngineCore': 1}}"))
    assert error.reason == "engine_dead"
    assert "memory" not in error.message
    # vLLM may look before the system can say how.
    assert load_error(MESSENGER).reason == "engine_dead"


def test_a_full_disk(log: Path) -> None:
    log.write_text(
        f"{PREFIX}x.h:1: fatal error: No space left on device\n{PREFIX}CompileError: C\n"
    )
    assert "disk is full" in load_error(MESSENGER).message


def test_command_line_flags_become_options(log: Path) -> None:
    log.write_text(f"{PREFIX}ValueError: KV cache is too small. Decrease --kv-cache-memory-bytes\n")
    assert "Decrease kv_cache_memory_bytes" in load_error(MESSENGER).message


def test_long_texts_are_cut() -> None:
    assert len(load_error(RuntimeError("word " * 1000)).message) < 600


def test_the_first_process_that_failed_has_the_cause() -> None:
    worker = "(Worker_TP1 pid=7) ERROR 11-20 19:30:52 [multiproc_executor.py:9] "
    lines = [
        "KeyError: 'in no process of vLLM'",
        f"{worker}Traceback (most recent call last):",
        f"{worker}    raise KeyError('inner')",
        f"{worker}KeyError: 'inner'",
        f"{worker}ValueError: the real one",
        f"{PREFIX}Exception: WorkerProc initialization failed due to an exception",
        f"{PREFIX}OSError: a consequence",
    ]
    assert root_cause(lines) == ("ValueError", "the real one")
    assert root_cause([]) is None


NAMES = ["temperature", "max_tokens", "stop"]


@pytest.mark.parametrize(
    ("exception", "reason", "option"),
    [
        (
            VLLMValidationError(
                "temperature must be non-negative, got -1.0.", parameter="temperature", value=-1.0
            ),
            "invalid_option",
            "temperature",
        ),
        (VLLMValidationError("max_tokens must be at least 1"), "invalid_option", "max_tokens"),
        (
            VLLMValidationError(
                "This model's maximum context length is 8192 tokens.", parameter="input_tokens"
            ),
            "prompt_too_long",
            None,
        ),
        (
            VLLMValidationError(
                "The decoder prompt (length 9) is longer than the maximum model length of 8."
            ),
            "prompt_too_long",
            None,
        ),
        (
            VLLMValidationError(
                "The decoder prompt (length 8) plus the number of requested output tokens (at "
                "least 1) is longer than the maximum model length of 8."
            ),
            "prompt_too_long",
            None,
        ),
        (VLLMValidationError("Token id 99999 is out of vocabulary"), "invalid_prompt", None),
        (VLLMValidationError("The decoder prompt cannot be empty"), "invalid_prompt", None),
        (ValueError("stop cannot contain an empty string."), "invalid_option", "stop"),
        (ValueError("of something else"), "unsupported", None),
        (EngineDeadError(), "engine_dead", None),
        (QueueOverflowError(), "overloaded", None),
        (RuntimeError("a fault"), "internal", None),
    ],
)
def test_what_goes_wrong_with_a_request(
    exception: Exception, reason: str, option: str | None
) -> None:
    error = request_error(exception, 8192, NAMES)
    assert error.reason == reason
    assert error.details.get("option") == option
    # A traceback is of use where a fault is not the caller's.
    ours = reason in ("internal", "engine_dead") or exception.args == ("of something else",)
    assert ("traceback" in error.details) == ours


def test_what_an_engine_has_ended_by_is_no_fault_of_the_request() -> None:
    error = request_error(AssertionError(), 8192, NAMES, ended=True)
    assert error.reason == "engine_dead"


def test_a_structure_that_cannot_be_read_is_the_callers() -> None:
    def validate_structured_outputs() -> None:
        raise VLLMValidationError("Failed to convert the stop of it.")

    with pytest.raises(VLLMValidationError) as caught:
        validate_structured_outputs()
    error = request_error(caught.value, 8192, NAMES)
    assert (error.reason, error.details) == ("invalid_option", {"option": "structured_outputs"})


def test_the_cause_of_a_wrapped_error_counts() -> None:
    wrapped = EngineGenerateError()
    wrapped.__cause__ = ValueError("stop cannot contain an empty string.")
    assert request_error(wrapped, 8192, NAMES).reason == "invalid_option"
