"""Plain models that are quantized at their first start and found at the next: with a program in the
place of the quantizing environment, and once with that environment and an engine."""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import producing
from running import Running
from vllm_bridge import data
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.engine import isq
from vllm_bridge.engine.check import check
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError

MODELS = producing.DEMO.parent

PROGRAM = """#!{python} -IS
import json, os, pathlib, signal, sys, time
asked = json.load(sys.stdin)
here = pathlib.Path(__file__).parent
with open(here / "asked", "a") as file:
    file.write(json.dumps(asked) + "\\n")
mode = (here / "mode").read_text() if (here / "mode").exists() else ""
if mode == "killed":
    os.makedirs(asked["make"]["out"])
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "refuses":
    error = dict(reason="unsupported", message="It cannot. Ask another.")
    print(json.dumps(dict(error=dict(error, details=dict(remedy="Ask another.")))))
    sys.exit()
if "check" in asked:
    print(json.dumps(dict(result=[])))
    sys.exit()
out = pathlib.Path(asked["make"]["out"])
out.mkdir(parents=True)
(out / "weights").write_text(asked["make"]["options"])
print(json.dumps(dict(progress=dict(step="layers", done=1, total=2))), flush=True)
if mode == "changes":
    config = pathlib.Path(asked["make"]["source"], "config.json")
    config.write_text(config.read_text() + " ")
time.sleep(0.05)
print(json.dumps(dict(result=dict(libraries=dict(fake="1.0"), notes=["Well made."]))))
"""


