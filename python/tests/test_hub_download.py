"""Downloads, by the real client from a stand-in of the hub with faults."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

import hub_models
from hub_models import found, plain, repository
from hub_server import Fault, Hub
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import cache, download, errors
from vllm_bridge.hub.download import Progress, pull
from vllm_bridge.hub.repository import File

PYTHON = Path(__file__).resolve().parents[1]

# So large that it comes in many pieces.
LARGE = 2_000_000


@pytest.fixture
def hub(hub: Hub) -> Hub:
    repository(hub.folder, "org/name", plain(LARGE))
    return hub


def fetched(name: str = "org/name", **options: Any) -> Path:
    return Path(pull(found(name, **options), options))


def assert_came_whole(hub: Hub, folder: Path) -> None:
    original = hub.folder / "org/name/model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()


def refused(name: str = "org/name", **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        fetched(name, **options)
    return caught.value


def blobs(name: str = "org/name") -> Path:
    return Path(cache.storage(name, {}), "blobs")


def is_model(name: str = "org/name") -> bool:
    """Whether anybody would take what is here for a model."""
    return any(Path(cache.storage(name, {})).glob("snapshots/*/config.json"))


def test_a_model_comes_whole_and_only_what_is_needed(hub: Hub) -> None:
    original = hub.folder / "org/name"
    (original / "pytorch_model.bin").write_bytes(b"no")
    (original / "README.md").write_text("no")
    folder = fetched()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (original / name).read_bytes()
    assert not hub.asked("pytorch_model.bin|README")


def test_the_client_finds_what_we_fetched_and_we_what_it_did(hub: Hub) -> None:
    folder = fetched()
    assert snapshot_download("org/name", local_files_only=True) == str(folder)
    repository(hub.folder, "org/other", plain())
    snapshot_download("org/other")
    before = len(hub.asked("resolve"))
    assert fetched("org/other").name == found("org/other").commit
    assert len(hub.asked("resolve")) == before


def test_the_client_and_we_wait_for_each_other(hub: Hub, tmp_path: Path) -> None:
    fetched()
    snapshot_download("org/name", cache_dir=tmp_path / "other")
    locks = [
        {path.name for path in folder.glob(".locks/models--org--name/*.lock")}
        for folder in (Path(cache.folder({})), tmp_path / "other")
    ]
    assert len(locks[0]) == 3
    assert locks[0] == locks[1]


def test_what_is_here_is_not_asked_for_again(hub: Hub) -> None:
    folder = fetched()
    before = len(hub.requests)
    assert fetched() == folder
    assert [one.path for one in hub.requests[before:]] == ["/api/models/org/name?blobs=true"]


def test_progress(hub: Hub) -> None:
    told: list[Progress] = []
    repository = found()
    pull(repository, {}, told.append)
    assert told[-1] == Progress(
        repository.size, repository.size, 3, 3, told[-1].bytes_per_second, told[-1].seconds_left
    )
    assert [one.bytes for one in told] == sorted(one.bytes for one in told)


def test_speed_and_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vllm_bridge.hub.download.time.monotonic", lambda: now[0])
    files = [File("a", 100, blob="aa"), File("b", 1000, blob="bb")]
    (tmp_path / "aa").write_bytes(bytes(100))
    meter = download._Meter(str(tmp_path), files)
    assert meter.read() == Progress(100, 1100, 1, 2, None, None)
    now[0] += 1
    (tmp_path / "bb.incomplete").write_bytes(bytes(200))
    assert meter.read() == Progress(300, 1100, 1, 2, 200.0, 4.0)
    # Nothing came for long enough that nobody knows when it will end. What another program's
    # client has on the way counts as well.
    now[0] += 100
    assert meter.read() == Progress(300, 1100, 1, 2, None, None)
    now[0] += 2
    (tmp_path / "bb.1234abcd.incomplete").write_bytes(bytes(700))
    assert meter.read() == Progress(800, 1100, 1, 2, 250.0, 1.2)


def test_files_of_a_subfolder_a_revision_and_a_gguf_file(hub: Hub, tmp_path: Path) -> None:
    files = {f"sub/{name}": content for name, content in plain().items()}
    repository(hub.folder, "org/name@v1", files)
    folder = fetched(revision="v1", subfolder="sub")
    assert folder.name == "sub"
    assert (folder / "model.safetensors").is_file()
    assert sorted(os.listdir(folder.parent)) == ["sub"]
    gguf = hub_models.gguf(tmp_path)
    repository(hub.folder, "org/files-GGUF", {"a.Q8_0.gguf": gguf, "a.Q4_K_M.gguf": gguf})
    path = fetched("org/files-GGUF")
    assert path.name == "a.Q4_K_M.gguf"
    assert path.read_bytes() == gguf
    assert not hub.asked("Q8_0")


def test_tokens_stay_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub.folder, "org/private", plain(), private=True)
    assert refused("org/private").reason == "model_not_found"
    options = {"hf_token": "hf_good_by_option"}
    assert fetched("org/private", **options).is_dir()
    asked = [one for one in hub.requests if one.token]
    assert {one.token for one in asked} == {"hf_good_by_option"}
    assert hub.for_weights
    assert not [one for one in asked if one.is_cdn]
    repository(hub.folder, "org/private2", plain(), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_good_by_variable")
    assert fetched("org/private2").is_dir()


# -- faults


def cut(kind: str, times: int = 2**31) -> Fault:
    return Fault("model.safetensors", kind, after=1_000_000, times=times)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_connection_that_is_cut_is_taken_up_where_it_was(hub: Hub, kind: str) -> None:
    hub.faults.append(cut(kind, times=2))
    assert_came_whole(hub, fetched())
    asked = hub.for_weights
    assert len(asked) == 3
    assert asked[0].range is None
    assert all(one.range for one in asked[1:])


def test_a_hub_without_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "knows_ranges", False)
    hub.faults.append(cut("cut", times=1))
    assert_came_whole(hub, fetched())


def test_a_hub_that_sends_more_than_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    known = found()
    files = tuple(file._replace(size=file.size - 1) for file in known.files)
    with pytest.raises(BridgeError) as caught:
        pull(dataclasses.replace(known, files=files), {})
    assert caught.value.reason == "download_corrupt"
    assert not is_model()


def test_a_connection_that_falls_silent_is_made_anew(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.faults.append(cut("stall", times=1))
    assert fetched().is_dir()
    asked = hub.for_weights
    size = os.path.getsize(hub.folder / "org/name/model.safetensors")
    assert {one.range for one in asked} == {None, f"bytes=1000000-{size - 1}"}


def test_a_hub_that_is_cut_again_and_again(hub: Hub) -> None:
    hub.faults.append(Fault("model.safetensors", "cut", after=0))
    error = refused()
    assert error.reason == "hub_unreachable"
    assert not is_model()
    assert len(hub.for_weights) == 6


def test_a_failure_of_the_hub_passes(hub: Hub) -> None:
    hub.faults.append(Fault("resolve.*model.safetensors", status=503, method="GET", times=2))
    assert fetched().is_dir()


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        (Fault("/api/", status=500), "hub_unreachable", "an error of its own (500)"),
        (Fault("resolve", status=500), "hub_unreachable", "an error of its own (500)"),
        (
            Fault("/api/", status=429, headers={"Retry-After": "7"}),
            "rate_limited",
            "Try again in 7 seconds",
        ),
        (
            Fault("/api/", status=429, headers={"RateLimit": '"api";r=0;t=55'}),
            "rate_limited",
            "Try again in 55 seconds",
        ),
        (Fault("/api/", status=403), "hub_unauthorized", "does not let read org/name"),
        (Fault("resolve.*config.json", status=403), "hub_unauthorized", "does not let read"),
    ],
)
def test_what_the_hub_answers(hub: Hub, fault: Fault, reason: str, told: str) -> None:
    hub.faults.append(fault)
    error = refused()
    assert (error.reason, error.details["status"]) == (reason, fault.status)
    assert told in error.message
    assert not is_model()


def test_when_to_ask_again(hub: Hub) -> None:
    hub.faults.append(Fault("/api/", status=429, headers={"Retry-After": "7"}))
    assert refused().details["retry_after_ms"] == 7000


def test_the_hub_is_asked_less_when_it_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    headers = {"Retry-After": "30"}
    hub.faults.append(
        Fault("resolve.*tokenizer", status=429, headers=headers, method="GET", times=2)
    )
    assert fetched().is_dir()
    assert waited == [31.0, 31.0]


def test_a_token_that_the_hub_does_not_know(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hf_token": "hf_bad_secret_1"}
    error = refused(**options)
    assert error.reason == "hub_unauthorized"
    assert "the option `hf_token`" in error.message
    monkeypatch.setenv("HF_TOKEN", "hf_bad_secret_2")
    error = refused()
    assert "`HF_TOKEN`" in error.message
    assert "secret" not in json.dumps(error.to_wire())


@pytest.mark.parametrize("token", ["hf_good\n", "", "hf_good é", "hf_a b", 5, ["hf_good"]])
def test_what_can_be_no_token(hub: Hub, token: Any) -> None:
    error = refused(hf_token=token)
    assert (error.reason, error.details) == ("invalid_option", {"option": "hf_token"})
    assert hub.requests == []


def test_the_token_of_a_login_that_never_was(hub: Hub) -> None:
    error = refused(hf_token=True)
    assert error.reason == "hub_unauthorized"
    assert "`hf auth login`" in error.message


def test_a_gated_model(hub: Hub) -> None:
    repository(hub.folder, "org/gated", plain(), gated="manual")
    for options in ({}, {"hf_token": "hf_good_and_not_granted"}):
        error = refused("org/gated", **options)
        assert error.reason == "model_gated"
        assert "https://huggingface.co/org/gated" in error.message
    repository(hub.folder, "org/gated", {}, gated="manual", granted=True)
    options = {"hf_token": "hf_good_and_granted"}
    assert fetched("org/gated", **options).is_dir()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("org/none", {}, "has no model `org/none`"),
        ("org/name", {"revision": "v9"}, "no revision `v9`"),
        ("org/name", {"subfolder": "none"}, "no folder `none`"),
        ("org/na--me", {}, "nor a name that a model can have"),
        ("org/name:Q8_0", {}, "no GGUF file"),
    ],
)
def test_what_is_not_there(hub: Hub, name: str, options: dict[str, str], told: str) -> None:
    error = refused(name, **options)
    assert error.reason == "model_not_found"
    assert told in error.message


@pytest.mark.parametrize("option", ["subfolder", "revision"])
def test_a_path_that_leads_out_or_is_none(hub: Hub, option: str) -> None:
    for path in ("../x", "a/../../x", "/x", "a\0"):
        error = refused(**{option: path})
        assert (error.reason, error.details["option"]) == ("invalid_option", option)
    unusable: dict[str, Any] = {option: 5}
    assert refused(**unusable).reason == "invalid_option"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("commit", "name", "size"),
    [
        ("../../x", "config.json", 1),
        ("0" * 40, 5, 1),
        ("0" * 40, "config.json", -1),
        ("0" * 40, "config.json", 2**63),
        ("0" * 40, "config.json", "1"),
    ],
)
def test_a_hub_that_names_no_commit_or_no_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, commit: str, name: Any, size: Any
) -> None:
    file = type("File", (), {"rfilename": name, "size": size, "blob_id": None, "lfs": None})
    info = type("Info", (), {"siblings": [file], "sha": commit})
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    error = refused()
    assert error.reason == "hub_unreachable"
    assert "HF_ENDPOINT" in error.message


def test_the_client_may_be_asked_to_fetch_itself(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")
    monkeypatch.setattr(download, "_WORTHWHILE", LARGE)
    assert_came_whole(hub, fetched())
    # It asks where a file is, and goes there by itself.
    asked = [one for one in hub.requests if "/resolve/" in one.path and "model.saf" in one.path]
    assert [one.method for one in asked] == ["HEAD"]


def test_corrupt_files_are_removed_and_told(hub: Hub) -> None:
    hub.faults.append(cut("corrupt"))
    error = refused()
    assert error.reason == "download_corrupt"
    assert error.details["file"] == "model.safetensors"
    assert not is_model()
    # Not even a rest of it. Of files that were on their way when it failed, a rest may stay.
    (file,) = [one for one in found().files if one.path == "model.safetensors"]
    assert file.blob is not None
    assert not [name for name in os.listdir(blobs()) if name.startswith(file.blob)]
    hub.faults.clear()
    assert fetched().is_dir()


def test_small_files_are_compared_too(hub: Hub) -> None:
    hub.faults.append(Fault("resolve.*config.json", "corrupt", method="GET"))
    assert refused().details["file"] == "config.json"


def test_a_rest_that_was_damaged_is_fetched_anew(hub: Hub) -> None:
    repository = found()
    (file,) = [one for one in repository.files if one.path == "model.safetensors"]
    blobs().mkdir(parents=True)
    Path(download.where(repository, file, {}) + cache.INCOMPLETE).write_bytes(bytes(100_000))
    assert_came_whole(hub, fetched())


def test_a_file_that_became_shorter_is_fetched_anew(hub: Hub) -> None:
    file = fetched() / "model.safetensors"
    os.truncate(file, 1000)
    assert os.path.getsize(fetched() / "model.safetensors") == file.stat().st_size > 1000


def test_too_little_space_is_told_before_anything_comes(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": LARGE})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    error = refused()
    assert error.reason == "disk_full"
    assert error.details["free_bytes"] == LARGE
    assert error.details["needed_bytes"] == found().size
    assert not hub.asked("resolve")


def test_a_full_disk_of_which_no_path_is_known() -> None:
    with pytest.raises(BridgeError) as caught, errors.told("org/name"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.reason == "disk_full"
    assert "The disk of the downloaded models," in caught.value.what


def test_a_folder_that_cannot_be_written_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refused(download_dir=str(tmp_path / "file"))
    assert error.reason == "cache_not_writable"
    assert str(tmp_path / "file") in error.message


def test_names_that_leave_the_repository_are_left_out(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling = type("Sibling", (), {"size": 1, "blob_id": "0" * 40, "lfs": None})
    files = []
    for path in ("../../config.json", "/etc/config.json", "a/../config.json", "\0config.json"):
        files.append(sibling())
        files[-1].rfilename = path
    info = type("Info", (), {"siblings": files, "sha": "0" * 40})
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    error = refused()
    assert error.reason == "not_a_model"
    assert "`subfolder`" in error.remedy


# With 25, files are left without a config in a snapshot.
@pytest.mark.parametrize("seed", [*range(5), 25])
def test_whatever_goes_wrong_a_model_is_whole_or_not_there(hub: Hub, seed: int) -> None:
    original = repository(hub.folder, "org/name", plain(100_000))
    chance = random.Random(seed)  # noqa: S311
    for _ in range(4):
        path = chance.choice(["/api/models", "resolve", "config.json", "model.saf", "tokenizer"])
        kinds = ("cut", "reset", "corrupt", "status", "status")
        hub.faults.append(
            Fault(
                path,
                chance.choice(kinds),  # type: ignore[arg-type]
                status=chance.choice([401, 403, 404, 429, 500, 503]),
                after=chance.choice([0, 10, 100_000]),
                skip=chance.randrange(3),
                times=chance.randrange(1, 9),
            )
        )
    reasons = {
        "hub_unreachable", "hub_unauthorized", "rate_limited", "download_corrupt",
        "model_not_found",
    }  # fmt: skip
    errors: list[BridgeError] = []
    folder = None
    while folder is None and len(errors) < 40:
        try:
            folder = fetched()
        except BridgeError as error:
            errors.append(error)
            assert not is_model()
    assert folder is not None
    assert {error.reason for error in errors} <= reasons
    assert all(error.remedy for error in errors)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()


# -- without the hub


def test_what_is_here_is_used_while_the_hub_is_away(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched()
    for status in (500, 429):
        hub.faults[:] = [Fault("", status=status)]
        assert fetched() == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetched() == folder
    assert fetched(revision=folder.name) == folder
    assert refused(revision="v1").reason == "hub_unreachable"
    error = refused("org/other")
    assert error.reason == "hub_unreachable"
    assert "HF_HUB_OFFLINE" in error.message
    assert hub.requests == []


def test_a_model_that_the_hub_no_longer_gives_is_still_here(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetched()
    repository(hub.folder, "org/name", {}, private=True)
    assert fetched() == folder
    assert f"org/name is taken as it was downloaded ({folder.name})" in caplog.text
    assert fetched(hf_token="hf_bad_1") == folder  # noqa: S106
    assert refused(revision="v1").reason == "model_not_found"


def test_a_branch_is_remembered_whose_commit_was_fetched(hub: Hub) -> None:
    commit = found().commit
    folder = fetched(revision=commit)
    assert cache.snapshot("org/name", "main", {}) is None
    found()
    assert cache.snapshot("org/name", "main", {}) == (commit, str(folder))


def test_half_a_model_is_none_while_the_hub_is_away(hub: Hub) -> None:
    hub.faults.append(Fault("model.safetensors", "cut"))
    assert refused().reason == "hub_unreachable"
    assert sorted(path.stat().st_size for path in blobs().iterdir())[-1] < 1000
    hub.faults[:] = [Fault("", status=500)]
    assert refused().reason == "hub_unreachable"


def test_a_model_that_was_not_put_in_its_place_is_none_while_the_hub_is_away(hub: Hub) -> None:
    hub.faults.append(Fault("model.safetensors", status=500, method="HEAD"))
    assert refused().reason == "hub_unreachable"
    assert [path.name for path in Path(cache.storage("org/name", {})).glob("snapshots/*/*")] == [
        "tokenizer.json"
    ]
    hub.faults[:] = [Fault("", status=500)]
    assert refused(revision=found_commit(hub)).reason == "hub_unreachable"
    # Other programs fetch configs alone.
    hub.faults.clear()
    hf_hub_download("org/name", "config.json")
    hub.faults[:] = [Fault("", status=500)]
    assert refused().reason == "hub_unreachable"


def found_commit(hub: Hub) -> str:
    repository = hub.repository("org/name")
    assert repository is not None
    return repository.commit


def test_another_gguf_file_of_a_downloaded_one(hub: Hub, tmp_path: Path) -> None:
    gguf = hub_models.gguf(tmp_path)
    repository(hub.folder, "org/files-GGUF", {"a.Q8_0.gguf": gguf, "a.Q4_K_M.gguf": gguf})
    fetched("org/files-GGUF")
    hub.faults.append(Fault("", status=500))
    assert refused("org/files-GGUF:Q8_0").reason == "hub_unreachable"


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    error = refused()
    assert error.reason == "hub_unreachable"
    assert "HTTPS_PROXY" in error.message


# -- other processes

SCRIPT = """
import os, resource, sys
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import download, look_up, names
if len(sys.argv) > 1:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(download.pull(look_up.look_up(names.parse("org/name"), {}), {}), flush=True)
except BridgeError as error:
    print(error.reason, flush=True)
