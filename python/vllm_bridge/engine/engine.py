"""One vLLM engine that is loaded: asked and described."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Annotated, Any

import msgspec

from vllm_bridge import (
    admin,
    diagnosis,
    finish,
    tokenization,
)
from vllm_bridge.beam_search import BeamSearch, SearchParams
from vllm_bridge.chat import Chat, ChatParams, ChatTemplateParams
from vllm_bridge.engine import pushed
from vllm_bridge.engine.plan import Plan
from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.heartbeat import Heartbeat
from vllm_bridge.images import render_images, take_images
from vllm_bridge.lora import LoRA, LoRAs
from vllm_bridge.outputs import Growing, request_output
from vllm_bridge.params import SamplingParamsFactory
from vllm_bridge.patches import ranks
from vllm_bridge.pooling import Pooler, PoolParams, ScoreParams, wrong_runner, wrong_task
from vllm_bridge.prompt_embeds import embeds_prompt
from vllm_bridge.queueing import Queue, Submit
from vllm_bridge.rpc.protocol import unpack_u32
from vllm_bridge.serving.app import Apps
from vllm_bridge.serving.exchange import Exchange, HttpParams, Settings
from vllm_bridge.stream import Put

logger = logging.getLogger(__name__)

# Longer texts are tokenized in a thread, so that the event loop goes on meanwhile; for
# shorter ones the hand-over costs more than the work.
LONG_TEXT = 4096

# How often the engine had been put to sleep when the request, or a part of it, was given to vLLM.
_sleeps_before: ContextVar[int] = ContextVar("_sleeps_before", default=0)


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
    """A loaded engine; ``start`` makes it.

    Args:
        llm: vLLM's ``AsyncLLM``
        tasks: what it can be asked to do
        info: its *engine info*; what it pools is added here
        plan: what was loaded, which of a model that is quantized in place is what was made
    """

    def __init__(
        self, llm: Any, chat: Chat, tasks: tuple[str, ...], info: dict[str, Any], plan: Plan
    ) -> None:
        self.plan = plan
        self._llm = llm
        self._chat = chat
        self._sampling = SamplingParamsFactory(llm.model_config.get_diff_sampling_param())
        self._loras = LoRAs(llm)
        self._queue = Queue(llm)
        self._heartbeat = Heartbeat(llm)
        self._pushes = pushed.is_possible()
        self._asleep = False
        # How often it has been put to sleep.
        self._sleeps = 0
        self._stopped = asyncio.Event()
        pools = llm.model_config.runner_type == "pooling"
        self._pooler = Pooler(llm, tasks, self._early_end) if pools else None
        self._apps = Apps(llm, tasks)
        self._info = info | {
            "pooling_task": self._pooler and self._pooler.task,
            "labels": self._pooler and self._pooler.labels,
        }

    def on_death(self, died: Callable[[], None]) -> None:
        """Has ``died`` called once vLLM's processes are dead."""
        # The handler of vLLM's outputs ends only with the engine.
        self._llm.output_handler.add_done_callback(lambda _task: died())

    def info(self) -> dict[str, Any]:
        return self._info

    def progress(self) -> dict[str, int]:
        """How far the engine has come; see ``heartbeat``."""
        progress = self._heartbeat.read()
        # Requests of an engine that sleeps wait until it is woken.
        return progress | {"unfinished": 0} if self._asleep else progress

    def exit_summary(self) -> str:
        """How vLLM's processes ended, as far as this one knows: "EngineCore_DP0: SIGSEGV"."""
        manager = self._llm.engine_core.resources.engine_manager
        if not hasattr(manager, "finished_procs"):  # those of Ray are not its children
            return ""
        ended = manager.finished_procs().items()
        return ", ".join(f"{name}: {ranks.ended(code)}" for name, code in ended)

    async def asked(self, serve: Callable[[Any, Any], Awaitable[Any]], params: Any) -> Any:
        """One of the methods of ``tokenizer`` or ``admin``."""
        with map_exceptions(self._request_error):
            if serve is admin.sleep:
                # What is under way ends before the answer comes.
                self._asleep = True
            try:
                answer = await serve(self._llm, params)
                if serve is admin.sleep:
                    self._sleeps += 1
                return answer
            finally:
                if serve in (admin.sleep, admin.wake_up):
                    self._asleep = await self._llm.is_sleeping()

    async def lora(self, serve: Callable[[LoRAs, Any], Awaitable[Any]], params: Any) -> Any:
        """One of the methods of ``lora``."""
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
        self._check_generates(params.priority)
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            sampling_params = self._sampling.make(
                params.sampling_params, stream=on_output is not None
            )
            rendered = await self._render(params.prompt, params.tokenization_kwargs)
            _check_fit(rendered, sampling_params)
            request = (rendered, sampling_params, request_id)
            arguments = {
                "lora_request": await self._loras.request(params.lora_request),
                "priority": params.priority,
            }
            submit(request_id)
            if on_output is not None and self._pushes:
                whole = Growing(on_output)
                await pushed.generate(self._llm, *request, whole.take, **arguments)
                output = await self._checked(request_id, sampling_params, whole)
            else:
                stream = self._llm.generate(*request, **arguments)
                output = await self._whole(request_id, sampling_params, stream, on_output)
        return request_output(output)

    async def beam_search(self, request_id: str, params: SearchParams) -> dict[str, Any]:
        """The beams of one prompt; see ``BeamSearch.search``."""
        self._check_generates()
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            rendered = await self._render(params.prompt)
            lora_request = await self._loras.request(params.lora_request)
            output, meaning = await BeamSearch(self._llm, submit, self._stopped).search(
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
        self._check_generates(params.priority)
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            sampling_params = self._sampling.make(
                params.sampling_params, stream=on_output is not None
            )
            conversation = await self._chat.render(params, sampling_params)
            stream = self._llm.generate(
                conversation.prompt,
                sampling_params,
                request_id,
                lora_request=await self._loras.request(params.lora_request),
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

    def prepare_http(self, settings: Iterable[Settings]) -> None:
        """Has vLLM's API app made for requests with these settings, while others are served."""
        self._apps.prepare(settings)

    async def http_request(
        self, request_id: str, params: HttpParams, exchange: Exchange
    ) -> dict[str, Any]:
        """What vLLM's own API app answers. Cancelling it aborts in vLLM what the app has asked.

        Raises:
            BridgeError: where the engine has no answer: it is dead, or the adapter does not load
        """
        with map_exceptions(self._request_error), self._submitting(request_id) as submit:
            lora = await self._loras.request(params.lora_request)
            answer, asked = await self._apps.serve(
                exchange, params.settings, params.model, lora, submit
            )
            if asked.fault is not None:
                raise asked.fault
            if asked.cut_off is not None:
                raise await self._early_end(finish.Meaning.CUT_OFF, request_id, asked.cut_off)
        return answer

    async def apply_chat_template(self, params: ChatTemplateParams) -> dict[str, Any]:
        """The prompt that a conversation becomes."""
        with map_exceptions(self._request_error):
            return (await self._chat.render(params)).rendered()

    def _check_generates(self, priority: int = 0) -> None:
        if self._pooler is not None:
            raise wrong_runner(self._pooler.task)
        self._check_priority(priority)

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
        return await self._queue.waits(request_id)

    @contextlib.contextmanager
    def _submitting(self, request_id: str) -> Iterator[Submit]:
        with self._queue.request(request_id) as note:

            def submit(name: str) -> None:
                _sleeps_before.set(self._sleeps)
                note(name)

            _sleeps_before.set(self._sleeps)
            yield submit

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
        limit, ended = self._info["max_model_len"], self._llm.output_handler.done()
        return diagnosis.request_error(error, limit, self._sampling.names, ended=ended)

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
        whole = Growing(on_output)
        async with contextlib.aclosing(stream):
            async for output in stream:
                if whole.take(output):
                    break
        return await self._checked(request_id, params, whole)

    async def _checked(self, request_id: str, params: Any, whole: Growing) -> Any:
        if whole.early is not None:
            structured = params.structured_outputs is not None
            raise await self._early_end(whole.early, request_id, whole.output, structured)
        return whole.output

    async def _early_end(
        self, meaning: finish.Meaning, request_id: str, output: Any, structured: bool = False
    ) -> BridgeError:
        # A request may hear of its end when the engine has been woken up again.
        asleep = self._asleep or self._sleeps > _sleeps_before.get()
        if meaning is finish.Meaning.CUT_OFF and not asleep:
            self._stopped.set()
        return await diagnosis.early_end(
            meaning, request_id, output, structured=structured, asleep=asleep
        )


# The methods of an engine that are asked for by their names, each with the type of its params.
METHODS = {"apply_chat_template": ChatTemplateParams}

# Each is given the request's name too, and ends by the times in its params.
LIMITED = {"beam_search": SearchParams, "pool": PoolParams, "score": ScoreParams}

# Each is also given what takes its deltas; None where none are wanted.
STREAMED = {"generate": GenerateParams, "chat": ChatParams}


async def warm_up(llm: Any) -> None:
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
