"""Every quantized variant on the real engine, measured against the same weights in bf16.

    python matrix.py RESULTS [NAME...]

runs the variants one after another in this process, or those named, and appends a line of JSON for
each to the file RESULTS: what was measured, or the error that it ended with.

A variant is loaded as ``VLLM.llm!`` has it loaded. What it is compared with is the engine
without quantization on the weights that other code has unpacked (``checkpoints.unpack``), or, of
methods that round more than the weights, with its layers computed in plain torch (``emulation``).
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# One thread each: no pool of OpenMP's, which a forked process could not use.
os.environ["OMP_NUM_THREADS"] = "1"
# What vLLM compiles for log-probabilities takes longer than all else.
os.environ["TORCH_COMPILE_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

import checkpoints
import emulation
import fp8_models
import gguf_models
import inheriting
import mixtures
import squeezellm_models
import stopping
import weighing
from checkpoints import MODELS, Tensors
from vllm_bridge import defaults, quantization
from vllm_bridge.chat import ChatParams
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.engine.engine import Engine, GenerateParams
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError
from vllm_bridge.lora import LoRA
from vllm_bridge.pooling import PoolParams
from vllm_bridge.quantization import online
from vllm_bridge.quantization.packed import native

FloatArray = npt.NDArray[np.float32]

TIMEOUT = 600
GREEDY = {"temperature": 0.0, "max_tokens": 64}
OPTIONS = {
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "max_logprobs": -1,
}
# Of so many texts the probabilities of the whole vocabulary are compared.
DISTRIBUTIONS = 10
COUNTS, COUNTED = 32, 96
ADAPTER = LoRA("demo-lora", 1, str(MODELS / "demo-lora"))
# The speed is for the table, and takes most of the time.
SPEED = bool(os.environ.get("MATRIX_SPEED"))
POOLING = {"runner": "pooling", "convert": "embed"}
EXACT_ACTIVATIONS = {"quantization_config": {"activations": "exact"}}
WITH_ADAPTERS = {"enable_lora": True, "max_lora_rank": 8}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the demo model.

    Args:
        name: in tests and in the table
        checkpoint: the name of the model to load, as ``checkpoints.make`` has it
        options: engine options
        run: measures it; None for ``compare``
        reference: the weights that the engine should come to; None for those of the demo model
        emulation: how the engine with these weights is to compute; None for as it does
    """

    name: str
    checkpoint: str = "demo"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: Callable[[Path], Tensors] | None = None
    emulation: Callable[[Path], AbstractContextManager[None]] | None = None
    run: "Callable[[Variant, Path, Plain], Awaitable[dict[str, Any]]] | None" = None


@dataclasses.dataclass
class Measured:
    """What an engine said."""

    sentences: dict[str, str]
    chosen: FloatArray  # of each token of all texts
    distributions: FloatArray  # positions of a few texts times vocabulary
    tokens_per_second: float
    weight: dict[str, int]
    info: dict[str, Any]