"""


def start(hub: Hub, tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(PYTHON),
    }
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_download_that_was_killed_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(cut("stall", times=1))
    with start(hub, tmp_path) as process:
        assert hub.stalled.wait(60)
        part = wait_for_part(1_000_000)
        process.send_signal(signal.SIGKILL)
    assert not is_model()
    came = part.stat().st_size
    assert_came_whole(hub, fetched())
    last = hub.for_weights[-1]
    size = os.path.getsize(hub.folder / "org/name/model.safetensors")
    assert last.range == f"bytes={came}-{size - 1}"
    assert last.sent == size - came


def wait_for_part(size: int) -> Path:
    """The file that is on the way, when so much of it is on the disk."""
    ticking = threading.Event()
    while True:
        for path in blobs().glob(f"*{cache.INCOMPLETE}"):
            if path.stat().st_size >= size:
                return path
        ticking.wait(0.01)


def test_of_several_processes_one_downloads(hub: Hub, tmp_path: Path) -> None:
    with start(hub, tmp_path) as one, start(hub, tmp_path) as other:
        assert one.stdout is not None
        assert other.stdout is not None
        folders = {one.stdout.read(), other.stdout.read()}
    assert folders == {f"{fetched()}\n"}
    assert len(hub.for_weights) == 1


def test_a_disk_that_becomes_full(hub: Hub, tmp_path: Path) -> None:
    with start(hub, tmp_path, "1000000") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "disk_full\n"
    assert not is_model()
    assert fetched().is_dir()  # once there is room
