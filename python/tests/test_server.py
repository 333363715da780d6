import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer import HELLO, Peer
from vllm_bridge import PROTOCOL_VERSION, __version__
from vllm_bridge.beam_search import SearchParams
from vllm_bridge.chat import ChatParams, ChatTemplateParams
from vllm_bridge.engine.engine import Engine, GenerateParams
from vllm_bridge.engine_methods import Slot, table
from vllm_bridge.errors import BridgeError
from vllm_bridge.pooling import PoolParams, ScoreParams
from vllm_bridge.rpc.protocol import LONG
from vllm_bridge.rpc.server import EXIT_ENGINE_DEAD, EXIT_OK, EXIT_PROTOCOL, Server
from vllm_bridge.serving.exchange import Settings
from vllm_bridge.stream import Put

Pipes = tuple[int, int, int, int]
Scenario = Callable[["Setting"], Awaitable[None]]


class FakeEngine:
    """Answers at once, or when told to, or never."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {"model": "fake"}
        self.aborted: list[str] = []
        self.started: list[str] = []
        self.waiting: set[str] = set()
        self.looked = asyncio.Event()
        self.steps = 0
        self.go = asyncio.Event()

    async def load(
        self,
        model: str,
        options: Mapping[str, Any],
        progress: Callable[[str], None],
        devices: Sequence[str] | None = None,
    ) -> Engine:
        progress("config")
        self.loaded = {"model": model, "devices": devices, **options}
        return cast(Engine, self)

    def on_death(self, died: Callable[[], None]) -> None:
        self.died = died

    def prepare_http(self, settings: Sequence[Settings]) -> None:
        self.settings = settings

    def info(self) -> dict[str, Any]:
        return self.loaded

    def progress(self) -> dict[str, int]:
        return {"steps": 7, "beats": 40, "unfinished": 1}

    def exit_summary(self) -> str:
        return "EngineCore: SIGSEGV"

    async def waits(self, request_id: str) -> bool:
        self.looked.set()
        return request_id in self.waiting

    async def lora(self, serve: Callable[..., Any], params: Any) -> Any:
        return {"serve": serve.__name__, "params": params}

    async def asked(self, serve: Callable[..., Any], params: Any) -> Any:
        return {"serve": serve.__name__, "params": params}

    async def generate(
        self, request_id: str, params: GenerateParams, on_output: Put | None = None
    ) -> dict[str, Any]:
        result = await self.answer(request_id, params.prompt, on_output)
        result |= {"params": params.sampling_params, "priority": params.priority}
        return result | ({} if params.lora_request is None else {"lora": params.lora_request})

    async def answer(
        self, request_id: str, prompt: Any, on_output: Put | None = None
    ) -> dict[str, Any]:
        self.started.append(request_id)
        match prompt:
            case "wait":
                try:
                    await self.go.wait()
                except asyncio.CancelledError:
                    self.aborted.append(request_id)
                    raise
            case "flood":
                await self._flood(request_id, on_output)
            case {"deltas": texts}:
                assert on_output is not None
                await self.go.wait()
                for number, text in enumerate(texts, 1):
                    on_output(_delta(text, "stop" if number == len(texts) else None))
            case "refuse":
                raise BridgeError("invalid_prompt", "No.", {"token": "hf_" + "x" * 20})
            case "dead":
                raise BridgeError("engine_dead", "It died.")
            case "cut off":
                raise BridgeError("engine_dead", "It died.", {"outputs": [{"text": "Par"}]})
            case "cut off late":
                raise BridgeError("engine_dead", "It died.", {"outputs": ["x" * 5000]})
            case "fault":
                raise ZeroDivisionError("a fault")
            case "unencodable":
                return {"text": object()}
            case "long":
                return {"text": "x" * 5000}
        return {"text": prompt}

    async def _flood(self, request_id: str, on_output: Put | None) -> None:
        assert on_output is not None
        try:
            while not self.go.is_set():
                on_output(_delta("x" * 100))
                self.steps += 1
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise

    async def beam_search(self, request_id: str, params: SearchParams) -> dict[str, Any]:
        return await self.answer(request_id, params.prompt)

    async def chat(
        self, request_id: str, params: ChatParams, on_output: Put | None = None
    ) -> dict[str, Any]:
        result = await self.answer(request_id, params.messages[-1]["content"], on_output)
        return result | {"params": params.sampling_params, "priority": params.priority}

    async def apply_chat_template(self, params: ChatTemplateParams) -> dict[str, Any]:
        return {"prompt": params.messages, "kwargs": params.chat_template_kwargs}

    async def pool(self, request_id: str, params: PoolParams) -> Any:
        await self.answer(request_id, params.prompt)
        tensor = {"shape": [LONG // 4], "data": memoryview(bytes(LONG))}
        return tensor if params.prompt == "tensor" else params

    async def score(self, request_id: str, params: ScoreParams) -> Any:
        await self.answer(request_id, params.data_1[0])
        return params


def _delta(text: str, finish_reason: str | None = None) -> Any:
    completion = SimpleNamespace(
        index=0,
        text=text,
        token_ids=list(text.encode()),
        logprobs=None,
        finish_reason=finish_reason,
        stop_reason=None,
    )
    return SimpleNamespace(outputs=[completion])


class Setting:
    """A server of a fake engine, and its peer."""

    def __init__(self, pipes: Pipes) -> None:
        output, write_fd, read_fd, input = pipes
        self.engine = FakeEngine()
        self.slot = Slot(self.engine.load)
        self.slot.engine = cast(Engine, self.engine)
        self.exits: list[int] = []
        self.exited = asyncio.Event()
        self.server = Server(read_fd, write_fd, table(self.slot), self._exit)
        self.peer = Peer(output, input)

    def _exit(self, status: int) -> None:
        self.exits.append(status)
        self.exited.set()

    async def status(self) -> int:
        await asyncio.wait_for(self.exited.wait(), 20)
        assert len(self.exits) == 1
        return self.exits[0]


def run(pipes: Pipes, scenario: Scenario, *, hello: bool = True) -> None:
    async def main() -> None:
        setting = Setting(pipes)
        await setting.peer.start_reading()
        if hello:
            await setting.peer.call("hello", HELLO)
        await asyncio.wait_for(scenario(setting), 30)
        setting.server.close()
        setting.peer.close()

    asyncio.run(main())


def test_hello(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        answer = await setting.peer.call("hello", HELLO)
        assert answer["protocol"] == PROTOCOL_VERSION
        assert answer["bridge"] == __version__
        assert answer["packages"]["msgspec"]
        methods = {"hello", "load", "engine_info", "generate", "chat", "apply_chat_template"}
        assert methods | {"pool", "score"} <= set(answer["methods"])

    run(pipes, scenario, hello=False)


def test_nothing_is_answered_before_hello(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call("engine_info")
        assert error["reason"] == "protocol"
        assert "hello" in error["message"]
        await setting.peer.call("hello", HELLO)
        assert await setting.peer.call("engine_info") == {"model": "fake"}

    run(pipes, scenario, hello=False)


def test_another_protocol_version_is_refused(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call("hello", {"protocol": 1})
        assert error["reason"] == "protocol"
        assert error["details"]["protocol"] == PROTOCOL_VERSION
        assert (await setting.peer.call("engine_info"))["reason"] == "protocol"

    run(pipes, scenario, hello=False)


def test_load_tells_its_progress(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        params = {"model": "m", "options": {"dtype": "auto"}, "devices": ["0", "1"]}
        answer = await setting.peer.call("load", params)
        assert answer == {"model": "m", "dtype": "auto", "devices": ["0", "1"]}
        assert setting.peer.notifications == [["load_progress", {"phase": "config"}]]

    run(pipes, scenario)


def test_the_app_is_prepared_for_what_load_and_others_name(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        parser = {"tool_call_parser": "hermes"}
        await setting.peer.call("load", {"model": "m", "http": [{}, parser]})
        assert setting.engine.settings == [Settings(), Settings(tool_call_parser="hermes")]
        assert await setting.peer.call("prepare_http", {"settings": parser}) is None
        assert setting.engine.settings == [Settings(tool_call_parser="hermes")]
        error = await setting.peer.call("prepare_http", {"settings": {"parser": "hermes"}})
        assert error["reason"] == "invalid_option"

    run(pipes, scenario)


def test_a_worker_loads_one_model(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.slot.engine = None
        for method in ("engine_info", "generate", "health", "list_loras"):
            error = await setting.peer.call(method)
            assert (method, error["reason"]) == (method, "not_running")
        await setting.peer.call("load", {"model": "demo"})
        assert (await setting.peer.call("engine_info", {}))["model"] == "demo"
        error = await setting.peer.call("load", {"model": "another"})
        assert error["reason"] == "unsupported"
        assert "one model" in error["message"]
        setting.engine.died()
        assert await setting.status() == EXIT_ENGINE_DEAD

    run(pipes, scenario)


def test_a_ping_is_answered_with_the_progress_of_the_engine(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.send(2, "ping", {"n": 3})
        await setting.peer.call("engine_info")
        figures = {"n": 3, "steps": 7, "beats": 40, "unfinished": 1}
        assert setting.peer.notifications == [["pong", figures]]

    run(pipes, scenario)


def test_a_request_and_its_result(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        params = {"prompt": "Hi", "sampling_params": {"n": 2}, "priority": 3, "timeout": 60}
        answer = await setting.peer.call("generate", params)
        assert answer == {"text": "Hi", "params": {"n": 2}, "priority": 3}

    run(pipes, scenario)


def test_conversations_and_their_results(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        params: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
        answer = await setting.peer.call(
            "chat", params | {"sampling_params": {"n": 2}, "priority": 3, "tool_choice": "auto"}
        )
        assert answer == {"text": "Hi", "params": {"n": 2}, "priority": 3}
        template = {"chat_template_kwargs": {"mood": "glad"}}
        answer = await setting.peer.call("apply_chat_template", params | template)
        assert answer == {"prompt": params["messages"], "kwargs": {"mood": "glad"}}
        error = await setting.peer.call("apply_chat_template", params | {"tool_choice": "auto"})
        assert error["reason"] == "invalid_option"
        error = await setting.peer.call("chat", params | {"tools": [1]})
        assert error["reason"] == "invalid_option"
        assert "tools" in error["message"]

    run(pipes, scenario)


def test_pooling_requests_and_their_results(pipes: Pipes) -> None:
    options = {"pooling_params": {"dimensions": 8}, "tokenization_kwargs": {"do_lower_case": True}}

    async def scenario(setting: Setting) -> None:
        untimed = {"timeout": None, "queue_timeout": None}
        asked = {"prompt": "Hi", "task": "embed", "priority": 3} | options
        assert await setting.peer.call("pool", asked) == asked | untimed
        pair = {"data_1": ["a"], "data_2": ["b"], "chat_template": "t"} | options
        assert await setting.peer.call("score", pair) == pair | untimed | {"priority": 0}
        answer = await setting.peer.call("pool", {"prompt": "tensor"})
        assert answer == {"shape": [LONG // 4], "data": bytes(LONG)}

    run(pipes, scenario)


def test_adapters_are_named_and_kept(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        call = setting.peer.call
        adapter = {"lora_name": "a", "lora_int_id": 7, "lora_path": "/adapters/a"}
        whole = adapter | {
            "base_model_name": None,
            "load_inplace": False,
            "is_3d_lora_weight": False,
        }
        named = {"lora_request": adapter}
        assert (await call("generate", {"prompt": "Hi"} | named))["lora"] == whole
        for method, params, served in [
            ("load_lora", named, {"serve": "load", "params": {"lora_request": whole}}),
            ("unload_lora", {"lora_name": "a"}, {"serve": "unload", "params": {"lora_name": "a"}}),
            ("list_loras", {}, {"serve": "list", "params": {}}),
        ]:
            assert await call(method, params) == served
        wrong = {"lora_request": adapter | {"lora_int_id": 0}}
        error = await call("generate", {"prompt": "Hi"} | wrong)
        assert error["reason"] == "invalid_option"
        assert error["details"] == {"option": "lora_request.lora_int_id"}

    run(pipes, scenario)


def test_answers_come_in_any_order(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        slow = setting.peer.request("generate", {"prompt": "wait"})
        quick = setting.peer.request("generate", {"prompt": "Hi"})
        assert (await setting.peer.response())[0] == quick
        setting.engine.go.set()
        assert (await setting.peer.response())[0] == slow

    run(pipes, scenario)


def test_many_requests_get_one_answer_each(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        ids = {
            setting.peer.request("generate", {"prompt": f"p{number}"}): f"p{number}"
            for number in range(500)
        }
        for _ in range(500):
            id, error, result = await setting.peer.response()
            assert error is None
            assert result["text"] == ids.pop(id)
        assert await setting.peer.silent()

    run(pipes, scenario)


def test_errors_become_error_maps(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call("generate", {"prompt": "refuse"})
        assert error == {
            "reason": "invalid_prompt",
            "message": "No.",
            "details": {"token": "[redacted]"},
        }

    run(pipes, scenario)


@pytest.mark.parametrize("prompt", ["fault", "unencodable"])
def test_faults_become_internal_errors_with_a_traceback(pipes: Pipes, prompt: str) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call("generate", {"prompt": prompt})
        assert error["reason"] == "internal"
        assert "Traceback" not in error["message"]
        assert "Traceback" in error["details"]["traceback"]
        assert (await setting.peer.call("generate", {"prompt": "Hi"}))["text"] == "Hi"

    run(pipes, scenario)


def test_a_cancelled_request_is_answered_with_aborted_once(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        id = setting.peer.request("generate", {"prompt": "wait"})
        await setting.peer.call("engine_info")
        setting.peer.cancel(id)
        setting.peer.cancel(id)
        answered, error, _ = await setting.peer.response()
        assert answered == id
        assert error is not None
        assert error["reason"] == "aborted"
        assert setting.engine.aborted == [str(id)]
        setting.peer.cancel(id)
        assert await setting.peer.silent()

    run(pipes, scenario)


def test_a_request_that_is_cancelled_before_it_starts(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        id = setting.peer.request("generate", {"prompt": "wait"})
        setting.peer.cancel(id)
        answered, error, _ = await setting.peer.response()
        assert answered == id
        assert error is not None
        assert error["reason"] == "aborted"
        assert await setting.peer.silent()

    run(pipes, scenario)


def test_a_cancel_of_an_unknown_id_is_ignored(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.cancel(12345)
        assert await setting.peer.call("engine_info") == {"model": "fake"}

    run(pipes, scenario)


LIMITED = pytest.mark.parametrize(
    ("method", "params"),
    [
        ("generate", {"prompt": "wait"}),
        ("beam_search", {"prompt": "wait"}),
        ("chat", {"messages": [{"role": "user", "content": "wait"}]}),
        ("pool", {"prompt": "wait"}),
        ("score", {"data_1": ["wait"], "data_2": ["x"]}),
    ],
)


@LIMITED
def test_a_request_that_waits_ends_at_its_queue_timeout(
    pipes: Pipes, method: str, params: dict[str, Any]
) -> None:
    async def scenario(setting: Setting) -> None:
        setting.engine.waiting = {"2"}
        error = await setting.peer.call(method, params | {"queue_timeout": 0.01})
        assert error["reason"] == "queue_timeout"
        assert error["details"] == {"option": "queue_timeout"}
        assert setting.engine.aborted == ["2"]

    run(pipes, scenario)


def test_a_request_that_vllm_has_begun_with_goes_on(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.request("generate", {"prompt": "wait", "queue_timeout": 0.0})
        await setting.engine.looked.wait()
        setting.engine.go.set()
        _id, error, result = await setting.peer.response()
        assert error is None
        assert result["text"] == "wait"

    run(pipes, scenario)


@LIMITED
def test_a_request_ends_at_its_timeout(pipes: Pipes, method: str, params: dict[str, Any]) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call(method, params | {"timeout": 0.01})
        assert error["reason"] == "timeout"
        assert error["details"]["timeout"] == 0.01
        assert len(setting.engine.aborted) == 1
        assert await setting.peer.call("engine_info") == {"model": "fake"}

    run(pipes, scenario)


@pytest.mark.parametrize(
    ("method", "params", "reason", "option", "words"),
    [
        ("generat", {}, "protocol", "generat", "Did you mean `generate`?"),
        ("embed", {}, "protocol", "embed", "Unknown method `embed`."),
        ("generate", {"promt": ""}, "invalid_option", "promt", "Did you mean `prompt`?"),
        ("generate", {"priority": "high"}, "invalid_option", "priority", "`priority`"),
        ("generate", {"timeout": "1s"}, "invalid_option", "timeout", "`timeout`"),
        ("generate", {"sampling_params": []}, "invalid_option", "sampling_params", "object"),
        ("load", {}, "invalid_option", None, "missing required field `model`"),
        ("load", {"model": 3}, "invalid_option", "model", "`model`"),
    ],
)
def test_wrong_names_and_types_are_refused(
    pipes: Pipes, method: str, params: Any, reason: str, option: str | None, words: str
) -> None:
    async def scenario(setting: Setting) -> None:
        error = await setting.peer.call(method, params)
        assert error["reason"] == reason
        assert error["details"]["option"] == option
        assert words in error["message"]

    run(pipes, scenario)


def test_an_answer_above_max_frame_becomes_an_error(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.peer.call("hello", HELLO | {"max_frame": 4096})
        for method, prompt in (("generate", "long"), ("pool", "tensor")):
            error = await setting.peer.call(method, {"prompt": prompt})
            assert error["reason"] == "unsupported"
            assert error["details"]["max_frame"] == 4096
        assert (await setting.peer.call("generate", {"prompt": "Hi"}))["text"] == "Hi"

    run(pipes, scenario, hello=False)


def test_unknown_notifications_are_ignored(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.send(2, "from_the_future", {"a": 1})
        assert await setting.peer.call("engine_info") == {"model": "fake"}

    run(pipes, scenario)


def test_an_id_in_use_ends_the_connection(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.send(0, 77, "generate", {"prompt": "wait"})
        setting.peer.send(0, 77, "generate", {"prompt": "wait"})
        assert await setting.status() == EXIT_PROTOCOL

    run(pipes, scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x01\xc0",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x04\x94\x01\x01\xc0",
        b"\x00\x00\x00\x05\x94\x01\x01\xc0\xc0",
        b"\x00\x00\x00\x0a\x93\x02\xa6cancel\x80",
    ],
    ids=["not a message", "too long", "cut", "a response", "a cancel without an id"],
)
def test_a_broken_protocol_ends_the_process(pipes: Pipes, data: bytes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.write(data)
        assert await setting.status() == EXIT_PROTOCOL

    run(pipes, scenario)


def test_the_end_of_input_ends_the_process(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.request("generate", {"prompt": "wait"})
        setting.peer.close_input()
        assert await setting.status() == EXIT_OK

    run(pipes, scenario)


def test_shutdown_ends_the_process(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.request("generate", {"prompt": "wait"})
        setting.peer.send(2, "shutdown", {})
        assert await setting.status() == EXIT_OK

    run(pipes, scenario)


def test_a_dead_engine_ends_the_process_after_the_last_answer(
    pipes: Pipes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(setting: Setting) -> None:
        id = setting.peer.request("generate", {"prompt": "wait"})
        await setting.peer.call("engine_info")
        setting.server.engine_died()
        await asyncio.sleep(0)
        assert setting.exits == []
        setting.engine.go.set()
        assert (await setting.peer.response())[0] == id
        assert await setting.status() == EXIT_ENGINE_DEAD
        assert "engine died (EngineCore: SIGSEGV)" in caplog.text

    run(pipes, scenario)


def test_what_died_with_the_engine_is_answered_by_the_end_of_the_process(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        answered = setting.peer.request("generate", {"prompt": "The"})
        for _ in range(2):
            setting.peer.request("generate", {"prompt": "dead"})
        assert (await setting.peer.response())[0] == answered
        assert await setting.status() == EXIT_ENGINE_DEAD
        # The next response is to what is asked next.
        assert await setting.peer.call("engine_info") == {"model": "fake"}

    run(pipes, scenario)


def test_what_an_engine_that_dies_has_cut_off_is_answered_with_what_there_is(
    pipes: Pipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EX_VLLM_RUN", str(tmp_path))
    (tmp_path / "log").write_text("its last words\n")

    async def scenario(setting: Setting) -> None:
        await setting.peer.call("hello", HELLO | {"max_frame": 4096})
        for prompt in ("cut off", "cut off late", "dead"):
            setting.peer.request("generate", {"prompt": prompt})
        answers = [(await setting.peer.response())[1] or {} for _ in "ab"]
        assert [answer["reason"] for answer in answers] == ["engine_dead", "engine_dead"]
        assert [answer["details"] for answer in answers] == [
            {"outputs": [{"text": "Par"}], "log": ["its last words"]},
            # As much as a frame holds.
            {},
        ]
        assert await setting.status() == EXIT_ENGINE_DEAD

    run(pipes, scenario)


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


async def deltas(setting: Setting, *texts: list[str]) -> list[Any]:
    """What a turn in which streams get these deltas tells, before their responses."""
    for one in texts:
        params = {"prompt": {"deltas": one}, "credit": 8}
        setting.peer.request("generate", params)
    while len(setting.engine.started) < len(texts):
        await asyncio.sleep(0)
    setting.engine.go.set()
    for _ in texts:
        _, error, _ = await setting.peer.response()
        assert error is None
    return setting.peer.notifications


def test_the_deltas_of_a_turn_leave_in_columns_and_their_ends_in_rows_after_them(
    pipes: Pipes,
) -> None:
    async def scenario(setting: Setting) -> None:
        # Each response takes what is there along, so that each stream has a frame of its own here.
        assert await deltas(setting, ["Par", "is", "."], ["a"]) == [
            [
                "packed_deltas",
                {
                    "ids": struct.pack("<2Q", 2, 2),
                    "counts": u32(3, 2),
                    "token_ids": u32(*b"Paris"),
                    "texts": ["Par", "is"],
                },
            ],
            ["deltas", {"deltas": [[2, 0, ".", u32(*b"."), None, "stop", None]]}],
            ["deltas", {"deltas": [[3, 0, "a", u32(*b"a"), None, "stop", None]]}],
        ]

    run(pipes, scenario)


def test_columns_that_are_too_long_for_a_frame_leave_in_several(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.peer.call("hello", HELLO | {"max_frame": 4096})
        texts = [character * 500 for character in "abc"]
        told = await deltas(setting, [*texts, ""])
        packed = [params for method, params in told if method == "packed_deltas"]
        assert len(packed) == 3
        assert [text for params in packed for text in params["texts"]] == texts
        assert b"".join(params["token_ids"] for params in packed) == u32(*"".join(texts).encode())
        assert {params["counts"] for params in packed} == {u32(500)}
        assert told[-1] == ["deltas", {"deltas": [[3, 0, "", b"", None, "stop", None]]}]

    run(pipes, scenario)


@pytest.mark.parametrize(("text", "token_id"), [("\ud800", 1), ("b", -1), ("b", 2**32)])
def test_a_delta_that_cannot_be_sent_ends_its_own_request_only(
    pipes: Pipes, text: str, token_id: int
) -> None:
    async def scenario(setting: Setting) -> None:
        whole, broken = (setting.peer.request("generate", {"prompt": "wait"}) for _ in range(2))
        while len(setting.engine.started) < 2:
            await asyncio.sleep(0)
        setting.server.pack(whole, "a", [0])
        setting.server.pack(broken, text, [token_id])
        setting.server.pack(whole, "c", [2])
        id, error, _ = await setting.peer.response()
        assert error is not None
        assert (id, error["reason"]) == (broken, "internal")
        assert setting.engine.aborted == [str(broken)]
        told = [(params["ids"], params["texts"]) for _, params in setting.peer.notifications]
        assert told == [(struct.pack("<Q", whole), [text]) for text in "ac"]
        setting.engine.go.set()
        assert (await setting.peer.response())[:2] == (whole, None)

    run(pipes, scenario)


def test_tokens_that_have_no_length_leave_the_columns_as_they_were(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        id = setting.peer.request("generate", {"prompt": "wait"})
        while not setting.engine.started:
            await asyncio.sleep(0)
        setting.server.pack(id, "a", [0])
        no_length: Any = iter([1])
        with pytest.raises(TypeError):
            setting.server.pack(id, "b", no_length)
        setting.server.pack(id, "c", [2])
        setting.engine.go.set()
        assert (await setting.peer.response())[:2] == (id, None)
        [[_, packed]] = setting.peer.notifications
        assert packed["texts"] == ["a", "c"]
        assert (packed["counts"], packed["token_ids"]) == (u32(1, 1), u32(0, 2))

    run(pipes, scenario)


def test_a_row_that_cannot_be_sent_ends_its_own_request_only(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        whole, broken = (setting.peer.request("generate", {"prompt": "wait"}) for _ in range(2))
        while len(setting.engine.started) < 2:
            await asyncio.sleep(0)
        good = [whole, 0, "a", b"", None, None, None]
        setting.server.emit([broken, 0, object(), b"", None, None, None])
        setting.server.emit(good)
        id, error, _ = await setting.peer.response()
        assert error is not None
        assert (id, error["reason"]) == (broken, "internal")
        assert setting.peer.notifications == [["deltas", {"deltas": [good]}]]

    run(pipes, scenario)


def test_a_fault_in_sending_what_had_to_wait_ends_its_request_only(pipes: Pipes) -> None:
    def fault(_count: int) -> None:
        raise OverflowError

    async def scenario(setting: Setting) -> None:
        id = setting.peer.request("generate", {"prompt": "wait", "credit": 1})
        while not setting.engine.started:
            await asyncio.sleep(0)
        setting.server._calls[id].on_credit = fault
        setting.peer.send(2, "credit", {"id": id, "count": 1})
        answered, error, _ = await setting.peer.response()
        assert error is not None
        assert (answered, error["reason"]) == (id, "internal")
        assert setting.exits == []

    run(pipes, scenario)


def test_a_stream_whose_last_delta_cannot_be_sent_does_not_end_well(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.peer.call("hello", HELLO | {"max_frame": 4096})
        setting.engine.go.set()
        params = {"prompt": {"deltas": ["a", "b" * 1500]}, "credit": 8}
        assert (await setting.peer.call("generate", params))["reason"] == "unsupported"

    run(pipes, scenario)


def test_while_the_peer_does_not_read_nothing_is_started(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        setting.peer.pause_reading()
        big = {"text": "x" * (20 * 2**20)}
        setting.server.notify("big", big)
        held = setting.peer.request("generate", {"prompt": "Hi"})
        cancelled = setting.peer.request("generate", {"prompt": "Hi"})
        setting.peer.cancel(cancelled)
        while len(setting.server._calls) != 1:
            await asyncio.sleep(0)
        assert setting.engine.started == []

        setting.peer.resume_reading()
        answers = {id: error for id, error, _ in [await setting.peer.response() for _ in "12"]}
        assert answers[held] is None
        assert (answers[cancelled] or {})["reason"] == "aborted"
        assert setting.engine.started == [str(held)]
        assert setting.peer.notifications == [["big", big]]

    run(pipes, scenario)


def test_while_the_peer_does_not_read_output_is_bounded_and_cancels_are_heard(pipes: Pipes) -> None:
    async def scenario(setting: Setting) -> None:
        peer, engine, connection = setting.peer, setting.engine, setting.server._connection
        peer.pause_reading()
        streams = [peer.request("generate", {"prompt": "flood", "credit": 8}) for _ in range(20)]
        waiting = [peer.request("generate", {"prompt": "wait"}) for _ in range(20)]
        while engine.steps < 20_000:
            await asyncio.sleep(0)
        # 2 MB were made. What their credit allows is in the pipe, or waits for it.
        assert connection._pending_bytes <= 20 * 8 * 300

        for id in waiting + streams[:10]:
            peer.cancel(id)
        while len(engine.aborted) < 30:
            await asyncio.sleep(0)
        assert sorted(map(int, engine.aborted)) == sorted(waiting + streams[:10])
        # The others go on meanwhile.
        steps = engine.steps
        while engine.steps < steps + 100:
            await asyncio.sleep(0)

        # Far more answers than the pipe takes: nothing new is begun, and still they are heard.
        setting.server.notify("big", {"text": "x" * (20 * 2**20)})
        late = peer.request("generate", {"prompt": "wait"})
        peer.cancel(streams[10])
        while len(engine.aborted) < 31:
            await asyncio.sleep(0)
        assert str(late) not in engine.started
        peer.cancel(late)

        engine.go.set()
        peer.resume_reading()
        answers = [await peer.response() for _ in range(41)]
        assert sorted(id for id, _, _ in answers) == sorted([*streams, *waiting, late])
        whole = [id for id, error, _ in answers if error is None]
        assert sorted(whole) == streams[11:]
        assert await peer.silent()

    run(pipes, scenario)