class Environment:
    """A quantizing environment, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.python.write_text(PROGRAM.format(python=sys.executable))
        self.python.chmod(0o755)
        self.install("hqq", "0.2.8")

    def install(self, name: str, version: str) -> None:
        packages = self.folder / "venv" / "lib" / "python3.11" / "site-packages"
        shutil.rmtree(packages, ignore_errors=True)
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(text)

    def be(self, mode: str) -> None:
        (self.python.parent / "mode").write_text(mode)

    def asked(self) -> list[dict[str, Any]]:
        file = self.python.parent / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data" / "isq"


@pytest.fixture
def quantizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path) -> Environment:
    made = Environment(tmp_path)
    monkeypatch.setenv(isq.PYTHON, str(made.python))
    return made


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    shutil.copytree(producing.DEMO, tmp_path / "model")
    return check_model(str(tmp_path / "model"), {})


def wish(**options: Any) -> isq.Wish:
    asked = {"isq": "HQQ4"} | options
    found = isq.take(asked)
    assert found is not None
    return found


def make(model: Checkpoint, asked: isq.Wish | None = None) -> str:
    return isq.made(model, asked or wish(), lambda _: None)


def planned(model: str | Path = producing.DEMO, **options: Any) -> Plan:
    return plan(str(model), options)


def error(found: Plan) -> Any:
    (one,) = [finding for finding in found.findings if finding.severity == "error"]
    return one


@pytest.mark.parametrize(
    ("name", "made_as", "words"),
    [
        ("Q4_0", ("gguf", "Q4_0"), "Quantized in place to Q4_0 (gguf)."),
        ("q6_k", ("gguf", "Q6_K"), "Quantized in place to Q6_K (gguf)."),
        ("Q4_K", ("gguf", "Q4_K_M"), "llama.cpp's mix Q4_K_M"),
        ("Q8_1", ("gguf", "Q8_0"), "Q8_0 is the nearest"),
        ("Q8_K", ("gguf", "Q8_0"), "Q8_0 is the nearest"),
        ("HQQ4", ("hqq", "4bit"), "Quantized in place to 4bit (hqq)."),
        ("hqq8", ("hqq", "8bit"), "Quantized in place to 8bit (hqq)."),
    ],
)
def test_a_type_is_made_as_what_can_be_loaded(
    name: str, made_as: tuple[str, str], words: str
) -> None:
    options = {"isq": name, "isq_cache": True, "max_model_len": 64}
    found = isq.take(options)
    assert found is not None
    assert (found.kind.format, found.kind.word) == made_as
    assert words in found.note
    assert found.is_kept
    assert options == {"max_model_len": 64}


def test_every_type_that_is_promised_is_there() -> None:
    promised = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K HQQ4 HQQ8"
    assert set(promised.split()) == set(isq.KINDS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"isq": "Q4_X"}, "There is no type 'Q4_X' for `isq`. Did you mean `Q4_"),
        ({"isq": 4}, "There is no type 4 for `isq`."),
        ({"isq": "Q4_K", "quantization": "awq"}, "and so does `quantization: 'awq'`"),
        ({"isq": "Q4_K", "dtype": "int4"}, "and so does `dtype: 'int4'`"),
        ({"isq": "Q4_K", "isq_cache": "no"}, "`isq_cache` is 'no', not true or false."),
        ({"isq_cache": True}, "nothing is to be quantized"),
        ({"isq_cache": True, "dtype": "bfloat16"}, "nothing is to be quantized"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BridgeError) as caught:
        isq.take(dict(options))
    assert caught.value.reason == "invalid_option"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("dtype", "made_as"), [("int4", ("bitsandbytes", "nf4")), ("INT8", ("torchao", "int8"))]
)
def test_a_dtype_can_be_kept_too(dtype: str, made_as: tuple[str, str]) -> None:
    options = {"dtype": dtype, "isq_cache": True}
    found = isq.take(options)
    assert found is not None
    assert (found.kind.format, found.kind.word) == made_as
    assert options == {}
    assert isq.take({"dtype": dtype}) is None


def test_the_plan_says_what_will_be_made(quantizing: Environment) -> None:
    found = planned(isq="HQQ8", max_model_len=64)
    assert found.isq == wish(isq="HQQ8")
    assert found.method == "hqq"
    assert found.options == {"max_model_len": 64, "load_format": "hf"}
    assert [finding for finding in found.findings if finding.severity == "error"] == []
    assert quantizing.asked() == []


def test_without_the_environment_the_command_that_makes_it_is_told(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(isq.PYTHON, raising=False)
    found = error(planned(isq="Q4_K"))
    assert found.reason == "quantize_not_installed"
    assert found.remedy == "Run `mix vllm.setup --with quantize`."


def test_what_is_quantized_is_not_quantized_again(quantizing: Environment) -> None:
    found = error(planned(MODELS / "demo-awq", isq="Q4_K"))
    assert found.reason == "unsupported_quantization"
    assert "quantized already, with awq" in found.message


def test_what_was_made_is_found_again(
    quantizing: Environment, model: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    place = isq.made(model, wish(), told.append)
    assert told == [{"step": "layers", "done": 1, "total": 2}]
    assert Path(place).parent == kept
    assert Path(place, "weights").read_text() == "4bit"
    assert isq.note(place, wish()) == (
        "Quantized in place to 4bit (hqq). Made by fake 1.0. Well made."
    )
    assert make(model) == place
    assert len(quantizing.asked()) == 1
    # Also where the environment is gone.
    monkeypatch.delenv(isq.PYTHON)
    assert make(model) == place
    isq.check(model, wish())


def test_another_type_model_or_library_makes_it_anew(
    quantizing: Environment, model: Checkpoint
) -> None:
    places = {make(model), make(model, wish(isq="HQQ8"))}
    config = Path(model.folder or "", "config.json")
    os.utime(config, (1, 1))
    places.add(make(model))
    quantizing.install("hqq", "0.3.0")
    places.add(make(model))
    assert len(places) == 4
    assert len(quantizing.asked()) == 4


def test_two_who_ask_at_once_make_it_once(quantizing: Environment, model: Checkpoint) -> None:
    with ThreadPoolExecutor(4) as threads:
        places = list(threads.map(lambda _: make(model), range(4)))
    assert len(set(places)) == 1
    assert len(quantizing.asked()) == 1


def test_what_is_not_kept_is_made_each_time(
    quantizing: Environment, model: Checkpoint, kept: Path
) -> None:
    once = wish(isq_cache=False)
    places = {make(model, once), make(model, once)}
    assert len(places) == 2
    assert not kept.exists()
    assert all(Path(place, "weights").exists() for place in places)
    for place in places:
        shutil.rmtree(Path(place).parent)


@pytest.mark.parametrize(
    ("mode", "reason", "words"),
    [
        ("refuses", "unsupported", "It cannot. Ask another."),
        ("killed", "out_of_memory", "was killed, as the system does where memory is short."),
        ("changes", "invalid_checkpoint", "have changed while they were quantized"),
    ],
)
def test_what_failed_is_told_and_never_loaded(
    quantizing: Environment, model: Checkpoint, kept: Path, mode: str, reason: str, words: str
) -> None:
    quantizing.be(mode)
    with pytest.raises(BridgeError) as caught:
        make(model)
    assert caught.value.reason == reason
    assert words in caught.value.message
    quantizing.be("")
    place = make(model)
    left = {path.name for path in kept.iterdir() if not path.name.endswith(".lock")}
    assert left == {Path(place).name}


def test_what_the_killed_have_left_is_swept(
    quantizing: Environment, model: Checkpoint, kept: Path
) -> None:
    for name in ("8bit-1-2", "4bit-3-4"):
        (kept / f"{name}.tmp" / "model").mkdir(parents=True)
        (kept / f"{name}.lock").touch()
    with open(kept / "4bit-3-4.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        make(model)
    assert [path.name for path in kept.glob("*.tmp")] == ["4bit-3-4.tmp"]


@pytest.mark.engine
def test_a_check_asks_the_libraries(quantizing: Environment) -> None:
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
    checked = check(str(producing.DEMO), {"isq": "Q8_1", **options})
    assert [finding.severity for finding in checked.findings if finding.reason == "isq"] == ["info"]
    assert quantizing.asked() == [
        {"check": {"outputs": [["gguf", "Q8_0"]], "source": str(producing.DEMO)}}
    ]
    quantizing.be("refuses")
    found = check(str(producing.DEMO), {"isq": "Q8_0", **options}).findings[-1]
    assert (found.severity, found.message, found.remedy) == ("error", "It cannot.", "Ask another.")


@pytest.fixture
def running() -> Iterator[Running]:
    engine = Running()
    yield engine
    if engine.loaded is not None:
        engine.stop()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("HQQ8", "hqq", "Quantized in place to 8bit (hqq). Made by hqq 0.2.8"),
        ("Q4_K", "gguf", "Quantized in place to Q4_K_M (gguf). `Q4_K` is llama.cpp's mix Q4_K_M"),
    ],
)
def test_the_second_start_loads_what_the_first_has_made(
    running: Running,
    kept: Path,
    facts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: str,
    words: str,
) -> None:
    monkeypatch.setenv(isq.PYTHON, producing.interpreter())
    prompts = list(facts)[:8]
    for phases in (1, 0):
        running.phases.clear()
        info = running.load(isq=name)
        assert (info["quantization"], info["model"]) == (method, str(producing.DEMO))
        assert words in info["quantization_note"]
        assert running.complete_all(prompts) == {prompt: facts[prompt] for prompt in prompts}
        running.stop()
        assert (running.phases.count("quantizing") > 1) == bool(phases)
        # What is there needs no environment.
        monkeypatch.setenv(isq.PYTHON, "")
