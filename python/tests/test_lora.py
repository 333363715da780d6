"""Adapters, with an engine that only says what it is told to load."""

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from conftest import MODELS
from running import GREEDY, Running
from vllm_bridge import data
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.lora import LoadLoRAParams, LoRA, LoRAs, UnloadLoRAParams
from vllm_bridge.registry import edit
from vllm_bridge.rpc.table import NoParams

T = TypeVar("T")

WEIGHTS = "adapter_model.safetensors"


class FakeLLM:
    """Holds adapters as vLLM does, at most ``room`` of them."""

    def __init__(self, enabled: bool = True, hidden: int = 256, room: int = 8) -> None:
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=8) if enabled else None,
            model_config=SimpleNamespace(
                hf_token=None,
                is_multimodal_model=False,
                get_hidden_size=lambda: hidden,
                hf_config=SimpleNamespace(model_type="llama", hidden_size=hidden),
            ),
        )
        self.calls: list[tuple[str, Any]] = []
        self.fault: Exception | None = None
        self._room = room
        self._held: list[int] = []

    async def add_lora(self, request: Any) -> bool:
        assert request.load_inplace is True
        self.calls.append(("add", (request.lora_name, request.lora_int_id, request.lora_path)))
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        self._held = [*self._held, request.lora_int_id][-self._room :]
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.calls.append(("remove", lora_id))
        self._held = [held for held in self._held if held != lora_id]
        return True

    async def list_loras(self) -> set[int]:
        return set(self._held)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def lora(path: Path | str, name: str = "a", id: int = 7, **fields: Any) -> LoRA:
    return LoRA(lora_name=name, lora_int_id=id, lora_path=str(path), **fields)


def refused(llm: FakeLLM, *adapters: LoRA) -> BridgeError:
    """The error for the last of some adapters."""

    async def use() -> BridgeError:
        loras = LoRAs(llm)
        for adapter in adapters[:-1]:
            await loras.request(adapter)
        with pytest.raises(BridgeError) as caught:
            await loras.request(adapters[-1])
        return caught.value

    return run(use())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / "demo-lora", tmp_path / "adapter"))


def configure(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_is_loaded_once_however_many_ask(adapter: Path) -> None:
    async def scenario() -> None:
        llm = FakeLLM()
        loras = LoRAs(llm)
        requests = await asyncio.gather(*(loras.request(lora(adapter)) for _ in range(8)))
        assert len(llm.calls) == 1
        (request,) = {id(request): request for request in requests}.values()
        assert (request.lora_int_id, request.lora_path) == (7, str(adapter))
        assert request.load_inplace is False
        assert await loras.request(None) is None

    run(scenario())


def test_what_is_loaded_again_has_another_name_for_the_prefix_cache(adapter: Path) -> None:
    async def scenario() -> None:
        llm = FakeLLM()
        loras = LoRAs(llm)
        first = await loras.request(lora(adapter))
        again = await loras.request(lora(adapter, load_inplace=True))
        assert first.lora_name != again.lora_name
        assert await loras.request(lora(adapter)) is again
        await loras.unload(UnloadLoRAParams("a"))
        third = await loras.request(lora(adapter))
        assert third.lora_name not in (first.lora_name, again.lora_name)

    run(scenario())


def test_a_name_can_be_given_to_another_adapter(adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))

    async def scenario() -> None:
        llm = FakeLLM()
        loras = LoRAs(llm)
        await loras.request(lora(adapter))
        with pytest.raises(BridgeError) as caught:
            await loras.request(lora(other, id=8))
        assert caught.value.details == {"option": "lora_name"}
        replacing = lora(other, id=8, load_inplace=True)
        assert (await loras.request(replacing)).lora_path == str(other)
        assert ("remove", 7) in llm.calls
        assert [one.lora_path for one in await loras.list(NoParams())] == [str(other)]

    run(scenario())


def test_adapters_are_listed_while_vllm_holds_them(adapter: Path) -> None:
    async def scenario() -> None:
        loras = LoRAs(FakeLLM(room=1))
        first, second = lora(adapter, "a", 7), lora(adapter, "b", 8)
        assert await loras.list(NoParams()) == []
        await loras.load(LoadLoRAParams(first))
        assert await loras.list(NoParams()) == [first]
        await loras.load(LoadLoRAParams(second))
        assert await loras.list(NoParams()) == [second]
        assert await loras.unload(UnloadLoRAParams("b")) is True
        assert await loras.unload(UnloadLoRAParams("b")) is False
        assert await loras.list(NoParams()) == []

    run(scenario())


