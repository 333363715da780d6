"""Names of models on this machine."""

import asyncio
import itertools
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hub_models
from conftest import MODELS
from hub_models import plain, repository
from hub_server import Hub
from vllm_bridge import data
from vllm_bridge.checkpoints import models
from vllm_bridge.checkpoints.detect import detect
from vllm_bridge.engine.plan import plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import cache, download
from vllm_bridge.registry import edit, find, listing, store
from vllm_bridge.registry.entry import Entry, parse
from vllm_bridge.tools import registry as tools

AWQ = MODELS / "demo-awq"
LORA = MODELS / "demo-lora"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, which is not there yet."""
    folder = tmp_path / "data"
    monkeypatch.setenv(data.VARIABLE, str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))


def made(folder: Path, name: str, label: str | None = None) -> Path:
    """An output of a job."""
    path = folder / "models" / name / (label or "model")
    path.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        os.link(AWQ / file, path / file)
    edit.register(str(path), name, label)
    return path


def refused(model: str) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        models.find(model, {})
    return caught.value


def test_what_can_be_a_name() -> None:
    assert parse("llama") == ("llama", None)
    assert parse("llama-3.2_1B:Q4_K_M") == ("llama-3.2_1B", "Q4_K_M")
    for other in ("org/name", "org/name:Q8_0", "/models/llama", "llama:", ":Q8_0", "..", "", "a b"):
        assert parse(other) is None


def test_a_registered_folder_is_found_by_its_name() -> None:
    entry = edit.register(str(AWQ), "mine")
    assert (entry.kind, entry.method, entry.bits) == ("model", "awq", 4)
    assert entry.size == sum(path.stat().st_size for path in AWQ.iterdir())
    assert models.find("mine", {}) == str(AWQ)
    assert detect("mine", {}).method == "awq"
    adapter = edit.register(str(LORA), "facts")
    assert (adapter.kind, adapter.base_model) == ("adapter", "demo")


def test_a_gguf_file_is_registered_too(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(hub_models.gguf(tmp_path))
    assert edit.register(str(path), "small").method == "gguf"
    assert models.find("small", {}) == str(path)


def test_a_name_with_one_output_needs_no_label(folder: Path) -> None:
    first = made(folder, "llama", "Q4_K_M")
    assert models.find("llama", {}) == models.find("llama:Q4_K_M", {}) == str(first)
    assert models.find("llama:q4_k_m", {}) == str(first)
    second = made(folder, "llama", "Q8_0")
    assert models.find("llama:Q8_0", {}) == str(second)
    error = refused("llama")
    assert error.reason == "model_not_found"
    assert error.what == "`llama` has several outputs: Q4_K_M, Q8_0."
    assert error.remedy == "Name one: `llama:Q4_K_M`."
    error = refused("llama:Q4_K_S")
    assert error.what == "`llama` has no output `Q4_K_S`; it has Q4_K_M, Q8_0."
    assert error.remedy == "Did you mean `llama:Q4_K_M`?"
    whole = made(folder, "llama")
    assert models.find("llama", {}) == str(whole)


def test_what_is_used_beside_a_model_has_its_name_too() -> None:
    edit.register(str(MODELS / "demo"), "small")
    options = {"tokenizer": "small", "speculative_config": {"model": "small", "method": "x"}}
    made = plan("small", options)
    assert made.model == "small"
    assert made.checkpoint.folder == str(MODELS / "demo")
    assert made.options["tokenizer"] == str(MODELS / "demo")
    assert made.options["speculative_config"] == {"model": str(MODELS / "demo"), "method": "x"}
    assert options["speculative_config"] == {"model": "small", "method": "x"}


def test_a_path_comes_first_and_the_hub_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit.register(str(AWQ), "gpt2")
    monkeypatch.chdir(tmp_path)
    assert models.find("gpt2", {}) == str(AWQ)
    (tmp_path / "gpt2").mkdir()
    assert models.find("gpt2", {}) == "gpt2"
    assert models.find("other", {}) == ("other", None, None)


def test_a_misspelt_name_is_told_with_the_nearest() -> None:
    edit.register(str(AWQ), "tiny-llama")
    with pytest.raises(BridgeError) as caught:
        models.locate("tiny-lama", {})
    assert caught.value.remedy.startswith("Did you mean `tiny-llama`? ")
    assert caught.value.details["nearest"] == "tiny-llama"
    with pytest.raises(BridgeError) as caught:
        listing.model("tiny-lama", {})
    assert caught.value.remedy.startswith("Did you mean `tiny-llama`? ")


def test_an_alias_is_another_name(folder: Path) -> None:
    path = made(folder, "llama", "Q4_K_M")
    made(folder, "llama", "Q8_0")
    edit.alias("llama:Q4_K_M", "prod")
    edit.alias("prod", "live")
    edit.alias("org/name", "hubs")
    assert models.find("prod", {}) == models.find("live", {}) == str(path)
    assert models.find("hubs", {}) == ("org/name", None, None)
    assert models.find("hubs:Q8_0", {}) == ("org/name", None, "Q8_0")
    assert (
        refused("prod:Q8_0").what == "`prod` is another name of `llama:Q4_K_M`, and takes no label."
    )
    with pytest.raises(BridgeError, match="is another name of `llama:Q4_K_M` already"):
        edit.alias("llama:Q8_0", "prod")
    edit.alias("llama:Q8_0", "prod", replace=True)
    assert models.find("prod", {}) == str(folder / "models/llama/Q8_0")
    with pytest.raises(BridgeError, match="is a model of its own already"):
        edit.alias("org/name", "llama", replace=True)
    with pytest.raises(BridgeError, match=r"no model of the name `lama`.*Did you mean `llama`"):
        edit.alias("lama", "other")
    with pytest.raises(BridgeError, match="can be no name"):
        edit.alias("llama:Q8_0", "org/prod")


def test_a_name_is_not_taken_from_another_model(tmp_path: Path) -> None:
    copy = shutil.copytree(AWQ, tmp_path / "copy")
    edit.register(str(AWQ), "mine")
    edit.register(str(AWQ), "mine")  # the same once more, as a job that was interrupted does
    with pytest.raises(
        BridgeError, match=r"`mine` is .*demo-awq` already.*replace: true"
    ) as caught:
        edit.register(str(copy), "mine")
    assert caught.value.reason == "name_taken"
    edit.register(str(copy), "mine", replace=True)
    assert models.find("mine", {}) == str(copy)
    edit.alias("mine", "other")
    with pytest.raises(BridgeError, match="is another name of `mine` already"):
        edit.register(str(AWQ), "other")


def test_names_that_models_cannot_have_are_told_before_they_are_made(folder: Path) -> None:
    path = made(folder, "llama", "Q4_K_M")
    edit.alias("llama:Q4_K_M", "prod")
    left = folder / "models/llama/Q2_K"
    left.mkdir()
    asked: list[tuple[str, str | None, str]] = [
        ("prod", "Q8_0", "/new"),
        ("llama", "Q8_0", "/new"),
        ("llama", None, "/new"),
        ("llama", "Q4_K_M", str(path)),
        ("llama", "Q2_K", str(left)),
    ]
    told = asyncio.run(tools.taken(None, tools.TakenParams(asked)))  # type: ignore[arg-type]
    assert [(one["name"], one["by"], one["delete"]) for one in told] == [
        ("prod:Q8_0", "another name of `llama:Q4_K_M`", "prod"),
        ("llama:Q4_K_M", f"`{path}`", "llama:Q4_K_M"),
        ("llama:Q2_K", f"`{left}`", None),
    ]


def test_names_that_no_model_can_have_are_told_before_it_is_made(folder: Path) -> None:
    for name, label in [("isq", "Q4_K_M"), ("n" * 97, None), ("llama", "Q4/K"), ("llama", "")]:
        asked: list[tuple[str, str | None, str]] = [
            ("llama", "Q8_0", "/new"),
            (name, label, "/new"),
        ]
        with pytest.raises(BridgeError) as caught:
            asyncio.run(tools.taken(None, tools.TakenParams(asked)))  # type: ignore[arg-type]
        assert caught.value.reason == "invalid_option"


def test_only_what_is_where_it_is_asked_for_loses_its_name(folder: Path) -> None:
    path = made(folder, "llama", "Q4_K_M")
    edit.alias("llama:Q4_K_M", "prod")
    # The first is short for it, the second another name of it, the third is elsewhere.
    for name, where in [("llama", path), ("prod", path), ("llama:Q4_K_M", folder)]:
        asked = tools.UnregisterParams(name, str(where))
        with pytest.raises(BridgeError) as caught:
            asyncio.run(tools.unregister(None, asked))  # type: ignore[arg-type]
        assert caught.value.reason == "model_not_found"
    asked = tools.UnregisterParams("llama:Q4_K_M", str(path))
    told = asyncio.run(tools.unregister(None, asked))  # type: ignore[arg-type]
    assert told["names"] == ["llama:Q4_K_M", "prod"]
    assert not path.exists()


def test_what_is_no_model_gets_no_name(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "gone", "model_not_found"), (tmp_path, "not_a_model")]:
        with pytest.raises(BridgeError) as caught:
            edit.register(str(path), "mine")
        assert caught.value.reason == reason
    assert store.every() == []


def test_what_was_made_here_is_deleted_with_its_files(folder: Path) -> None:
    path = made(folder, "llama", "Q4_K_M")
    kept = made(folder, "llama", "Q8_0")
    edit.alias("llama:Q4_K_M", "prod")
    size = sum(file.stat().st_size for file in path.iterdir())
    assert edit.unregister("prod") == (0, ["prod"])
    edit.alias("llama:Q4_K_M", "prod")
    assert edit.unregister("llama:Q4_K_M") == (size, ["llama:Q4_K_M", "prod"])
    assert not path.exists()
    assert not (folder / "trash").exists()
    assert models.find("llama", {}) == str(kept)
    edit.unregister("llama")
    assert os.listdir(folder / "models") == []
    assert os.listdir(folder / "registry") == [".lock"]


def test_what_an_engine_serves_is_told_from_what_none_does(folder: Path, hub: Hub) -> None:
    path = made(folder, "llama", "Q4_K_M")
    other = made(folder, "llama", "Q8_0")
    edit.alias("llama:Q4_K_M", "prod")
    model = listing.model("llama:Q4_K_M", {})
    listing.check_unused(
        model, ["llama:Q8_0", str(other), "org/name", "llama", "gone:x", f"{path}2"]
    )
    for name in ("llama:q4_k_m", "prod", str(path), f"{path}/model.gguf"):
        with pytest.raises(BridgeError) as caught:
            listing.check_unused(model, [name])
        assert caught.value.reason == "in_use"
        assert caught.value.details == {"model": "llama:Q4_K_M", "engine_model": name}
    repository(hub.folder, "org/name", plain())
    download.pull(hub_models.found("org/name"), {})
    with pytest.raises(BridgeError):
        listing.check_unused(listing.model("org/name", {}), ["org/name:Q8_0"])


def test_files_that_have_two_names_go_with_the_second(folder: Path) -> None:
    path = made(folder, "llama")
    edit.register(str(path), "mine")
    assert edit.unregister("llama") == (0, ["llama"])
    assert models.find("mine", {}) == str(path)
    assert edit.unregister("mine")[0] > 0
    assert not path.exists()


def test_the_files_of_a_registered_folder_stay(tmp_path: Path) -> None:
    copy = shutil.copytree(AWQ, tmp_path / "copy")
    edit.register(str(copy), "mine")
    assert edit.unregister("mine") == (0, ["mine"])
    assert (copy / "config.json").exists()


def test_a_model_whose_files_went_away_is_told_so(folder: Path) -> None:
    path = made(folder, "llama")
    shutil.rmtree(path)
    assert refused("llama").message == (
        f"`llama` is `{path}`, which is not there any more. Make it again, or forget its name: "
        '`VLLM.Models.delete("llama")`.'
    )
    (model,) = listing.models({})
    assert model.to_wire()["missing"] is True
    assert edit.unregister("llama") == (0, ["llama"])


def test_a_data_folder_may_be_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folder, "llama")
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.setenv(data.VARIABLE, str(moved))
    assert models.find("llama", {}) == str(moved / "models/llama/model")


def test_nothing_half_is_ever_read(folder: Path) -> None:
    made(folder, "llama")
    # What one leaves who is killed: a file that was never renamed, and files that were on the way
    # out.
    (folder / "registry/.other.new").write_text('{"name": "oth')
    (folder / "trash/1-Q8_0").mkdir(parents=True)
    assert [one.name for one in store.every()] == ["llama"]
    edit.register(str(AWQ), "mine")
    assert not (folder / "registry/.other.new").exists()
    assert not (folder / "trash").exists()


def test_a_damaged_file_hides_no_others(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(folder, "llama")
    (folder / "registry/bad.json").write_text("{")
    assert [model.name for model in listing.models({})] == ["llama"]
    assert "registry/bad.json" in caplog.text
    error = refused("bad")
    assert error.reason == "invalid_checkpoint"
    assert error.remedy == "Delete that file, and register the model again."


def test_what_a_later_version_notes_is_no_fault(folder: Path) -> None:
    made(folder, "llama")
    path = folder / "registry/llama.json"
    known = json.loads(path.read_text())
    known["outputs"][0]["unheard_of"] = 1
    path.write_text(json.dumps(known | {"unheard_of": {}}))
    assert isinstance(find.find("llama"), Entry)


def _register(number: int) -> None:
    edit.register(str(AWQ), "shared", f"n{number}")


def test_processes_that_register_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_register, args=(number,)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    names = store.read("shared")
    assert names is not None
    assert sorted(one.label or "" for one in names.outputs) == [f"n{n}" for n in range(6)]


def _change() -> None:
    for number in itertools.count():
        edit.register(str(AWQ), f"other{number % 3}", f"n{number}")
        edit.alias("kept", f"alias{number % 3}", replace=True)
        edit.unregister(f"other{number % 3}:n{number}")


def test_who_is_killed_leaves_no_half_name(caplog: pytest.LogCaptureFixture) -> None:
    edit.register(str(AWQ), "kept")
    context = multiprocessing.get_context("fork")
    for number in range(20):
        process = context.Process(target=_change)
        process.start()
        process.join(0.01 + 0.004 * number)
        process.kill()
        process.join(60)
        assert {model.entry.method for model in listing.models({})} == {"awq"}
        assert models.find("kept", {}) == str(AWQ)
        edit.register(str(AWQ), "kept")
    assert caplog.records == []


def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    folder.write_text("in the way")
    with pytest.raises(BridgeError) as caught:
        edit.register(str(AWQ), "mine")
    assert caught.value.reason == "cache_not_writable"
    assert "data_dir" in caught.value.remedy


def test_without_a_data_folder_there_are_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE)
    assert store.every() == []
    assert find.find("mine") is None
    with pytest.raises(BridgeError, match="EX_VLLM_DATA"):
        edit.register(str(AWQ), "mine")


def test_everything_that_can_be_served_is_listed(folder: Path, hub: Hub) -> None:
    awq = plain() | {
        "config.json": hub_models.LLAMA
        | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    }
    repository(hub.folder, "org/name", awq)
    path = download.pull(hub_models.found("org/name"), {})
    made(folder, "llama", "W4A16")
    how: dict[str, Any] = {"by": "quantize", "job": "j1", "options": {"bits": 4}}
    edit.register(
        str(folder / "models/llama/W4A16"),
        "llama",
        "W4A16",
        about={"source": "org/plain", "revision": "abc", "made": how, "quality": {"kl_mean": 0.1}},
    )
    edit.register(str(LORA), "facts")
    edit.alias("llama:W4A16", "prod")
    edit.alias("org/name", "hubs")
    found = {model.name: model.to_wire() for model in listing.models({})}
    assert set(found) == {"org/name", "llama:W4A16", "facts"}
    one = found["llama:W4A16"]
    assert (one["origin"], one["label"], one["method"], one["bits"]) == ("made", "W4A16", "awq", 4)
    assert (one["source"], one["revision"], one["aliases"]) == ("org/plain", "abc", ["prod"])
    assert (one["made"], one["quality"], one["missing"]) == (how, {"kl_mean": 0.1}, False)
    one = found["org/name"]
    assert (one["origin"], one["path"], one["aliases"]) == ("hub", path, ["hubs"])
    assert (one["method"], one["bits"], one["registered_at"]) == ("awq", 4, None)
    assert (found["facts"]["kind"], found["facts"]["origin"]) == ("adapter", "local")
    for name in ("org/name", "org/name:Q8_0", "hubs"):
        assert listing.model(name, {}).name == "org/name"
    assert listing.model("prod", {}).name == listing.model("llama", {}).name == "llama:W4A16"
    assert msgspec.msgpack.encode(list(found.values()))
    assert cache.delete("org/name", {}) > 0
