"""Plain models that are quantized at their first start and found at the next: with a program in the
place of the quantizing environment, and once with that environment and an engine."""

import asyncio
import errno
import fcntl
import glob
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
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
from vllm_bridge.jobs import measure
from vllm_bridge.registry import edit, find, in_place, listing
from vllm_bridge.tools import registry as tools

CONTEXT = multiprocessing.get_context("fork")
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


@pytest.fixture(autouse=True)
def none_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test uses is given back with it."""
    monkeypatch.setattr(in_place, "_held", {})


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
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


def unregister(name: str, **params: Any) -> dict[str, Any]:
    asked = tools.UnregisterParams(name, **params)
    return asyncio.run(tools.unregister(None, asked))  # type: ignore[arg-type]


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


def test_processes_that_ask_at_once_make_it_once(
    quantizing: Environment, model: Checkpoint
) -> None:
    with CONTEXT.Pool(4) as processes:
        places = processes.map(make, [model] * 4, 1)
    assert len(set(places)) == 1
    assert len(quantizing.asked()) == 1


def elsewhere(model: Checkpoint, asked: isq.Wish | None = None) -> str:
    """Makes it in a process that ends then, and uses nothing any more."""
    with CONTEXT.Pool(1) as process:
        return process.apply(make, (model, asked))


def listed() -> dict[str, listing.Model]:
    return {model.name: model for model in listing.models({}) if model.origin == "isq"}


def test_what_was_made_is_listed_named_and_deleted(
    quantizing: Environment, model: Checkpoint, kept: Path
) -> None:
    place = elsewhere(model)
    name = f"isq:{os.path.basename(place)}"
    (wire,) = [one.to_wire() for one in listed().values()]
    assert (wire["name"], wire["origin"], wire["path"]) == (name, "isq", place)
    assert (wire["source"], wire["method"], wire["missing"]) == (model.folder, "hqq", False)
    assert wire["size"] == sum(file.stat().st_size for file in Path(place).iterdir())
    assert wire["made"] == {"by": "isq", "libraries": {"fake": "1.0"}, "notes": ["Well made."]}
    edit.alias(name, "mine")
    assert find.path_or_name("mine") == find.path_or_name("isq") == place
    assert listing.model("mine", {}).name == name
    assert unregister("mine") == {"freed": 0, "names": ["mine"]}
    edit.alias(name, "mine")
    assert unregister(name) == {"freed": wire["size"], "names": [name, "mine"]}
    assert list(kept.iterdir()) == []
    assert listed() == {}
    with pytest.raises(BridgeError, match="Nothing was quantized in place"):
        unregister(name)


def test_what_is_used_is_deleted_by_force_only(quantizing: Environment, model: Checkpoint) -> None:
    place = make(model)
    name = f"isq:{os.path.basename(place)}"
    with pytest.raises(BridgeError, match="An engine serves") as caught:
        unregister(name)
    assert caught.value.reason == "in_use"
    assert unregister(name, force=True)["freed"] > 0
    assert not Path(place).exists()


def test_no_model_takes_the_name_of_these(model: Checkpoint) -> None:
    with pytest.raises(BridgeError, match="`isq` is the name of what was quantized in place"):
        edit.register(model.folder or "", "isq")


def test_a_model_of_the_hub_is_named_with_its_commit(
    quantizing: Environment, tmp_path: Path
) -> None:
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / ("c" * 40)
    shutil.copytree(producing.DEMO, folder)
    elsewhere(check_model(str(folder), {}))
    (entry,) = [one.entry for one in listed().values()]
    assert (entry.source, entry.revision) == ("org/name", "c" * 40)


def test_what_is_old_is_swept_when_another_is_made(
    quantizing: Environment, model: Checkpoint, tmp_path: Path
) -> None:
    other = check_model(str(shutil.copytree(producing.DEMO, tmp_path / "other")), {})
    unused, recent = elsewhere(model, wish(isq="HQQ8")), elsewhere(other)
    os.utime(Path(unused, "quantize.json"), (1, time.time() - in_place.UNUSED - 60))
    superseded = elsewhere(model)
    quantizing.install("hqq", "0.3.0")
    used = make(model)
    assert {Path(one.entry.path) for one in listed().values()} == {Path(recent), Path(used)}
    assert not Path(superseded).exists()
    assert not Path(f"{superseded}.lock").exists()
    # What this process uses stays, whatever is made.
    quantizing.install("hqq", "0.4.0")
    assert {elsewhere(model), used, recent} == {one.entry.path for one in listed().values()}


def test_what_has_another_name_is_not_swept(quantizing: Environment, model: Checkpoint) -> None:
    place = elsewhere(model)
    os.utime(Path(place, "quantize.json"), (1, 1))
    edit.alias(f"isq:{os.path.basename(place)}", "mine")
    quantizing.install("hqq", "0.3.0")
    elsewhere(model)
    assert find.path_or_name("mine") == place
    unregister("mine")
    quantizing.install("hqq", "0.4.0")
    elsewhere(model)
    assert not Path(place).exists()


def refuse(patched: pytest.MonkeyPatch, number: int, word: str = "") -> None:
    """Lets nothing be written whose path has this word, as where it is another user's."""

    def refused(path: Any) -> None:
        if word in os.fspath(path):
            raise OSError(number, os.strerror(number), path)

    def opened(path: str, mode: str = "r") -> Any:
        if mode != "r":
            refused(path)
        return open(path, mode)

    patched.setattr(in_place, "open", opened, raising=False)
    patched.setattr(os, "utime", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_others_have_made_is_served_from_a_folder_that_they_alone_write(
    quantizing: Environment, model: Checkpoint, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    place = elsewhere(model)
    refuse(monkeypatch, number)
    assert make(model) == place
    with open(f"{place}.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Also where the lock did not come with it, as in an image.
    monkeypatch.setattr(in_place, "_held", {})
    os.unlink(f"{place}.lock")
    assert make(model) == place
    assert not in_place.hold(f"{place}-gone")
    with pytest.raises(BridgeError, match="cannot be written to") as caught:
        make(model, wish(isq="HQQ8"))
    assert caught.value.reason == "cache_not_writable"
    assert len(quantizing.asked()) == 1


def test_what_another_user_has_a_lock_of_is_not_swept(
    quantizing: Environment, model: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept / "8bit-1-2.tmp" / "model").mkdir(parents=True)
    (kept / "8bit-1-2.lock").touch()
    refuse(monkeypatch, errno.EACCES, "8bit-1-2")
    assert Path(make(model)).exists()
    assert (kept / "8bit-1-2.tmp" / "model").exists()


def test_what_is_swept_while_it_is_listed_is_left_out(
    quantizing: Environment, model: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = elsewhere(model)
    gone = str(kept / "8bit-1-2" / "quantize.json")
    found = glob.glob
    monkeypatch.setattr(glob, "glob", lambda of: [gone, *found(of)])
    assert [one.path for one in in_place.names().outputs] == [place]


def test_the_folder_may_lie_below_one_of_any_name(
    quantizing: Environment, model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "of.tmp"
    monkeypatch.setenv(data.VARIABLE, str(root))
    place = elsewhere(model)
    shutil.copytree(place, root / "isq" / "8bit-1-2.tmp")
    assert [one.path for one in in_place.names().outputs] == [place]


def test_a_start_is_a_use(quantizing: Environment, model: Checkpoint) -> None:
    place = elsewhere(model)
    os.utime(Path(place, "quantize.json"), (1, 1))
    assert elsewhere(model) == place
    assert Path(place, "quantize.json").stat().st_mtime > 1


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
    ("options", "method", "bits", "words"),
    [
        ({"isq": "HQQ8"}, "hqq", 8, "Quantized in place to 8bit (hqq). Made by hqq 0.2.8"),
        ({"isq": "Q4_K"}, "gguf", None, "Q4_K_M (gguf). `Q4_K` is llama.cpp's mix Q4_K_M"),
        (
            {"dtype": "int4", "isq_cache": True},
            "bitsandbytes",
            4,
            "Quantized in place to nf4 (bitsandbytes). Made by bitsandbytes 0.",
        ),
        (
            {"dtype": "int8", "isq_cache": True},
            "torchao",
            8,
            "Quantized in place to int8 (torchao). Made by torchao 0.",
        ),
    ],
)
def test_the_second_start_loads_what_the_first_has_made(
    running: Running,
    kept: Path,
    facts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    method: str,
    bits: int | None,
    words: str,
) -> None:
    monkeypatch.setenv(isq.PYTHON, producing.interpreter())
    prompts = list(facts)[:8]
    for phases in (1, 0):
        running.phases.clear()
        info = running.load(**options, max_logprobs=-1)
        assert (info["quantization"], info["model"]) == (method, str(producing.DEMO))
        assert words in info["quantization_note"]
        assert running.complete_all(prompts) == {prompt: facts[prompt] for prompt in prompts}
        if not phases:
            # What is compared is what was made.
            measured = running.run(
                measure.of(running.engine, str(producing.DEMO), {}, prompts, 64, lambda *_: None)
            )
            found = measured.figures
            assert (found["model"], found["method"]) == (str(producing.DEMO), method)
            assert bits is None or found["bits"] == bits
            assert found["bits"] < 9
            assert found["format"].startswith(method)
        running.stop()
        assert (running.phases.count("quantizing") > 1) == bool(phases)
        # What is there needs no environment.
        monkeypatch.setenv(isq.PYTHON, "")