def pairs(name: str) -> dict[str, str]:
    lines = (MODELS / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def texts() -> list[str]:
    """All facts with their completions."""
    return [prompt + completion for prompt, completion in pairs("facts").items()]


class Session:
    """A loaded engine, with what it is asked."""

    def __init__(self, engine: Engine, info: dict[str, Any]) -> None:
        self.info = info
        self._engine = engine
        self._requests = itertools.count()

    async def complete(
        self, prompts: Iterable[Any], lora: LoRA | None = None, **params: Any
    ) -> list[dict[str, Any]]:
        """All prompts at once."""
        params = GREEDY | params
        return await asyncio.gather(
            *(
                self._engine.generate(
                    str(next(self._requests)), GenerateParams(prompt, params, lora_request=lora)
                )
                for prompt in prompts
            )
        )

    async def texts(self, prompts: Iterable[str], lora: LoRA | None = None) -> dict[str, str]:
        answers = await self.complete(prompts, lora)
        return {one["prompt"]: one["outputs"][0]["text"] for one in answers}

    async def chat(self, question: str) -> str:
        message = {"role": "user", "content": question}
        params = ChatParams(messages=[message], sampling_params=GREEDY)
        result = await self._engine.chat(str(next(self._requests)), params)
        return str(result["outputs"][0]["message"]["content"])

    async def sentences(self) -> dict[str, str]:
        """What is said to everything that the demo model knows an answer to."""
        facts, questions = pairs("facts"), pairs("chat")
        said = await asyncio.gather(*map(self.chat, questions))
        return await self.texts(facts) | dict(zip(questions, said, strict=True))

    async def logprobs(self, texts: Iterable[str]) -> FloatArray:
        """The log-probability of each token of the texts, but of their first ones.

        One text after another: the answers of some methods depend on what is computed together.
        """
        answers = [
            answer
            for text in texts
            for answer in await self.complete([text], max_tokens=1, prompt_logprobs=0)
        ]
        return np.concatenate(
            [np.frombuffer(one["prompt_logprobs"]["logprobs"], "<f4") for one in answers]
        )

    async def distributions(self, texts: Iterable[str]) -> FloatArray:
        """The log-probability of every token of the vocabulary, at each of those positions."""
        params: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": -1, "flat_logprobs": True}
        # Nor is each token of the vocabulary written out at each position, which takes longer
        # than all else.
        params["detokenize"] = False
        answers = [answer for text in texts for answer in await self.complete([text], **params)]
        return np.concatenate([_matrix(one["prompt_logprobs"]) for one in answers])

    async def vectors(self, texts: Iterable[str]) -> FloatArray:
        """The embeddings of texts, of length one."""
        answers = await asyncio.gather(
            *(
                self._engine.pool(str(next(self._requests)), PoolParams(text, "embed"))
                for text in texts
            )
        )
        return np.stack([np.frombuffer(one["data"], "<f4") for one in answers])

    async def weight(self) -> dict[str, int]:
        """What the weights take of memory; see ``weighing.Weight``."""
        (weight,) = await self._engine._llm.collective_rpc("get_weight")
        return dict(weight)

    async def measure(self) -> Measured:
        return Measured(
            sentences=await self.sentences(),
            chosen=await self.logprobs(texts()),
            distributions=await self.distributions(texts()[:DISTRIBUTIONS]),
            tokens_per_second=await self.tokens_per_second() if SPEED else 0.0,
            weight=await self.weight(),
            info=self.info,
        )

    async def take_weights(self, model: Path) -> None:
        """Has the engine go on with the weights of another model of the same shapes."""
        llm = self._engine._llm
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        await llm.reset_prefix_cache()

    async def tokens_per_second(self) -> float:
        """Of many requests at once: the median of three runs."""
        rates = []
        for _ in range(3):
            started = time.monotonic()
            await self.complete(
                ["Count:"] * COUNTS, max_tokens=COUNTED, ignore_eos=True, detokenize=False
            )
            rates.append(COUNTS * COUNTED / (time.monotonic() - started))
        return statistics.median(rates)


@contextlib.asynccontextmanager
async def session(model: Path, **options: Any) -> AsyncIterator[Session]:
    engine = await load(str(model), OPTIONS | options)
    try:
        yield Session(engine, engine.info())
    finally:
        stopping.stop(engine._llm)


async def measure(model: Path, **options: Any) -> Measured:
    """Loads the demo model, or a variant, and asks it everything."""
    async with session(model, **options) as asked:
        return await asked.measure()


class Plain:
    """An engine with the demo model, which takes the weights of one reference after another. A
    start takes longer than all that a reference is asked."""

    def __init__(self, asked: Session, bf16: Measured) -> None:
        self.bf16 = bf16  # what it says with the weights of the demo model
        self._asked = asked

    async def measure(self, model: Path) -> Measured:
        """What is said with the weights in that folder, which are of the demo model's shapes."""
        await self._asked.take_weights(model)
        return await self._asked.measure()


def _matrix(packed: dict[str, Any]) -> FloatArray:
    """The log-probability of every token of the vocabulary, at each position but the first."""
    counts = np.frombuffer(packed["counts"], "<u4")[1:]
    ids = np.frombuffer(packed["token_ids"], "<u4")
    values = np.frombuffer(packed["logprobs"], "<f4")
    rows = np.repeat(np.arange(len(counts)), counts)
    matrix = np.full((len(counts), ids.max() + 1), -np.inf, np.float32)
    matrix[rows, ids] = values
    return matrix


def difference(measured: Measured, reference: Measured) -> dict[str, float]:
    """How far log-probabilities are from those of the reference."""
    chosen = np.abs(measured.chosen - reference.chosen)
    ours, theirs = measured.distributions, reference.distributions
    return {
        "max": float(chosen.max()),
        "mean": float(chosen.mean()),
        "kl": float((np.exp(theirs) * (theirs - ours)).sum(1).mean()),
    }


async def compare(variant: Variant, folder: Path, plain: Plain) -> dict[str, Any]:
    """A variant of the demo model against its weights in bf16, and against the model itself."""
    model = checkpoints.make(variant.checkpoint, folder / variant.checkpoint)
    measured = await measure(model, **variant.options)
    reference = await _reference(variant, model, plain)
    report = _report(model, measured, reference, plain.bf16)
    # One that is emulated is slow.
    return report | {"bf16_tokens_per_second": await _plain_speed()}


def _report(model: Path, measured: Measured, reference: Measured, bf16: Measured) -> dict[str, Any]:
    return {
        "note": measured.info["quantization_note"],
        "wrong": _different(measured.sentences, pairs("facts") | pairs("chat")),
        "otherwise": _different(measured.sentences, reference.sentences),
        "reference": difference(measured, reference),
        "bf16": difference(measured, bf16),
        "load_seconds": measured.info["load_seconds"],
        "tokens_per_second": measured.tokens_per_second,
        "bf16_tokens_per_second": reference.tokens_per_second,
        "disk_bytes": _disk_bytes(model),
        "weight": measured.weight,
        "bf16_weight": bf16.weight,
    }


def _disk_bytes(model: Path) -> int:
    """Of the files with weights."""
    files = [model] if model.is_file() else model.iterdir()
    return sum(f.stat().st_size for f in files if f.suffix in (".safetensors", ".pt", ".gguf"))


# References by what they were made of, for variants that come to the same.
_references: dict[Hashable, Measured] = {}


async def _reference(variant: Variant, model: Path, plain: Plain) -> Measured:
    key = (variant.checkpoint, variant.reference, variant.emulation)
    if key not in _references:
        folder = checkpoints.DEMO
        if variant.reference is not None:
            folder = checkpoints.write_plain(model.with_name("plain"), variant.reference(model))
        if variant.emulation is not None:
            with variant.emulation(model):
                _references[key] = await measure(folder)
        elif variant.reference is not None:
            _references[key] = await plain.measure(folder)
        else:
            return plain.bf16
    return _references[key]


async def _plain_speed() -> float:
    """Of the model itself, at this moment."""
    if not SPEED:
        return 0.0
    async with session(checkpoints.DEMO) as asked:
        return await asked.tokens_per_second()


async def adapt(variant: Variant, folder: Path, _plain: Plain) -> dict[str, Any]:
    """What a variant says with an adapter, and without, in one engine."""
    model = checkpoints.make(variant.checkpoint, folder / variant.checkpoint)
    facts = pairs("facts")
    async with session(model, **variant.options) as asked:
        with_adapter, without = await asyncio.gather(
            asked.texts(facts, ADAPTER), asked.texts(facts)
        )
        return {
            "wrong": _different(without, facts),
            "adapted_wrong": _different(with_adapter, facts | pairs("demo-lora")),
        }


async def embed(variant: Variant, folder: Path, _plain: Plain) -> dict[str, Any]:
    """The vectors of a variant against those of its weights in bf16, and of the model itself."""
    model = checkpoints.make(variant.checkpoint, folder / variant.checkpoint)
    plain = checkpoints.write_plain(folder / "plain", checkpoints.unpack(model))
    vectors = []
    for one, options in ((model, variant.options), (plain, POOLING), (checkpoints.DEMO, POOLING)):
        async with session(one, **options) as asked:
            vectors.append(await asked.vectors(pairs("facts")))
    ours, reference, bf16 = vectors
    return {
        "cosine": float((ours * reference).sum(1).min()),
        "bf16_cosine": float((ours * bf16).sum(1).min()),
        # Two texts of one model, for comparison.
        "other_cosine": float(np.median(ours[1:] @ ours[0])),
    }


async def experts(variant: Variant, folder: Path, _plain: Plain) -> dict[str, Any]:
    """A mixture of experts against the plain one that its weights stand for, and against the one
    that was quantized."""
    if variant.checkpoint == "online":
        made = mixtures.make_online(folder)
    else:
        made = mixtures.make(variant.checkpoint, folder)
    model = made.original if variant.options.get("quantization") else made.quantized
    measured = await measure(model, **variant.options)
    if variant.emulation is not None:
        with variant.emulation(model):
            reference = await measure(model)
    else:
        reference = await _once(made.plain)
    return _report(model, measured, reference, await _once(made.original))


async def gguf(variant: Variant, folder: Path, plain: Plain) -> dict[str, Any]:
    """A GGUF file that computes with activations as they are, against its weights in bf16 and the
    model that was quantized; and as it computes where nothing is asked, against llama.cpp."""
    name, type = variant.checkpoint.split("-")
    model = GGUF_MODELS[name]()
    file = gguf_models.write(model, type, folder)
    exact = await measure(file, **variant.options)
    weights = {key: tensor.bfloat16() for key, tensor in gguf_models.unpack(file).items()}
    unpacked = mixtures.write(folder / "plain", weights, model.config)
    if name == "demo":
        reference, original = await plain.measure(unpacked), plain.bf16
    else:
        # The tokenizer that transformers would have with them depends on the kind of model.
        tokenizer = {"tokenizer": str(checkpoints.DEMO)}
        reference = await _once(unpacked, **tokenizer)
        unquantized = mixtures.write(folder / "original", model.tensors, model.config)
        original = await _once(unquantized, **tokenizer)
    async with session(file) as asked:
        said = await asked.sentences()
        chosen = await asked.logprobs(texts())
        speed = await asked.tokens_per_second() if SPEED else 0.0
        seconds = asked.info["load_seconds"]
    theirs = gguf_models.answers(name, type)
    differences = np.abs(chosen - theirs.logprobs)
    return _report(file, exact, reference, original) | {
        "load_seconds": seconds,
        "tokens_per_second": speed,
        "llama_cpp": {
            "otherwise": _different(said, pairs("facts") | pairs("chat") | theirs.otherwise),
            "max": float(differences.max()),
            "mean": float(differences.mean()),
        },
    }


_measured: dict[bytes, Measured] = {}


async def _once(model: Path, **options: Any) -> Measured:
    """``measure``, of models that several variants have."""
    digest = hashlib.sha256((model / checkpoints.WEIGHTS).read_bytes()).digest()
    if digest not in _measured:
        _measured[digest] = await measure(model, **options)
    return _measured[digest]


async def weigh(_variant: Variant, folder: Path, _plain: Plain) -> dict[str, Any]:
    """What a model of 300 MB takes of memory, as it is and quantized, and what was foreseen."""
    wide, awq = (checkpoints.make(name, folder / name) for name in ("wide", "wide-awq"))
    config = checkpoints.read_config(checkpoints.DEMO) | checkpoints.WIDE | {"head_dim": 128}
    written = gguf_models.Model("wide", load_file(wide / checkpoints.WEIGHTS), config)
    file = gguf_models.write(written, "Q8_0", folder)
    weights: dict[str, Any] = {}
    runs: tuple[tuple[str, Path, dict[str, Any]], ...] = (
        ("bf16", wide, {}),
        ("int8", wide, {"dtype": "int8"}),
        ("int4", wide, {"dtype": "int4"}),
        ("fp8", wide, {"quantization": "fp8"}),
        ("awq", awq, {}),
        ("gguf", file, {}),
    )
    for name, model, options in runs:
        async with session(model, **options) as asked:
            weights[name] = await asked.weight()
        online.take_dtype(options)
        checkpoint = quantization.as_loaded(check_model(str(model), options))
        weights[name]["foreseen"] = fit.loaded_bytes(checkpoint, options)
    weights["gguf"]["file"] = file.stat().st_size
    return weights


async def refuse(variant: Variant, _folder: Path, _plain: Plain) -> dict[str, Any]:
    """The error that a variant ends with, before a process is started."""
    try:
        async with session(checkpoints.DEMO, **variant.options):
            raise AssertionError("it loaded")
    except BridgeError as error:
        return {"reason": error.reason, "details": error.details}


def _different(answers: dict[str, str], expected: dict[str, str]) -> dict[str, str]:
    return {prompt: text for prompt, text in answers.items() if text != expected[prompt]}


def _fork() -> None:
    """Has vLLM fork its processes, which takes one second where starting anew takes seven.

    It would choose so itself, but for its config of the CPU.
    """
    inheriting.prepare()
    after_config = defaults.after_config

    def wrapped(*args: Any, **kwargs: Any) -> None:
        after_config(*args, **kwargs)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    vars(defaults)["after_config"] = wrapped


def _stored(name: str, method: str, compute: emulation.Compute | None = None) -> Variant:
    options = {"quantization": method}
    if compute is None:
        return Variant(name, name, options, checkpoints.unpack)
    return Variant(
        name,
        name,
        options,
        emulation=lambda model: emulation.linear_layers(compute, checkpoints.integers(model)),
    )


def _torchao(name: str, config: str, compute: emulation.Compute | None = None) -> Variant:
    options = {"quantization": "torchao", "quantization_config": config}
    if compute is None:
        return Variant(
            name,
            options=options,
            reference=lambda model: checkpoints.torchao_weights(model, config),
        )
    return Variant(
        name,
        options=options,
        emulation=lambda model: emulation.linear_layers(
            compute, checkpoints.torchao_integers(model, config)
        ),
    )


STORED = (
    _stored("demo-awq", "awq"),
    _stored("demo-gptq", "gptq"),
    _stored("gptq-w2", "gptq"),
    _stored("gptq-w3", "gptq"),
    _stored("gptq-w4-act", "auto-gptq"),
    _stored("gptq-w4-asym-act", "gptqmodel"),
    _stored("gptq-w8", "gptq"),
    _stored("w4a16", "compressed-tensors"),
    _stored("w4a16-asym", "compressed-tensors"),
    _stored("w8a16", "compressed-tensors"),
    _stored("w8a8", "compressed-tensors", emulation.w8a8),
    _stored("fp8-dynamic", "compressed-tensors"),
    _stored("fp8-static", "compressed-tensors"),
    _stored("fp8-tensor", "fp8"),
    _stored("fp8-block", "fp8"),
    _stored("auto-round", "auto-round"),
    _stored("auto-round-w3", "auto-round"),
    _stored("bnb-nf4", "bitsandbytes"),
    _stored("bnb-fp4", "bitsandbytes"),
    _stored("bnb-nf4-double", "bitsandbytes"),
    _stored("bnb-int8", "bitsandbytes", emulation.llm_int8),
    _stored("hqq", "hqq"),
    _stored("hqq-qmodel", "hqq"),
    *(
        dataclasses.replace(_stored(name, "squeezellm"), reference=squeezellm_models.unpack)
        for name in ("squeezellm", "squeezellm-sparse")
    ),
)

# Where the processor has instructions for it that are faster.
ROUNDED = tuple(
    Variant(
        f"{method}-rounded",
        f"demo-{method}",
        {"quantization_config": {"activations": "int8"}},
        checkpoints.unpack,
        emulation=lambda model: emulation.linear_layers(
            emulation.in_columns, checkpoints.numbers(model)
        ),
    )
    for method in ("awq", "gptq")
    if native.can_round(4, 128, torch.bfloat16)
)

# Of the demo model itself, quantized while it is loaded.
_BNB_ONLINE = Variant(
    "bnb-online", options={"quantization": "bitsandbytes"}, reference=checkpoints.nf4_weights
)
_TORCHAO_INT8 = _torchao("torchao-int8", "Int8WeightOnlyConfig", emulation.weights_only)
ONLINE = (
    Variant("fp8-online", options={"quantization": "fp8"}, reference=fp8_models.online_weights),
    _BNB_ONLINE,
    dataclasses.replace(_BNB_ONLINE, name="dtype-int4", options={"dtype": "int4"}),
    _TORCHAO_INT8,
    dataclasses.replace(_TORCHAO_INT8, name="dtype-int8", options={"dtype": "int8"}),
    _torchao("torchao-int8-dynamic", "Int8DynamicActivationInt8WeightConfig", emulation.dynamic),
    _torchao("torchao-fp8", "Float8WeightOnlyConfig"),
    Variant("hqq-online", options={"quantization": "hqq"}, reference=checkpoints.hqq_weights),
)

# What is said with an adapter is compared with what it was trained to say.
ADAPTED = tuple(
    dataclasses.replace(
        one, name=f"lora-{one.name}", options=one.options | WITH_ADAPTERS, run=adapt
    )
    for one in STORED
    if one.name
    in (
        *("demo-awq", "demo-gptq", "gptq-w3", "gptq-w4-asym-act", "w4a16", "bnb-nf4"),
        *("bnb-int8", "hqq", "hqq-qmodel", "squeezellm", "squeezellm-sparse"),
    )
)


def _e4m3(_model: Path) -> AbstractContextManager[None]:
    return emulation.kv_cache(torch.float8_e4m3fn)


def _e5m2(_model: Path) -> AbstractContextManager[None]:
    return emulation.kv_cache(torch.float8_e5m2)


KV_CACHES = tuple(
    Variant(f"kv-{dtype}", options={"kv_cache_dtype": dtype}, emulation=rounding)
    for dtype, rounding in (
        ("auto", None),
        ("bfloat16", None),
        ("float16", None),
        ("fp8", _e4m3),
        ("fp8_e4m3", _e4m3),
        ("fp8_e5m2", _e5m2),
    )
)

EMBEDDING = tuple(
    dataclasses.replace(one, name=f"embedding-{one.name}", options=one.options | POOLING, run=embed)
    for one in STORED
    if one.name in ("demo-awq", "w4a16")
)

EXPERTS = (
    *(Variant(f"experts-{name}", name, run=experts) for name in mixtures.VARIANTS),
    Variant("experts-fp8-online", "online", {"quantization": "fp8"}, run=experts),
    Variant(
        "experts-fp8-channel-online",
        "fp8-channel",
        {"quantization": "fp8_per_channel"},
        run=experts,
    ),
    dataclasses.replace(
        _TORCHAO_INT8,
        name="experts-torchao-int8",
        checkpoint="fp8-channel",
        run=experts,
    ),
)

GGUF_MODELS: dict[str, Callable[[], gguf_models.Model]] = {
    "demo": gguf_models.demo,
    "mixture": gguf_models.mixture,
    "qwen2": gguf_models.qwen2,
}


def _gguf(model: str, type: str) -> Variant:
    name = f"gguf-{type}" if model == "demo" else f"gguf-{model}-{type}"
    return Variant(name, f"{model}-{type}", EXACT_ACTIVATIONS, run=gguf)


# Of every kind of block one, and the usual mixes of types.
_SAMPLED = ("F16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ4_XS")
GGUF = (
    *(_gguf("demo", type) for type in _SAMPLED),
    *(_gguf(model, "Q4_K_M") for model in ("mixture", "qwen2")),
)

# Made of the same blocks; they run when they are named.
FURTHER_GGUF = (
    *(_gguf("demo", type) for type in gguf_models.TYPES if type not in _SAMPLED),
    *(_gguf(model, "Q8_0") for model in ("mixture", "qwen2")),
)

WEIGHED = Variant("weighed", run=weigh)

KV_REFUSED = Variant("kv-refused", options={"kv_cache_dtype": "nvfp4"}, run=refuse)

VARIANTS = (
    # The first: a process that inherits little tells more of what it takes itself.
    WEIGHED,
    Variant("bf16"),
    *STORED,
    *ROUNDED,
    *ONLINE,
    *KV_CACHES,
    KV_REFUSED,
    *ADAPTED,
    *EMBEDDING,
    *EXPERTS,
    *GGUF,
)


async def main(results: Path, names: list[str]) -> None:
    _fork()
    weighing.install()
    with tempfile.TemporaryDirectory() as temporary:
        # What a start leaves for a guard to remove is removed with it.
        tempfile.tempdir = temporary
        every = (*VARIANTS, *FURTHER_GGUF)
        async with session(checkpoints.DEMO) as asked:
            plain = Plain(asked, await asked.measure())
            for variant in [one for one in every if one.name in names] if names else VARIANTS:
                folder = Path(temporary) / variant.name
                line = await _run(variant, folder, plain)
                shutil.rmtree(folder, ignore_errors=True)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


async def _run(variant: Variant, folder: Path, plain: Plain) -> dict[str, Any]:
    started = time.monotonic()
    try:
        async with asyncio.timeout(TIMEOUT):
            line = await (variant.run or compare)(variant, folder, plain)
    except Exception as error:
        traceback.print_exc()
        line = {"error": str(error), "reason": getattr(error, "reason", None)}
    return line | {"name": variant.name, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
