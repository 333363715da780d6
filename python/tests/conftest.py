"""What several test files share."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inheriting
import refusals
from hub_server import Hub
from vllm_bridge import forking, preload
from vllm_bridge.hub import transfer

refusals.watch()

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "priv" / "models"

# As in priv/requirements/test.in: libgguf makes GGUF files in K and IQ types, and has no wheels for
# other machines.
NEEDS_LIBGGUF = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.version_info >= (3, 14),
    reason="libgguf has no wheel for this machine",
)


# Which files this process runs, of those that it has come to.
_taken: dict[str, bool] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=Path,
        metavar="FOLDER",
        help="run each file unless another process with this folder has begun it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leaves out what another process runs. Processes side by side are no workers of xdist: those
    have a thread that waits for the next order, and nothing could be forked from them."""
    folder = item.config.getoption("share")
    if folder is None:
        return None
    name = item.path.name
    if name not in _taken:
        with contextlib.suppress(FileExistsError):
            (folder / name).touch(exist_ok=False)
            _taken[name] = True
    return None if _taken.setdefault(name, False) else True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Engines of this process are forked, as those of workers are: the seed must be there before
    any test has run an operator or left a thread behind."""
    if any(item.get_closest_marker("engine") for item in session.items):
        os.environ.update(preload.environment())
        inheriting.prepare()
        assert forking.start()
    if "torch" in sys.modules:
        # For the operators of vLLM's that tests call in this process.
        from vllm_bridge.patches.cpu import amx

        amx.apply()


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Takes back the variables that the start of an engine sets, for the life of a worker."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Two pipes as (ours to read, theirs to write, theirs to read, ours to write), closed as far
    as they are still open."""
    fds = (*os.pipe(), *os.pipe())
    yield fds
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the hub without a model, which the client of this process asks. Nobody waits
    before asking it again."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(transfer, "_PAUSE", 0.001)
    # The client's own pauses
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    (tmp_path / "repositories/org").mkdir(parents=True)
    with Hub(tmp_path / "repositories") as hub:
        hub.answers(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture(scope="session")
def facts() -> dict[str, str]:
    """The sentences that the demo model knows by heart: prompts and their completions."""
    lines = (MODELS / "facts.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)
