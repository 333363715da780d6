"""Models that are named by their names on the hub: what is planned of them before they are fetched
is what is planned of their files."""

import asyncio
import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import gguf_files
from conftest import MODELS, ROOT
from gguf_files import Info
from hub_server import Fault, Hub
from vllm_bridge.checkpoints import gguf
from vllm_bridge.checkpoints.detect import detect
from vllm_bridge.checkpoints.models import find
from vllm_bridge.engine import start
from vllm_bridge.engine.config import _prepared, offline
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import download
from vllm_bridge.hub.names import Name
from vllm_bridge.tools import hub as tools
from vllm_bridge.tools.model import ModelParams

CHECKPOINTS = ROOT / "test" / "checkpoints"

# Of which a check of the files reads numbers, too.
VARIANTS = ("gptq-w4-act", "gptq-w4-asym-act", "w4a16", "w8a8", "hqq", "hqq-qmodel", "auto-round")


def put(hub: Hub, folder: Path) -> str:
    """Has the hub have a folder; returns the model's name."""
    (hub.folder / "org" / folder.name).symlink_to(folder)
    return f"org/{folder.name}"


def put_config(hub: Hub, name: str, **changes: Any) -> str:
    """The demo model with another config."""
    folder = hub.folder / "org" / name
    shutil.copytree(MODELS / "demo", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return f"org/{name}"


def fetched(hub: Hub) -> int:
    """How many bytes of weights have come."""
    return sum(one.sent for one in hub.for_weights)


def pulled(planned: Plan) -> str:
    assert planned.checkpoint.repository is not None
    return download.pull(planned.checkpoint.repository, planned.options)


def assert_alike(first: Plan, second: Plan) -> None:
    def told(made: Plan) -> Mapping[str, Any]:
        tensors = {name: (one.dtype, one.shape) for name, one in made.checkpoint.tensors.items()}
        checkpoint = dataclasses.replace(
            made.checkpoint, folder=None, tensors={}, repository=None, found=None
        )
        return {**vars(made), "model": None, "checkpoint": checkpoint, "tensors": tensors}

    assert told(first) == told(second)


@pytest.mark.parametrize(
    "folder",
    [
        *(MODELS / name for name in ("demo", "demo-awq", "demo-gptq")),
        *map(CHECKPOINTS.joinpath, VARIANTS),
    ],
    ids=lambda folder: folder.name,
)
def test_a_plan_of_what_the_hub_tells_is_that_of_the_files(hub: Hub, folder: Path) -> None:
    name = put(hub, folder)
    made = plan(name, {})
    assert made.findings == ()
    assert_alike(made, plan(str(folder), {}))
    assert fetched(hub) < 600_000
    assert not any(one.is_here for one in made.checkpoint.tensors.values())
    path = pulled(made)
    again = plan(name, {})
    assert again.checkpoint.repository is None
    assert again.checkpoint.folder == path
    assert all(one.is_here for one in again.checkpoint.tensors.values())
    assert_alike(again, made)


def test_a_gguf_file_is_planned_with_the_numbers_that_its_config_takes(hub: Hub) -> None:
    folder = hub.folder / "org" / "small-GGUF"
    folder.mkdir()
    tensors = gguf_files.llama_tensors() | {"rope_freqs.weight": Info((8,))}
    for type in ("Q4_K_M", "Q8_0"):
        path = gguf_files.write(folder / f"small-{type}.gguf", gguf_files.LLAMA, tensors)
        with path.open("r+b") as file:
            file.seek(gguf.read(str(path)).tensors["rope_freqs.weight"].start)
            file.write(struct.pack("<8f", *[1.0] * 8))
    made = plan("org/small-GGUF", {})
    assert made.findings == ()
    assert made.method == "gguf"
    assert made.checkpoint.files == ("small-Q4_K_M.gguf",)
    other = plan("org/small-GGUF:Q8_0", {})
    assert other.checkpoint.files == ("small-Q8_0.gguf",)
    assert_alike(other, plan(str(folder / "small-Q8_0.gguf"), {}))


def test_what_the_hub_has_is_detected_like_what_is_here(hub: Hub) -> None:
    for folder in (MODELS / "demo-gptq", MODELS / "demo-lora", CHECKPOINTS / "w4a16"):
        assert detect(put(hub, folder), {}) == detect(str(folder), {})
    assert fetched(hub) < 600_000

    broken = hub.folder / "org" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(BridgeError, match=r"`org/broken/adapter_config\.json` cannot be") as caught:
        detect("org/broken", {})
    assert caught.value.reason == "invalid_checkpoint"


def test_the_hub_is_announced(hub: Hub) -> None:
    phases: list[str] = []
    plan(put(hub, MODELS / "demo"), {}, phases.append)
    assert phases == ["hub"]
    plan(str(MODELS / "demo"), {}, phases.append)
    assert phases == ["hub"]


def test_vllm_is_given_the_files_and_tells_the_name(hub: Hub) -> None:
    name = put(hub, MODELS / "demo")
    path = pulled(plan(name, {"revision": "main"}))
    made = plan(name, {"revision": "main", "hf_token": "hf_good"})
    # The revision is not that of a tokenizer from elsewhere.
    assert made.options == {"hf_token": "hf_good", "load_format": "hf"}
    arguments: dict[str, Any] = {}
    assert _prepared(made, arguments) == path
    assert arguments == {"served_model_name": name}


@pytest.mark.parametrize(
    ("options", "config", "is_offline"),
    [
        ({}, {}, True),
        ({"speculative_config": {"model": "org/draft"}}, {}, False),
        ({"speculative_config": {"method": "ngram"}}, {}, True),
        ({"trust_remote_code": True}, {"auto_map": {"AutoModel": "org/code--model.Model"}}, False),
        ({"trust_remote_code": True}, {"auto_map": {"AutoModel": "model.Model"}}, True),
    ],
)
def test_what_lies_elsewhere_on_the_hub_may_be_fetched_by_vllm(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    config: dict[str, Any],
    is_offline: bool,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    made = plan(put_config(hub, "model", **config), options)
    with offline(made):
        assert ("HF_HUB_OFFLINE" in os.environ) == is_offline


def test_a_subfolder(hub: Hub) -> None:
    shutil.copytree(MODELS / "demo-awq", hub.folder / "org/several/4bit")
    made = plan("org/several", {"subfolder": "4bit"})
    assert made.method == "awq"
    assert "subfolder" not in made.options
    assert pulled(made).endswith("/4bit")
    (finding,) = plan(str(MODELS / "demo"), {"subfolder": "4bit"}).findings
    assert finding.reason == "invalid_option"
    (finding,) = plan(str(MODELS / "demo"), {"subfoldr": "4bit"}).findings
    assert finding.details["nearest"] == "subfolder"


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, {}, "invalid_checkpoint"),
        (None, {"max_model_length": 512}, "invalid_option"),
    ],
)
def test_what_will_not_run_is_refused_before_it_is_fetched(
    hub: Hub, config: dict[str, Any] | None, options: dict[str, Any], reason: str
) -> None:
    name = put_config(hub, "model", quantization_config=config)
    with pytest.raises(BridgeError) as caught:
        asyncio.run(start.load(name, options))
    assert caught.value.reason == reason
    assert "ghost" not in json.dumps(caught.value.to_wire())
    size = os.path.getsize(MODELS / "demo/model.safetensors")
    assert fetched(hub) < size / 2