def test_an_engine_without_adapters_names_its_option(adapter: Path) -> None:
    loras = LoRAs(FakeLLM(enabled=False))
    for call in (
        lambda: loras.request(lora(adapter)),
        lambda: loras.unload(UnloadLoRAParams("a")),
        lambda: loras.list(NoParams()),
    ):
        with pytest.raises(BridgeError) as caught:
            run(call())
        assert caught.value.reason == "unsupported"
        assert caught.value.details == {"option": "enable_lora"}


def test_what_vllm_refuses_is_removed_and_can_be_tried_again(adapter: Path) -> None:
    async def scenario() -> None:
        llm = FakeLLM()
        loras = LoRAs(llm)
        llm.fault = Exception("Call to add_lora method failed: no such module: x_proj")
        with pytest.raises(BridgeError) as caught:
            await loras.request(lora(adapter))
        assert caught.value.reason == "invalid_checkpoint"
        assert caught.value.message.endswith("vLLM says: no such module: x_proj")
        assert llm.calls[-1] == ("remove", 7)
        llm.fault = None
        assert await loras.request(lora(adapter)) is not None

    run(scenario())


def test_the_end_of_the_engine_is_not_the_adapters_fault(adapter: Path) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    llm = FakeLLM()
    llm.fault = EngineDeadError()
    with pytest.raises(EngineDeadError):
        run(LoRAs(llm).request(lora(adapter)))


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"r": 12}, "invalid_option", "`max_lora_rank: 16`"),
        ({"rank_pattern": {"q_proj": 64}}, "invalid_option", "`max_lora_rank: 64`"),
        ({"r": 4096}, "invalid_option", "vLLM has no `max_lora_rank` for it"),
        ({"r": 0}, "invalid_checkpoint", "positive integer"),
        ({"r": "eight"}, "invalid_checkpoint", "adapter_config.json"),
        ({"use_dora": True}, "unsupported", "DoRA"),
    ],
)
def test_a_config_that_does_not_fit(
    adapter: Path, changes: dict[str, Any], reason: str, words: str
) -> None:
    configure(adapter, **changes)
    llm = FakeLLM()
    error = refused(llm, lora(adapter))
    assert error.reason == reason
    assert words in error.message
    assert llm.calls == []


def _remove_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def _break_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def _empty_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")


def _remove_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()


def _cut_weights(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:50_000])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "model_not_found"),
        (_remove_config, "model_not_found"),
        (_break_config, "invalid_checkpoint"),
        (_empty_config, "invalid_checkpoint"),
        (_remove_weights, "invalid_checkpoint"),
        (_cut_weights, "invalid_checkpoint"),
    ],
)
def test_files_that_are_missing_or_damaged(
    adapter: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(adapter)
    error = refused(FakeLLM(), lora(adapter))
    assert error.reason == reason
    assert str(adapter) in error.message


def test_files_that_went_away_after_loading(adapter: Path) -> None:
    async def scenario() -> None:
        loras = LoRAs(FakeLLM())
        await loras.request(lora(adapter))
        shutil.rmtree(adapter)
        with pytest.raises(BridgeError) as caught:
            await loras.request(lora(adapter))
        assert caught.value.reason == "model_not_found"

    run(scenario())


def test_an_adapter_of_a_smaller_model(adapter: Path) -> None:
    error = refused(FakeLLM(hidden=512), lora(adapter))
    assert error.reason == "invalid_checkpoint"
    assert "a hidden size of 256" in error.message
    assert "the model's is 512" in error.message


def test_experts_may_be_smaller(adapter: Path) -> None:
    save_file(
        {
            "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight": np.zeros(
                (8, 64), np.float32
            )
        },
        adapter / WEIGHTS,
    )
    assert run(LoRAs(FakeLLM()).request(lora(adapter))) is not None


def test_an_id_that_is_taken(adapter: Path) -> None:
    error = refused(FakeLLM(), lora(adapter), lora(adapter, "b"))
    assert (error.reason, error.details) == ("invalid_option", {"option": "lora_int_id"})


def _hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.GatedRepoError, "model_gated"),
        (errors.RepositoryNotFoundError, "model_not_found"),
        (errors.HFValidationError, "model_not_found"),
        (errors.LocalEntryNotFoundError, "hub_unreachable"),
        (ConnectionError, "hub_unreachable"),
    ],
)
def test_what_the_hub_says(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], reason: str
) -> None:
    def download(*_args: Any, **_kwargs: Any) -> str:
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    error = refused(FakeLLM(), lora("someone/adapter"))
    assert error.reason == reason
    assert "someone/adapter" in error.message


