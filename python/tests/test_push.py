"""Uploads, by the real client to a stand-in of the hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from conftest import MODELS
from hub_models import found, plain, repository
from hub_server import Fault, Hub
from vllm_bridge import data
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import download
from vllm_bridge.hub.download import Progress
from vllm_bridge.registry import edit
from vllm_bridge.registry.card import card
from vllm_bridge.registry.entry import Entry
from vllm_bridge.registry.push import push

TOKEN = {"hf_token": "hf_good_write"}
READS = {"hf_token": "hf_good_read_only"}
UNKNOWN = {"hf_token": "hf_unknown_0123456789"}
NO_TOKEN = {"hf_token": "two words"}

HOW: dict[str, Any] = {
    "by": "quantize",
    "at": "2026-11-28T04:15:30Z",
    "options": {"bits": 4, "group_size": 128, "folder": "/home/me/texts", "version": "a|b"},
    "libraries": {"llmcompressor": "0.14.0.1"},
    "calibration": {"source": "default", "texts": 128, "tokens": 65536},
}


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    """An output of a job with the name ``llama:W4A16``, made of ``org/plain``."""
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "data"))
    path = tmp_path / "data/models/llama/W4A16"
    shutil.copytree(MODELS / "demo-awq", path)
    (path / "chat").mkdir()
    (path / "chat/template.jinja").write_text("{{ messages }}")
    (path / ".cache").mkdir()
    (path / ".cache/left").write_text("no")
    readme = "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [theirs]\n---\n# Plain\n"
    repository(hub.folder, "org/plain", {"README.md": readme, **plain()})
    about = {
        "source": "org/plain",
        "quality": {"perplexity": 5.61234, "kl_mean": 0.0123, "says": ["ok"]},
        "made": HOW,
    }
    edit.register(str(path), "llama", "W4A16", about=about)
    return path


def names(path: Path) -> set[str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)) for file in files}


def refused(repository: str = "me/new", **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        push("llama", repository, options)
    return caught.value


def test_a_model_is_uploaded_with_its_card(hub: Hub, model: Path) -> None:
    told: list[tuple[Progress, int]] = []
    done = push("llama", "me/new", TOKEN, progress=lambda *one: told.append(one))
    uploaded = hub.folder / "me/new"
    assert done["url"] == f"{hub.endpoint}/me/new"
    assert done["commit"] == hub.repository("me/new").commit  # type: ignore[union-attr]
    assert names(uploaded) - {".hub.json"} == names(model) - {".cache/left"} | {"README.md"}
    assert (uploaded / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()
    assert json.loads((uploaded / ".hub.json").read_text()) == {"private": True}
    total = sum(os.path.getsize(model / name) for name in names(model) - {".cache/left"})
    last, checked = told[-1]
    assert (last.bytes, last.total_bytes, checked) == (total, total, total)
    assert last.files == last.total_files == len(names(model)) - 1
    assert metadata_load(uploaded / "README.md") == {
        "base_model": "org/plain",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "tags": ["vllm", "awq"],
    }
    # What was uploaded is a model as any other.
    path = download.pull(found("me/new", **TOKEN), TOKEN)
    assert (Path(path) / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_what_the_hub_has_is_not_sent_again(hub: Hub) -> None:
    push("llama", "me/new", TOKEN, private=False)
    assert len(hub.asked(r"\.lfs", "PUT")) == 1
    assert json.loads((hub.folder / "me/new/.hub.json").read_text()) == {"private": False}
    push("llama", "me/other", TOKEN)
    push("llama", "me/new", TOKEN)
    assert len(hub.asked(r"\.lfs", "PUT")) == 1


def test_an_upload_is_tried_again_and_seen_only_whole(hub: Hub) -> None:
    hub.faults.append(Fault(r"\.lfs", status=503, times=1))
    push("llama", "me/new", TOKEN)
    assert len(hub.asked(r"\.lfs", "PUT")) == 2
    hub.faults.append(Fault("commit", status=500))
    error = refused("me/other", **TOKEN)
    assert error.reason == "hub_unreachable"
    assert names(hub.folder / "me/other") == {".hub.json"}


def test_who_may_not_write_is_told_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused()
    assert error.reason == "hub_unauthorized"
    assert error.what == (
        "Nothing is uploaded to the hub without an access token, and there is none here."
    )
    assert "role `write`" in error.remedy
    assert not hub.requests
    error = refused(**READS)
    assert error.what == "The token may not write to `me/new`."
    error = refused(**UNKNOWN)
    assert error.what == "The hub does not know the token."
    assert "hf_unknown" not in str(error.to_wire())
    assert refused(**NO_TOKEN).reason == "invalid_option"
    monkeypatch.setenv("HF_TOKEN", "hf_good_environment")
    assert push("llama", "me/new", {})["url"].endswith("/me/new")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(**TOKEN).reason == "hub_unreachable"


def test_what_has_no_name_is_not_uploaded(model: Path) -> None:
    for name, words in [("lama", "Did you mean `llama`"), (str(model), "Register it first")]:
        with pytest.raises(BridgeError, match=words):
            push(name, "me/new", TOKEN)
    for to in ("new", "me/new:Q8_0", "/models/new", "me/"):
        assert refused(to, **TOKEN).details["option"] == "repository"


def test_a_card_says_how_a_model_was_made() -> None:
    entry = Entry(
        name="llama",
        label="W4A16",
        path="/data/models/llama/W4A16",
        kind="model",
        registered_at=0,
        method="awq",
        bits=4,
        source="org/plain",
        revision="0123abcd" * 5,
        made=HOW,
        quality={"perplexity": 5.61234, "kl_mean": 0.0123, "says": ["ok"]},
    )
    assert card(entry, "me/new", {"license": "mit", "datasets": "x"}) == (
        """---
base_model: org/plain
base_model_relation: quantized
library_name: transformers
license: mit
tags:
- vllm
- awq
---

# new

A quantized model: `W4A16` (awq, 4 bits), made of [org/plain](https://huggingface.co/org/plain) at revision `0123abcd0123abcd0123abcd0123abcd0123abcd`.

## How it was made

| | |
| --- | --- |
| made on | 2026-11-28 |
| `bits` | 4 |
| `group_size` | 128 |
| `version` | a\\|b |
| `llmcompressor` | 0.14.0.1 |
| calibrated with | the library's own texts, 128 texts, 65536 tokens |

## What was lost

| | |
| --- | --- |
| perplexity | 5.612 |
| mean KL divergence from the source | 0.0123 |

Measured on text that it was not calibrated with, against what it was made of.

## Use in Elixir

```elixir
llm = VLLM.llm!("me/new")
VLLM.generate!(llm, "…")
```
"""  # noqa: E501
    )


def test_the_card_of_an_adapter_names_its_base() -> None:
    entry = Entry(name="sql", path="/a", kind="adapter", registered_at=0, base_model="org/plain")
    text = card(entry, "me/sql")
    assert "base_model_relation: adapter\nlibrary_name: peft\n" in text
    assert "A LoRA adapter, for [org/plain](https://huggingface.co/org/plain)." in text
    assert 'adapter = VLLM.lora_request!("sql", "me/sql")' in text
    local = Entry(name="sql", path="/a", kind="adapter", registered_at=0, base_model="/models/x")
    assert "/models/x" not in card(local, "me/sql")
    known = Entry(
        name="q", path="/q", kind="model", registered_at=0, source="org/plain", revision="0123abcd"
    )
    assert "0123abcd" not in card(known, "me/q")  # a fingerprint, which means nothing elsewhere
