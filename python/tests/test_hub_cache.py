"""What was downloaded, and what there is on the hub."""

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import hub_models
from hub_models import LLAMA, found, plain, repository
from hub_server import Fault, Hub
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import cache, download
from vllm_bridge.hub.search import Found, method_of, search


def fetch(name: str, **options: str) -> str:
    return download.pull(found(name, **options), options)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("[!.]*"))


# -- downloaded models


def test_nothing_was_downloaded(hub: Hub) -> None:
    assert cache.models({}) == []


def test_what_was_downloaded(hub: Hub, tmp_path: Path) -> None:
    awq = plain() | {"config.json": LLAMA | {"quantization_config": {"quant_method": "awq"}}}
    folders = {
        "org/name": repository(hub.folder, "org/name", plain()),
        "org/name-AWQ": repository(hub.folder, "org/name-AWQ", awq),
        "org/name-GGUF": repository(
            hub.folder, "org/name-GGUF", {"a.Q8_0.gguf": hub_models.gguf(tmp_path)}
        ),
    }
    paths = {name: fetch(name) for name in folders}
    for number, name in enumerate(folders):
        for blob in Path(cache.storage(name, {}), "blobs").iterdir():
            os.utime(blob, (10**9 + number, 10**9))
    models = cache.models({})
    assert [model.id for model in models] == ["org/name-GGUF", "org/name-AWQ", "org/name"]
    assert [model.method for model in models] == ["gguf", "awq", None]
    for model in models:
        assert model.size == size(folders[model.id])
        assert model.incomplete == 0
        assert paths[model.id].startswith(model.path or "?")
        assert model.revisions == {"main": os.path.basename(model.path or "")}
    assert [model.last_used for model in models] == [10**9 + 2, 10**9 + 1, 10**9]


def test_what_was_begun(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain())
    hub.faults.append(Fault("model.safetensors", "cut", after=1000))
    hub.faults.append(Fault("resolve.*model.safetensors", status=404, skip=1))
    with pytest.raises(BridgeError):
        fetch("org/name")
    (model,) = cache.models({})
    assert model.path is None
    assert model.incomplete == 1000
    assert model.revisions == {}
    assert cache.delete("org/name", {}) == model.size
    assert cache.models({}) == []


def test_one_revision_is_deleted_with_what_no_other_needs(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain())
    repository(hub.folder, "org/name@v1", plain(500))
    kept = fetch("org/name")
    gone = fetch("org/name", revision="v1")
    weights = os.path.getsize(os.path.join(gone, "model.safetensors"))
    assert cache.delete("org/name", {}, "v1") == weights
    assert not os.path.exists(gone)
    assert os.path.getsize(os.path.join(kept, "config.json")) > 0
    (model,) = cache.models({})
    assert cache.delete("org/name", {}) == model.size
    assert not os.path.exists(kept)


def test_what_is_not_there_cannot_be_deleted(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain())
    fetch("org/name")
    for name, revision, told in (
        ("org/nam", None, "Did you mean `org/name`?"),
        ("org/name", "v1", "those that it was: main"),
        ("../../name", None, "is not among the downloaded"),
    ):
        with pytest.raises(BridgeError) as caught:
            cache.delete(name, {}, revision)
        assert caught.value.reason == "model_not_found"
        assert told in caught.value.message
    assert len(cache.models({})) == 1


def test_another_folder(hub: Hub, tmp_path: Path) -> None:
    repository(hub.folder, "org/name", plain())
    options = {"download_dir": str(tmp_path / "other")}
    fetch("org/name", **options)
    assert cache.models({}) == []
    assert [model.id for model in cache.models(options)] == ["org/name"]


# -- search


def test_search(hub: Hub) -> None:
    told = {"safetensors": {"parameters": {"BF16": 100, "I32": 20}, "total": 120}}
    repository(
        hub.folder, "org/some-AWQ", {}, downloads=5, likes=2, gated="auto", tags=["awq"], **told
    )
    repository(hub.folder, "org/some", {}, downloads=7, pipeline_tag="text-generation")
    repository(hub.folder, "other/some-GGUF", {}, downloads=9, gguf={"total": 8}, tags=["gguf"])
    models = search("some")
    assert [one.id for one in models] == ["other/some-GGUF", "org/some", "org/some-AWQ"]
    assert models[2] == Found(
        id="org/some-AWQ",
        downloads=5,
        likes=2,
        size=280,
        parameters=120,
        method="awq",
        gated=True,
        private=False,
        task=None,
        last_modified=None,
    )
    assert (models[0].method, models[0].parameters, models[0].size) == ("gguf", 8, None)
    assert (models[1].method, models[1].task) == (None, "text-generation")
    assert [one.id for one in search("SOME", limit=1)] == ["other/some-GGUF"]
    assert [one.id for one in search("", filters=["awq"])] == ["org/some-AWQ"]
    assert [one.id for one in search("some", author="other")] == ["other/some-GGUF"]
    assert search("some", limit=1, sort="likes")[0].id == "org/some-AWQ"
    assert search("none") == []


def test_a_search_that_fails(hub: Hub) -> None:
    with pytest.raises(BridgeError) as caught:
        search("some", sort="size")
    assert caught.value.reason == "invalid_option"
    hub.faults.append(Fault("/api/models", status=403))
    with pytest.raises(BridgeError) as caught:
        search("some")
    assert caught.value.reason == "hub_unauthorized"


def test_a_search_without_a_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BridgeError) as caught:
        search("some", options={"hf_token": "hf_good\n"})
    assert caught.value.reason == "invalid_option"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(BridgeError) as caught:
        search("some")
    assert caught.value.what == "The Hugging Face hub does not answer (ConnectError)."
    assert "folder" not in caught.value.remedy
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BridgeError) as caught:
        search("some")
    assert caught.value.what == "`HF_HUB_OFFLINE` is set, and only the hub can answer this."


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("TheBloke/Mistral-7B-Instruct-v0.2-AWQ", "awq"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-GGUF", "gguf"),
        ("org/name-GPTQ-Int4", "gptq"),
        ("org/name-bnb-4bit", "bitsandbytes"),
        ("org/name-FP8", "fp8"),
        ("gguf/name", None),
    ],
)
def test_methods_by_name(name: str, method: str | None) -> None:
    assert method_of(name) == method


@pytest.mark.parametrize("folder", ["a\0b", 5])
def test_a_folder_that_can_be_none_is_refused_as_the_option(folder: Any) -> None:
    with pytest.raises(BridgeError, match="`download_dir` is no path") as refused:
        cache.models({"download_dir": folder})
    assert refused.value.reason == "invalid_option"
