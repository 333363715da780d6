"""The whole worker: guard, process, pipes and engine, as Elixir starts it."""

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import MODELS, ROOT
from peer import HELLO, Peer, pack
from test_guard import Run
from vllm_bridge import PROTOCOL_VERSION
from vllm_bridge.__main__ import NOT_INSTALLED
from vllm_bridge.rpc.server import EXIT_ENGINE_DEAD, EXIT_OK, EXIT_PROTOCOL

PYTHON = ROOT / "python"
LOAD: dict[str, Any] = {
    "model": str(MODELS / "demo"),
    "options": {"enforce_eager": True, "kv_cache_memory_bytes": 2**28},
}
GREEDY = {"temperature": 0.0, "max_tokens": 32}


def pipe() -> tuple[int, int]:
    """A pipe whose ends are not in the way of the numbers that the child gets."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PYTHON)}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[str]]:
    """Has a worker forked, as Elixir does by default, and not import vLLM itself."""
    program = [sys.executable, "-m", "vllm_bridge", "nursery"]
    run = Run(tmp_path_factory.mktemp("nursery") / "run", program, ENVIRONMENT, ["--alone"])
    run.await_lock()
    yield ("--nursery", str(run.folder / "tmp" / "nursery"))
    run.dispose()


class Worker:
    def __init__(self, run_folder: Path, program: Sequence[str], mode: Sequence[str] = ()) -> None:
        self.folder = run_folder
        self.log = run_folder / "log"
        from_us, to_child = pipe()
        to_us, from_child = pipe()
        self.pid = os.posix_spawn(
            sys.executable,
            [
                *(sys.executable, "-I", "-S", str(PYTHON / "vllm_bridge" / "guard.py")),
                *(*mode, str(run_folder), "--", sys.executable, *program),
            ],
            ENVIRONMENT,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, from_us, 3),
                (os.POSIX_SPAWN_DUP2, from_child, 4),
            ],
        )
        os.close(from_us)
        os.close(from_child)
        self.peer = Peer(to_us, to_child)

    async def status(self) -> int:
        """How the guard ended, once everything is gone."""
        pidfd = os.pidfd_open(self.pid)
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def reap() -> None:
            ended.get_loop().remove_reader(pidfd)
            os.close(pidfd)
            ended.set_result(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))

        ended.get_loop().add_reader(pidfd, reap)
        return await asyncio.wait_for(ended, 60)

    def process(self, title: str) -> psutil.Process:
        # A nursery's guard is another process than the one that was started.
        guard = int((self.folder / "lock").read_text().split()[1])
        (process,) = (
            child
            for child in psutil.Process(guard).children(recursive=True)
            if title in " ".join(child.cmdline())
        )
        return process


def run(
    tmp_path: Path,
    scenario: Callable[[Worker], Awaitable[None]],
    program: Sequence[str] = ("-m", "vllm_bridge"),
    mode: Sequence[str] = (),
) -> None:
    async def main() -> None:
        worker = Worker(tmp_path / "run", program, mode)
        try:
            await worker.peer.start_reading()
            answer = await worker.peer.call("hello", HELLO)
            assert answer["protocol"] == PROTOCOL_VERSION
            await asyncio.wait_for(scenario(worker), 240)
        finally:
            worker.peer.close()

    asyncio.run(main())


def test_a_worker_ends_with_its_input(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        worker.peer.close_input()
        assert await worker.status() == EXIT_OK

    run(tmp_path, scenario)


def test_a_worker_ends_on_shutdown(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        worker.peer.send(2, "shutdown", {})
        assert await worker.status() == EXIT_OK

    run(tmp_path, scenario)


# A worker that tells what it has imported when it ends.
TELLING = """
import os, sys
from vllm_bridge.__main__ import main

def tell(status, end=os._exit):
    print("imported:", *sys.modules, file=sys.stderr, flush=True)
    end(status)

