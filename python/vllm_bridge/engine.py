"""One vLLM engine: started, asked, described.

Starting it blocks the event loop for seconds: vLLM reads configs and waits for its processes
synchronously, and they must be children of the main thread (the parent-death signal that ends
them with the worker follows the thread that started them). Nothing is lost by it: a worker
that starts has nothing else to serve, and the guard, which watches the pipe on its own, ends
it at any time.
"""

import asyncio
import contextlib
import logging
import os
import platform
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from vllm_bridge import (
    admin,
    defaults,
    diagnosis,
    finish,
    forking,
    generation_config,
    quantization,
    tokenization,
    versions,
)
from vllm_bridge.beam_search import BeamSearch, SearchParams
from vllm_bridge.chat import Chat, ChatParams, ChatTemplateParams
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.heartbeat import Heartbeat
from vllm_bridge.images import render_images, take_images
from vllm_bridge.lora import LoRA, LoRAs
from vllm_bridge.outputs import request_output
from vllm_bridge.params import SamplingParamsFactory, engine_options
from vllm_bridge.patches import ranks
from vllm_bridge.pooling import Pooler, PoolParams, ScoreParams, wrong_runner, wrong_task
from vllm_bridge.prompt_embeds import embeds_prompt
from vllm_bridge.quantization import kv_cache, naming, online, preflight
from vllm_bridge.queueing import Queue, Submit
from vllm_bridge.rpc.protocol import unpack_u32
from vllm_bridge.stream import Put

logger = logging.getLogger(__name__)

# Longer texts are tokenized in a thread, so that the event loop goes on meanwhile; for
# shorter ones the hand-over costs more than the work.
LONG_TEXT = 4096


class GenerateParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``generate``; see guides/protocol.md."""

    prompt: Any = None
    sampling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    lora_request: LoRA | None = None
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None
    credit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    parse: bool = False


class Engine:
    """The engine of a worker; empty until ``load``."""

    def __init__(self) -> None:
        # Called once, when vLLM's processes died under a loaded engine.
        self.on_death: Callable[[], None] | None = None
        self._llm: Any = None
        self._info: dict[str, Any] = {}
        self._sampling: SamplingParamsFactory | None = None
        self._chat: Chat | None = None
        self._loras: LoRAs | None = None
        self._queue: Queue | None = None
        self._pooler: Pooler | None = None  # of engines that pool
        self._heartbeat: Heartbeat | None = None
        self._asleep = False
        self._load_called = False

    async def load(
        self,
        model: str,
        options: Mapping[str, Any],
        notify: Callable[[str, dict[str, Any]], None],
        devices: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Starts the engine and returns its *engine info*.

        Args:
            devices: the only ones that it may use

        Raises:
            BridgeError: with the reason why it did not start. The worker is of no use then.
        """
        if self._load_called:
            raise BridgeError("unsupported", "A worker loads one model, once; start another.")
        self._load_called = True
        started = time.monotonic()
        with map_exceptions(diagnosis.load_error):
            versions.check_versions()
            options = dict(options)
            dtype = online.take_dtype(options)
            checkpoint = check_model(model, options)
            online.check(checkpoint, dtype)
            quantization.check(checkpoint)
            notify("load_progress", {"phase": "import"})
            if devices is not None:
                defaults.use_devices(devices)
            from vllm.v1.engine.async_llm import AsyncLLM

            forking.start()

            notify("load_progress", {"phase": "config"})
            settings = None
            if checkpoint.quantization is None:
                settings = online.take_settings(options)
            unknown_dtype = kv_cache.take_dtype(options)
            arguments = engine_options(options)
            naming.check(checkpoint, arguments)
            if checkpoint.load_format is not None:
                arguments["load_format"] = checkpoint.load_format
            checkpoint = quantization.as_loaded(checkpoint)
            fit.check_device_memory(checkpoint, arguments)
            generation_config.check(checkpoint.folder, arguments)
            defaults.before_config(arguments)
            with _offline(checkpoint.folder is not None):
                config, kernel = preflight.engine_config(
                    model, checkpoint, arguments, unknown_dtype
                )
                if checkpoint.folder is None:
                    generation_config.check_downloaded(config.model_config)
                defaults.after_config(config, arguments, checkpoint)
                notify("load_progress", {"phase": "engine"})
                llm = AsyncLLM.from_vllm_config(
                    config,
                    enable_log_requests=bool(arguments.get("enable_log_requests")),
                    disable_log_stats=bool(arguments.get("disable_log_stats")),
                )
            tasks = await llm.get_supported_tasks()
            if config.model_config.runner_type == "generate":
                await _warm_up(llm)
            self._sampling = SamplingParamsFactory(config.model_config.get_diff_sampling_param())
            self._chat = Chat(llm)
            if config.model_config.runner_type == "generate":
                await self._chat.warm_up()
            self._loras = LoRAs(llm)
            self._queue = Queue(llm)
            if config.model_config.runner_type == "pooling":
                self._pooler = Pooler(llm, tasks, self._early_end)
            made = online.note(dtype, settings, config.model_config)
            note = await quantization.note(llm, made)
        self._llm = llm
        self._heartbeat = Heartbeat(llm)
        self._info = _info(model, config, tasks) | {
            "quantization_note": note,
            "quantization_kernel": kernel,
            "pooling_task": self._pooler and self._pooler.task,
            "labels": self._pooler and self._pooler.labels,
            "load_seconds": time.monotonic() - started,
        }
        # The handler of vLLM's outputs ends only with the engine.
        llm.output_handler.add_done_callback(self._died)
        return self._info

    def info(self) -> dict[str, Any]:
        if self._llm is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        return self._info

    def progress(self) -> dict[str, int]:
        """How far the engine has come; see ``heartbeat``."""
        if self._heartbeat is None:
            return {"steps": 0, "beats": 0, "unfinished": 0}
        progress = self._heartbeat.read()
        # Requests of an engine that sleeps wait until it is woken.
        return progress | {"unfinished": 0} if self._asleep else progress

    def exit_summary(self) -> str:
        """How vLLM's processes ended, as far as this one knows: "EngineCore_DP0: SIGSEGV"."""
        manager = self._llm and self._llm.engine_core.resources.engine_manager
        if not hasattr(manager, "finished_procs"):  # those of Ray are not its children
            return ""
        ended = manager.finished_procs().items()
        return ", ".join(f"{name}: {ranks.ended(code)}" for name, code in ended)

    async def asked(self, serve: Callable[[Any, Any], Awaitable[Any]], params: Any) -> Any:
        """One of the methods of ``tokenizer`` or ``admin``, for the loaded engine."""
        if self._llm is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        with map_exceptions(self._request_error):
            if serve is admin.sleep:
                # What is under way ends before the answer comes.
                self._asleep = True
            try:
                return await serve(self._llm, params)
            finally:
                if serve in (admin.sleep, admin.wake_up):
                    self._asleep = await self._llm.is_sleeping()

    async def lora(self, serve: Callable[[LoRAs, Any], Awaitable[Any]], params: Any) -> Any:
        """One of the methods of ``lora``, for the adapters of the loaded engine."""
        if self._loras is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        with map_exceptions(self._request_error):
            return await serve(self._loras, params)

    async def generate(
        self, request_id: str, params: GenerateParams, on_output: Put | None = None
    ) -> dict[str, Any]:
        """One request, from prompt to finished output. Cancelling it aborts it in vLLM.

        Args:
            on_output: called with what each step adds

        Raises:
            BridgeError: with the reason why there is no output
        """
        sampling, _chat, loras = self._generating(params.priority)
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            sampling_params = sampling.make(params.sampling_params, stream=on_output is not None)
            rendered = await self._render(params.prompt, params.tokenization_kwargs)
            _check_fit(rendered, sampling_params)
            stream = self._llm.generate(
                rendered,
                sampling_params,
                request_id,
                lora_request=await loras.request(params.lora_request),
                priority=params.priority,
            )
            submit(request_id)
            output = await self._whole(request_id, sampling_params, stream, on_output)
        return request_output(output)

    async def beam_search(self, request_id: str, params: SearchParams) -> dict[str, Any]:
        """The beams of one prompt; see ``BeamSearch.search``."""
        _sampling, _chat, loras = self._generating(priority=0)
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            rendered = await self._render(params.prompt)
            lora_request = await loras.request(params.lora_request)
            output, meaning = await BeamSearch(self._llm, submit).search(
                request_id, rendered, params.beam_search_params, lora_request
            )
            if meaning is not None:
                raise await self._early_end(meaning, request_id, output)
        return request_output(output)

    async def chat(
        self, request_id: str, params: ChatParams, on_output: Put | None = None
    ) -> dict[str, Any]:
        """The answer to a conversation. Cancelling it aborts it in vLLM.

        Args:
            on_output: called with what each step adds

        Raises:
            BridgeError: with the reason why there is none
        """
        sampling, chat, loras = self._generating(params.priority)
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            sampling_params = sampling.make(params.sampling_params, stream=on_output is not None)
            conversation = await chat.render(params, sampling_params)
            stream = self._llm.generate(
                conversation.prompt,
                sampling_params,
                request_id,
                lora_request=await loras.request(params.lora_request),
                priority=params.priority,
                **conversation.engine_arguments(),
            )
            submit(request_id)
            on_delta = on_output and (lambda delta: on_output(delta, conversation.deltas(delta)))
            output = await self._whole(request_id, sampling_params, stream, on_delta)
        result = request_output(output)
        for wire, completion in zip(result["outputs"], output.outputs, strict=True):
            wire["message"] = conversation.message(completion)
        return result

    async def apply_chat_template(self, params: ChatTemplateParams) -> dict[str, Any]:
        """The prompt that a conversation becomes."""
        if self._llm is None or self._chat is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        with map_exceptions(self._request_error):
            return (await self._chat.render(params)).rendered()

    def _generating(self, priority: int) -> tuple[SamplingParamsFactory, Chat, LoRAs]:
        if self._sampling is None or self._chat is None or self._loras is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        if self._pooler is not None:
            raise wrong_runner(self._pooler.task)
        self._check_priority(priority)
        return self._sampling, self._chat, self._loras

    async def pool(self, request_id: str, params: PoolParams) -> dict[str, Any]:
        """The tensor of one prompt; see ``Pooler.pool``."""
        pooler = self._pooling(params.task or "embed", params.priority)
        with self._submitting(request_id) as submit:
            return await pooler.pool(request_id, _prompt(params.prompt), params, submit)

    async def score(self, request_id: str, params: ScoreParams) -> list[dict[str, Any]]:
        """The scores of pairs of texts; see ``Pooler.score``."""
        pooler = self._pooling("embed", params.priority)
        with self._submitting(request_id) as submit:
            return await pooler.score(request_id, params, submit)

    async def waits(self, request_id: str) -> bool:
        """Whether vLLM has not begun with a request that is under way."""
        return self._queue is None or await self._queue.waits(request_id)

    def _submitting(self, request_id: str) -> contextlib.AbstractContextManager[Submit]:
        assert self._queue is not None  # noqa: S101 - a fault of ours, not of the caller's
        return self._queue.request(request_id)

    def _pooling(self, task: str, priority: int) -> Pooler:
        if self._pooler is None:
            raise wrong_task(task, None, self.info()["tasks"])
        self._check_priority(priority)
        return self._pooler

    def _check_priority(self, priority: int) -> None:
        if priority and self._info["scheduling_policy"] != "priority":
            raise BridgeError(
                "invalid_option",
                '`priority` needs an engine with `scheduling_policy: "priority"`.',
                {"option": "priority"},
            )

    def _request_error(self, error: Exception) -> BridgeError:
        names = self._sampling.names if self._sampling is not None else ()
        limit, ended = self._info["max_model_len"], self._llm.output_handler.done()
        return diagnosis.request_error(error, limit, names, ended=ended)

    async def _render(
        self, given: Any, tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer, config = self._llm.renderer, self._llm.model_config
        given, images = await take_images(given, renderer, config)
        embeds = isinstance(given, dict) and "prompt_embeds" in given
        prompt = embeds_prompt(given, config) if embeds else _prompt(given)
        if images:
            prompt = ({"prompt": prompt} if isinstance(prompt, str) else prompt) | images
        parsed = [parse_model_prompt(config, prompt)]
        tokenize = renderer.default_cmpl_tok_params
        if tokenization_kwargs:
            tokenize = tokenize.with_kwargs(
                **tokenization.for_generating(tokenization_kwargs, config.max_model_len)
            )
        if images:
            return await render_images(renderer, parsed[0], tokenize)
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            return (await renderer.render_cmpl_async(parsed, tokenize))[0]
        return renderer.render_cmpl(parsed, tokenize)[0]

    async def _whole(
        self,
        request_id: str,
        params: Any,
        stream: AsyncGenerator[Any, None],
        on_output: Callable[[Any], None] | None,
    ) -> Any:
        """The whole output of a request, from its last output or from all its deltas."""
        whole = None
        # Several completions of one request end each for itself: the error of one ends the others.
        async with contextlib.aclosing(stream):
            async for output in stream:
                meaning = finish.early(output)
                if meaning is None and on_output is not None:
                    on_output(output)
                whole = output if whole is None else _joined(whole, output)
                if meaning is not None:
                    structured = params.structured_outputs is not None
                    raise await self._early_end(meaning, request_id, whole, structured)
        return whole

    async def _early_end(
        self, meaning: finish.Meaning, request_id: str, output: Any, structured: bool = False
    ) -> BridgeError:
        return await diagnosis.early_end(
            meaning, request_id, output, structured=structured, asleep=self._asleep
        )

    def _died(self, _task: asyncio.Future[None]) -> None:
        if self.on_death is not None:
            self.on_death()


async def _warm_up(llm: Any) -> None:
    """Generates one token, so that what vLLM compiles at the first request, or the first with log
    probabilities, and what it finds out only then (a kernel that this device does not have), is
    part of the start."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    config = llm.model_config
    if config.is_encoder_decoder:
        return  # its prompts need more than tokens
    params = SamplingParams(
        max_tokens=1,
        logprobs=1 if config.max_logprobs else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    rendered = llm.renderer.render_cmpl([{"prompt_token_ids": [0]}])[0]
    async for output in llm.generate(rendered, params, "warm-up"):
        if (meaning := finish.early(output)) is not None:
            raise await diagnosis.early_end(
                meaning, "warm-up", output, structured=False, asleep=False
            )


def _joined(whole: Any, delta: Any) -> Any:
    whole.add(delta, aggregate=True)
    whole.num_cached_tokens = delta.num_cached_tokens
    whole.metrics = delta.metrics
    if delta.finished:
        whole.outputs.sort(key=lambda completion: completion.index)
    return whole


def _check_fit(rendered: Any, params: Any) -> None:
    # vLLM gives no word about it, and no log probabilities.
    if rendered["type"] == "embeds" and params.prompt_logprobs is not None:
        raise BridgeError(
            "invalid_option",
            "A prompt of embeddings has no tokens that `prompt_logprobs` could be of.",
            {"option": "prompt_logprobs"},
        )


def _prompt(prompt: Any) -> Any:
    """The prompt as vLLM takes it, from what came over the wire."""
    match prompt:
        case "" | {"prompt_token_ids": b""}:
            raise BridgeError("invalid_prompt", "The prompt is empty.")
        case str():
            return prompt
        case {"prompt_token_ids": bytes(data), **rest} if len(data) % 4 == 0:
            text = rest.pop("prompt", None)
            if not rest and isinstance(text, str | None):
                tokens = {"prompt_token_ids": unpack_u32(data)}
                return tokens if text is None else tokens | {"prompt": text}
    raise BridgeError(
        "invalid_prompt", "A prompt is a string, or a map with `prompt_token_ids` (u32[])."
    )


@contextlib.contextmanager
def _offline(local: bool) -> Iterator[None]:
    """Keeps a model of a local folder from being looked up on the hub while it is loaded.

    Without it, transformers and vLLM ask the hub for files of the folder's name, which takes
    seconds where there is no network. vLLM's processes inherit it. What is loaded later, an
    adapter from the hub, is not touched.
    """
    if not local or "HF_HUB_OFFLINE" in os.environ:
        yield
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def _info(model: str, config: Any, tasks: tuple[str, ...]) -> dict[str, Any]:
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    model_config, cache = config.model_config, config.cache_config
    parallel, scheduler = config.parallel_config, config.scheduler_config
    tokens = cache.kv_cache_size_tokens
    if tokens is None:
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return {
        "model": model,
        "model_type": model_config.hf_config.model_type,
        "architecture": model_config.architecture,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "quantization_config": _quantization_config(model_config.hf_config),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "max_model_len": model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "scheduling_policy": str(scheduler.policy),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "vllm_version": vllm_version,
        "device": current_platform.device_type,
        "device_name": _device_name(current_platform),
        "runner": model_config.runner_type,
        "tasks": sorted(tasks),
    }


def _quantization_config(hf_config: Any) -> dict[str, Any] | None:
    """The quantization config of a loaded model, as plain data."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    return dict(found if isinstance(found, Mapping) else found.to_dict())


def _device_name(current_platform: Any) -> str:
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