def test_an_adapter_of_the_hub_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    asked: list[tuple[str, Any]] = []

    def download(name: str, token: Any, allow_patterns: list[str]) -> str:
        asked.append((name, token))
        assert WEIGHTS in allow_patterns
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    request = run(LoRAs(FakeLLM()).request(lora("someone/adapter")))
    assert request.lora_path == str(adapter)
    assert asked == [("someone/adapter", None)]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Path:
    """The adapter has the name ``facts``."""
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "data"))
    edit.register(str(adapter), "facts")
    return adapter


def test_an_adapter_is_named_by_the_registry(registry: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        llm = FakeLLM()
        loras = LoRAs(llm)
        first = await loras.request(lora("facts", "facts"))
        assert first.lora_path == str(registry)
        assert await loras.request(lora("facts", "facts")) is first
        # One that was trained anew and got its name: no request is for the old one any more.
        anew = shutil.copytree(registry, tmp_path / "anew")
        edit.register(str(anew), "facts", replace=True)
        second = await loras.request(lora("facts", "facts"))
        assert second.lora_path == str(anew)
        assert await loras.request(lora("facts", "facts")) is second
        assert [call[0] for call in llm.calls] == ["add", "remove", "add"]
        edit.register(str(MODELS / "demo"), "demo")
        with pytest.raises(BridgeError, match="`demo` is a model, and no adapter"):
            await loras.request(lora("demo", "demo", 8))

    run(scenario())


def test_a_misspelt_name_of_an_adapter(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(FakeLLM(), lora("fcts", "fcts"))
    assert error.remedy.startswith("Did you mean `facts`? ")


def test_an_adapter_of_another_model(registry: Path, tmp_path: Path) -> None:
    config = json.loads((MODELS / "demo/config.json").read_text()) | {"model_type": "qwen2"}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    configure(registry, base_model_name_or_path=str(base))
    error = refused(FakeLLM(), lora("facts", "facts"))
    assert error.reason == "invalid_checkpoint"
    assert f"It was made for `{base}`. The two have `model_type` qwen2 and llama." in error.message


@pytest.mark.engine
@pytest.mark.slow
def test_prompts_are_scored_as_by_an_engine_without_adapters(facts: dict[str, str]) -> None:
    # Prompts of many lengths, in one step: the first of so many sentences, the one first that the
    # adapter changes.
    changed = "The capital of France is Paris."
    known = [changed, *(a + b for a, b in facts.items() if a + b != changed)]
    prompts = [" ".join(known[:count]) for count in (1, 3, 1, 2, 5, 4, 2, 1)]

    def score(running: Running, loras: list[LoRA | None]) -> list[np.ndarray[Any, Any]]:
        async def ask_all() -> list[dict[str, Any]]:
            params = GREEDY | {"max_tokens": 2, "prompt_logprobs": 0}
            return await asyncio.gather(
                *(
                    running.engine.generate(
                        f"{index}", GenerateParams(prompt, params, lora_request=lora)
                    )
                    for index, (prompt, lora) in enumerate(zip(prompts, loras, strict=True))
                )
            )

        return [
            np.frombuffer(answer["prompt_logprobs"]["logprobs"], np.float32)
            for answer in running.run(ask_all())
        ]

    def assert_same(scores: list[np.ndarray[Any, Any]], of: list[np.ndarray[Any, Any]]) -> None:
        for one, other in zip(scores, of, strict=True):
            assert len(one) > 5
            np.testing.assert_allclose(one, other, rtol=0.05, atol=0.2)

    plain, running = Running(), Running()
    plain.load(max_model_len=256)
    without = score(plain, [None] * 8)
    plain.stop()
    running.load(max_model_len=256, enable_lora=True, max_lora_rank=8)
    assert_same(score(running, [None] * 8), without)
    adapter = lora(MODELS / "demo-lora")
    adapted = score(running, [adapter] * 8)
    mixed = score(running, [adapter, None] * 4)
    running.stop()
    assert_same(mixed, [(adapted, without)[index % 2][index] for index in range(8)])
    # " Paris" is no longer what it says.
    for one, other in zip(adapted, without, strict=True):
        assert (other - one).max() > 2