os._exit = tell
main(*sys.argv[1:])
"""
HEAVY = {"torch", "vllm", "transformers", "huggingface_hub", "numpy"}


def imported(worker: Worker) -> set[str]:
    (modules,) = re.findall("^imported: (.*)$", worker.log.read_text(), re.MULTILINE)
    return set(modules.split())


def test_hello_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        worker.peer.send(2, "shutdown", {})
        assert await worker.status() == EXIT_OK
        assert "vllm_bridge.engine" in imported(worker)
        assert imported(worker) & HEAVY == set()

    run(tmp_path, scenario, ["-c", TELLING])


def test_tools_tell_of_packages_without_importing_them(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        names = ["msgspec", "torch", "no-such-package"]
        assert await worker.peer.call("packages", {"names": names}) == {
            name: metadata.version(name) for name in names[:2]
        }
        assert (await worker.peer.call("generate"))["reason"] == "protocol"
        worker.peer.send(2, "shutdown", {})
        assert await worker.status() == EXIT_OK
        assert imported(worker) & (HEAVY | {"vllm_bridge.engine", "asyncio"}) == {"asyncio"}

    run(tmp_path, scenario, ["-c", TELLING, "tools"])


@pytest.mark.engine
@pytest.mark.slow
def test_tools_tell_which_quantization_runs_here(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        methods = {one["name"]: one for one in await worker.peer.call("methods")}
        assert methods["fp8"]["in_flight"]["runs"] is True
        assert methods["awq"]["formats"] == [
            {"name": "awq (4 bits)", "bits": 4, "runs": True, "why_not": None}
        ]

    run(tmp_path, scenario, ["-m", "vllm_bridge", "tools"])


def test_a_kind_of_worker_that_there_is_not_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        worker = Worker(tmp_path / "run", ["-m", "vllm_bridge", "hammer"])
        assert await worker.status() == 1
        assert "no kind of worker `hammer`, only engine, tools" in worker.log.read_text()
        worker.peer.close()

    asyncio.run(main())


@pytest.mark.parametrize("package", ["vllm", "torch", "msgspec"])
def test_a_missing_package_ends_a_worker_with_the_status_that_says_so(
    tmp_path: Path, package: str
) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from vllm_bridge import __main__"

    async def main() -> None:
        worker = Worker(tmp_path / "run", ["-c", script + "; __main__.main()"])
        assert await worker.status() == NOT_INSTALLED
        assert package in worker.log.read_text()
        worker.peer.close()

    asyncio.run(main())


BROKEN = {
    "a length above max_frame": (b"\xff\xff\xff\xff", "longer than max_frame"),
    "nothing at all": (b"\0\0\0\0", "truncated"),
    "a byte that starts nothing": (b"\0\0\0\1\xc1", "not a message"),
    "a response": (pack([1, 7, None, {}]), "a response came to the side that answers"),
    "an id twice": (pack([0, 7, "load", {}]) * 2, "request id 7 is in use"),
    "a negative id": (pack([0, -1, "load", {}]), "not a message"),
    "a cancel of nothing": (pack([2, "cancel", {}]), "a cancel without an id"),
    "a credit of nothing": (pack([2, "credit", {"id": 7, "count": 0}]), "a credit that is none"),
    "arrays in arrays": ((10_000).to_bytes(4) + b"\x91" * 10_000, "not a message"),
}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        # Each starts a worker.
        pytest.param(*case, id=name, marks=() if "id" in name else pytest.mark.slow)
        for name, case in BROKEN.items()
    ],
)
def test_a_worker_ends_when_the_protocol_is_broken(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    async def scenario(worker: Worker) -> None:
        worker.peer.write(data)
        assert await worker.status() == EXIT_PROTOCOL
        assert reason in worker.log.read_text()

    run(tmp_path, scenario)


def test_a_frame_that_breaks_off_ends_with_its_input(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        worker.peer.write(b"\0\0\1\0\x94")
        worker.peer.close_input()
        assert await worker.status() == EXIT_OK

    run(tmp_path, scenario)


def test_unknown_methods_and_late_cancels_harm_no_worker(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        peer = worker.peer
        error = await peer.call("no_such_method")
        assert error["reason"] == "protocol"
        peer.cancel(1)
        peer.cancel(2**62)
        peer.send(2, "credit", {"id": 1, "count": 1})
        peer.send(2, "no_such_notification", {"x": 1})
        error = await peer.call("load", {"model": "/no/such/model"})
        assert error["reason"] == "model_not_found"

    run(tmp_path, scenario)


def test_a_model_that_is_not_there_is_refused_before_vllm_is_imported(tmp_path: Path) -> None:
    async def scenario(worker: Worker) -> None:
        error = await worker.peer.call("load", {"model": "/no/such/model"})
        assert error["reason"] == "model_not_found"
        assert worker.peer.notifications == []
        worker.peer.close_input()
        assert await worker.status() == EXIT_OK

    run(tmp_path, scenario)


@pytest.mark.engine
@pytest.mark.slow
def test_from_load_to_the_end(tmp_path: Path, facts: dict[str, str]) -> None:
    async def scenario(worker: Worker) -> None:
        peer = worker.peer
        info = await peer.call("load", LOAD)
        assert info["architecture"] == "LlamaForCausalLM"
        assert [params["phase"] for _, params in peer.notifications] == [
            "import",
            "config",
            "engine",
        ]
        assert await peer.call("engine_info") == info

        prompts = {
            peer.request("generate", {"prompt": prompt, "sampling_params": GREEDY}): prompt
            for prompt in facts
        }
        for _ in facts:
            id, error, output = await peer.response()
            assert error is None
            assert output["outputs"][0]["text"] == facts[prompts.pop(id)]

        endless = {"max_tokens": 8000, "ignore_eos": True, "temperature": 1.0}
        request: dict[str, Any] = {"prompt": "The", "sampling_params": endless}
        cancelled = peer.request("generate", request)
        late = peer.request("generate", request | {"timeout": 0.5})
        peer.cancel(cancelled)
        ends = {
            id: (error or {})["reason"] for id, error, _ in [await peer.response() for _ in "ab"]
        }
        assert ends == {cancelled: "aborted", late: "timeout"}

        # An engine that dies takes the worker with it, whose end is the answer.
        peer.request("generate", request)
        await peer.call("engine_info")
        worker.process("VLLM::EngineCore").send_signal(signal.SIGKILL)
        assert await worker.status() == EXIT_ENGINE_DEAD
        assert re.search(r"engine died \(EngineCore\w*: SIGKILL\)", worker.log.read_text())

    run(tmp_path, scenario)


@pytest.mark.engine
@pytest.mark.slow
def test_what_vllm_ends_is_no_answer(tmp_path: Path, nursery: Sequence[str]) -> None:
    async def scenario(worker: Worker) -> None:
        peer = worker.peer
        await peer.call("load", LOAD)

        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
        choice: dict[str, Any] = {"choice": ["Paris"]}
        cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
            ("generate", {"prompt": "The"}, {"allowed_token_ids": [5, 6]}, "grammar rejected"),
            ("generate", {"prompt": "The", "credit": 8}, {"allowed_token_ids": [5]}, "rejected"),
            (
                "generate",
                {"prompt": "The"},
                {"allowed_token_ids": [5], "n": 2, "temperature": 1.0},
                "rejected",
            ),
            ("chat", chat, {"allowed_token_ids": [5]}, "rejected"),
        ]
        for method, request, params, words in cases:
            params = GREEDY | {"structured_outputs": choice} | params
            error = await peer.call(method, request | {"sampling_params": params})
            assert error["reason"] == "invalid_option"
            assert error["details"]["option"] == "structured_outputs"
            assert "error" in [kept["finish_reason"] for kept in error["details"]["outputs"]]
            assert words in error["message"].partition("vLLM says:")[2]
        impossible: list[dict[str, Any]] = [
            {"regex": r"[^\s\S]"},
            {"regex": r"\p{L}+"},
            {"json": {"$ref": "#"}},
        ]
        for structure in impossible:
            params = GREEDY | {"structured_outputs": structure}
            error = await peer.call("generate", {"prompt": "The", "sampling_params": params})
            assert error["reason"] == "invalid_option"

        # What an operating system sends to every process when it stops.
        endless = {"max_tokens": 8000, "ignore_eos": True, "temperature": 1.0}
        request = {"prompt": "The", "sampling_params": endless}
        beams = {"beam_width": 2, "max_tokens": 8000, "ignore_eos": True}
        search = peer.request("beam_search", {"prompt": "The", "beam_search_params": beams})
        requests = {
            search,
            peer.request("generate", request),
            peer.request("generate", request | {"sampling_params": endless | {"n": 2}}),
            peer.request("generate", request | {"credit": 100_000}),
            peer.request("chat", chat | {"sampling_params": endless}),
        }
        await peer.receive()
        worker.process("VLLM::EngineCore").send_signal(signal.SIGTERM)
        ends: dict[int, dict[str, Any] | None] = {}
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                id, error, _ = await peer.response()
                ends[id] = error
        assert ends.keys() == requests
        for id, error in ends.items():
            assert error is not None
            assert error["reason"] == "engine_dead"
            assert error["details"]["outputs"]
            # The search may be at its first step.
            generated = [kept["token_ids"] for kept in error["details"]["outputs"]]
            assert id == search or all(generated)
            assert error["details"]["log"]
        assert await worker.status() == EXIT_ENGINE_DEAD

    run(tmp_path, scenario, mode=nursery)


@pytest.mark.engine
@pytest.mark.slow
def test_vectors_that_vllm_ends_are_no_fault_of_the_worker(
    tmp_path: Path, nursery: Sequence[str]
) -> None:
    async def scenario(worker: Worker) -> None:
        pooling = LOAD["options"] | {"runner": "pooling", "convert": "embed"}
        await worker.peer.call("load", LOAD | {"options": pooling})
        for number in range(200):
            worker.peer.request("pool", {"prompt": f"{number} is the number. " * 300})
        first, *_ = [await worker.peer.response() for _ in range(2)]
        assert first[1] is None
        worker.process("VLLM::EngineCore").send_signal(signal.SIGTERM)
        with contextlib.suppress(asyncio.IncompleteReadError):
            for _ in range(200):
                _id, error, output = await worker.peer.response()
                assert error["reason"] == "engine_dead" if error else output["shape"] == [256]
        assert await worker.status() == EXIT_ENGINE_DEAD

    run(tmp_path, scenario, mode=nursery)


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_that_dies_while_it_is_idle(tmp_path: Path, nursery: Sequence[str]) -> None:
    async def scenario(worker: Worker) -> None:
        await worker.peer.call("load", LOAD)
        worker.process("VLLM::EngineCore").send_signal(signal.SIGKILL)
        assert await worker.status() == EXIT_ENGINE_DEAD

    run(tmp_path, scenario, mode=nursery)


@pytest.mark.engine
@pytest.mark.slow
def test_a_cause_in_a_child_process_reaches_the_caller(
    tmp_path: Path, nursery: Sequence[str]
) -> None:
    async def scenario(worker: Worker) -> None:
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**20}
        error = await worker.peer.call("load", LOAD | {"options": options})
        assert error["reason"] == "out_of_memory"
        assert "KV cache" in error["message"]
        assert any("Traceback" in line for line in error["details"]["log"])
        worker.peer.close_input()
        assert await worker.status() == EXIT_OK

    run(tmp_path, scenario, mode=nursery)