def test_errors_about_what_the_hub_tells_name_the_model(hub: Hub) -> None:
    name = put_config(hub, "model")
    (hub.folder / name / "model.safetensors").write_bytes(b"\xff" * 100_000)
    (finding,) = plan(name, {}).findings
    assert finding.reason == "invalid_checkpoint"
    assert f"`{name}/model.safetensors`" in finding.message
    (hub.folder / name / "model.safetensors").unlink()
    (finding,) = plan(name, {}).findings
    assert f"`{name}` has a config and no weights" in finding.message


def test_a_model_that_is_here_is_found_while_the_hub_is_not(hub: Hub) -> None:
    name = put(hub, MODELS / "demo")
    pulled(plan(name, {}))
    hub.faults.append(Fault("", status=503))
    made = plan(name, {})
    assert made.findings == ()
    assert made.checkpoint.repository is None


def test_what_is_here_comes_before_what_is_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert find("org/name", {}) == "org/name"
    assert find("org/other", {}) == Name("org/other")
    # Where the folder is here, so should be the file.
    with pytest.raises(BridgeError, match=r"There is no file `org/name/x\.gguf`"):
        find("org/name/x.gguf", {})
    assert find("org/other/x.gguf", {}) == Name("org/other", "x.gguf")


def test_a_pull_tells_how_far_it_is_once_for_each_step(hub: Hub) -> None:
    class Call:
        id = 7

        def __init__(self) -> None:
            self.told: list[tuple[str, dict[str, Any]]] = []

        def notify(self, method: str, params: dict[str, Any]) -> None:
            self.told.append((method, params))

    name, call = put(hub, MODELS / "demo"), Call()

    async def pull() -> Any:
        return await tools.pull(call, ModelParams(name, {}))  # type: ignore[arg-type]

    found = asyncio.run(pull())
    assert (found["repository"], found["commit"]) == (name, os.path.basename(found["path"]))
    assert sorted(os.listdir(found["path"])) == sorted(os.listdir(MODELS / "demo"))
    assert {method for method, _ in call.told} == {"progress"}
    last = call.told[-1][1]
    assert last["id"] == 7
    assert last["files"] == last["total_files"] == 6
    assert last["bytes"] == last["total_bytes"]
    steps = [(params["bytes"], params["files"]) for _, params in call.told]
    assert len(steps) == len(set(steps))
    # What is here is its own path.
    here = ModelParams(found["path"], {})
    assert asyncio.run(tools.pull(call, here)) == {  # type: ignore[arg-type]
        "path": found["path"],
        "repository": None,
        "commit": None,
    }
