"""Models of the hub that are looked at before they are fetched."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import hub_models
from hub_models import LLAMA, found, plain, repository, safetensors
from hub_server import Fault, Hub
from vllm_bridge.checkpoints import fit, gguf, torch_files
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import cache, download, ghost

# Of one tensor: more than a few requests for headers bring.
LARGE = 4_000_000


def of(name: str = "org/name", **options: Any) -> str:
    return ghost.of(found(name, **options), options)


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Those of a checkpoint, by the names of their files alone."""
    return {
        name: tensor._replace(file=os.path.basename(tensor.file))
        for name, tensor in checkpoint.tensors.items()
    }


def assert_the_same(hub: Hub, name: str, path: str, options: dict[str, Any]) -> Checkpoint:
    """A ghost says what the model says, and has not come for it."""
    original = check_model(str(hub.folder / path), options)
    looked_at = check_model(of(name, **options), options)
    assert tensors(looked_at) == tensors(original) != {}
    assert looked_at.config == original.config
    assert looked_at.files == original.files
    assert fit.loaded_bytes(looked_at, {}) == fit.loaded_bytes(original, {})
    large = hub.for_weights
    assert 0 < sum(one.sent for one in large) < 300_000 * len(original.files)
    return looked_at


def test_a_model_in_one_file(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain(LARGE))
    checkpoint = assert_the_same(hub, "org/name", "org/name", {})
    (file,) = checkpoint.files
    stat = os.stat(os.path.join(checkpoint.folder or "", file))
    assert stat.st_size > 2 * LARGE
    assert stat.st_blocks * 512 < 300_000


def test_a_model_in_shards_with_a_long_header(hub: Hub) -> None:
    names = [{f"model.layers.{n}.{k}.weight": 4000 for k in range(2000)} for n in range(2)]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: shards[n] for n, found in enumerate(names) for name in found}
    files: dict[str, Any] = {
        "config.json": LLAMA,
        "model.safetensors.index.json": {"weight_map": index},
    }
    for shard, held in zip(shards, names, strict=True):
        files[shard] = safetensors(held)
    repository(hub.folder, "org/name", files)
    assert_the_same(hub, "org/name", "org/name", {})
    # The first block, and the rest of the header
    assert len(hub.for_weights) == 4


def test_a_gguf_file(hub: Hub, tmp_path: Path) -> None:
    content = hub_models.gguf(tmp_path, filler="x" * 3_000_000) + bytes(20_000_000)
    repository(hub.folder, "org/files-GGUF", {"a/a.Q4_K_M.gguf": content})
    looked_at = gguf.read(of("org/files-GGUF"))
    original = gguf.read(str(hub.folder / "org/files-GGUF/a/a.Q4_K_M.gguf"))
    assert looked_at.metadata == original.metadata
    assert [one[:2] + one[3:] for one in looked_at.tensors.values()] == [
        one[:2] + one[3:] for one in original.tensors.values()
    ]
    asked = hub.for_weights
    assert sum(one.sent for one in asked) < 7_000_000
    assert len(asked) < 6


def test_a_file_of_torchs(hub: Hub, tmp_path: Path) -> None:
    state = {f"layer{n}": torch.zeros(n + 1, 30_000, dtype=torch.float16) for n in range(20)}
    torch.save({"weights": state, "note": "x" * 1000}, tmp_path / "qmodel.pt")
    files = {"config.json": LLAMA, "qmodel.pt": (tmp_path / "qmodel.pt").read_bytes()}
    repository(hub.folder, "org/name", files)
    path = os.path.join(of(), "qmodel.pt")
    expected = torch_files.read(str(tmp_path / "qmodel.pt"))
    expected["weights"] = {
        name: tensor._replace(file=path) for name, tensor in expected["weights"].items()
    }
    assert torch_files.read(path) == expected
    assert sum(one.sent for one in hub.for_weights) < 500_000


def test_small_files_are_fetched_once_for_ghost_and_model(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain())
    folder = Path(of())
    assert (folder / "tokenizer.json").read_text() == '{"model": {}}'
    assert cache.snapshot("org/name", "main", {}) is None
    download.pull(found(), {})
    assert len(hub.asked("/resolve/.*tokenizer.json")) == 1


def test_a_hub_that_does_not_say_what_files_are(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub.folder, "org/name", plain())
    known = found()
    files = tuple(file._replace(sha256=None, blob=None) for file in known.files)
    unknown = dataclasses.replace(known, files=files)
    expected = tensors(check_model(str(hub.folder / "org/name"), {}))
    assert tensors(check_model(ghost.of(unknown, {}), {})) == expected
    folder = Path(download.pull(unknown, {}))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_what_is_damaged_on_the_hub_is_damaged_here(hub: Hub) -> None:
    files = plain() | {"model.safetensors": b"\xff" * 100_000}
    repository(hub.folder, "org/name", files)
    with pytest.raises(BridgeError) as caught:
        check_model("org/name", {})
    assert caught.value.reason == "invalid_checkpoint"
    repository(hub.folder, "org/files-GGUF", {"a.gguf": b"no" * 1000})
    with pytest.raises(BridgeError) as caught:
        check_model("org/files-GGUF", {})
    assert caught.value.reason == "invalid_checkpoint"
    repository(hub.folder, "org/torch", {"config.json": LLAMA, "qmodel.pt": b"no" * 1000})
    with pytest.raises(BridgeError):
        torch_files.read(os.path.join(of("org/torch"), "qmodel.pt"))


def test_a_hub_without_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub.folder, "org/name", plain(100_000))
    monkeypatch.setattr(Hub, "knows_ranges", False)
    assert tensors(check_model(of(), {})) == tensors(check_model(str(hub.folder / "org/name"), {}))


def test_a_gated_model(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain(), gated="auto")
    with pytest.raises(BridgeError) as caught:
        of()
    assert caught.value.reason == "model_gated"


def test_a_hub_that_goes_away(hub: Hub) -> None:
    repository(hub.folder, "org/name", plain())
    hub.faults.append(Fault("model.safetensors", "cut", after=10, times=3))
    assert tensors(check_model(of(), {})) == tensors(check_model(str(hub.folder / "org/name"), {}))
    hub.faults.append(Fault("model.safetensors", "cut"))
    with pytest.raises(BridgeError) as caught:
        of()
    assert caught.value.reason == "hub_unreachable"
