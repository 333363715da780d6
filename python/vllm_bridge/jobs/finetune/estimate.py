"""What a training would take: disk, memory and time, foreseen from the model's headers, the data
and the options.

What is trained is asked of peft, which puts its adapter on a model without weights. Memory is the
most that is there at one moment of a step; time is counted as ``jobs.foreseen`` does.
"""

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm_bridge.checkpoints import detect
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.jobs import foreseen
from vllm_bridge.jobs.finetune import answers, base
from vllm_bridge.jobs.finetune.plan import Plan
from vllm_bridge.jobs.foreseen import Foreseen, Machine
from vllm_bridge.sizing import layers

if TYPE_CHECKING:
    from vllm_bridge.jobs.finetune.options import Settings

# The process with torch, transformers and peft, as measured on a CPU.
_FRAMEWORK: Final = 530 * 2**20

# Bytes of a weight of the base that is quantized while it is read; NF4 with double quantization.
# And what is computed with meanwhile.
_NF4: Final = 0.52
_INT8: Final = 1.01
_QUANTIZING: Final = 1.6

# A weight of the adapter has a gradient and two moments beside it, all in float32.
_TRAINED: Final = 16

# What a layer keeps for its backward pass of each token, in numbers of the hidden size and of the
# inner one: the inputs of its products and norms, and what goes in and out of the adapters.
_KEPT_HIDDEN: Final = 16
_KEPT_INNER: Final = 6

# How often that is there for a layer that is computed once more.
_AGAIN: Final = 3

# Logits, their probabilities, and the gradient of both.
_LOGITS: Final = 4

# Seconds of the machine that ``jobs.foreseen`` measures with: to import the libraries; for a
# billion weights that are read, and that are quantized; for a billion products of a weight and a
# token; and for a billion weights that one token of an answer is multiplied with, and that are
# dequantized.
_START: Final = 9.0
_READING: Final = 5.0
_ROUNDING: Final = 26.0
_PRODUCTS: Final = 0.02
_ANSWERING: Final = 0.35
_DEQUANTIZING: Final = 0.6

# Python's part of a layer's pass.
_LAYER: Final = 0.0015

# How many passes going back is worth: it goes through the layers and their adapters, while the
# weights of the base get no gradients.
_BACKWARD: Final = 2

# Of a token of text, as most tokenizers cut it.
_BYTES: Final = 4

# States that are on disk at once while the oldest is removed: the adapter and two moments each.
_STATE: Final = 3


def outputs(plan: Plan, machine: Machine) -> dict[str, Foreseen]:
    """What a training makes, by the labels of its outputs: the adapter, and where that is asked for
    the merged model.

    Raises:
        BridgeError: ``invalid_option`` where peft puts no such adapter on this model,
            ``unsupported_model`` where transformers does not load it
    """
    adapter, train, held_out = _adapter(plan), _lengths(plan, False), _lengths(plan, True)
    settings = plan.settings
    kept = settings.training.get("save_total_limit")
    steps = _steps(plan)
    states = math.ceil(1 / _share(settings.training["save_steps"], steps)) if kept is None else kept
    found = {
        "adapter": Foreseen(
            adapter,
            adapter * (1 + _STATE * (states + 1)),
            needed(plan.checkpoint, settings, max([*train, *held_out])),
            machine.minutes(*_seconds(plan, steps, train, held_out)),
        )
    }
    if settings.own.merge:
        found["merged"] = _merged(plan.checkpoint, machine)
    return found


def to_wire(each: dict[str, Foreseen]) -> dict[str, Any]:
    """As ``plan_quantize`` tells it, with the labels."""
    return {
        "outputs": [{"label": label, **one.to_wire()} for label, one in each.items()],
        "together": foreseen.together(list(each.values())).to_wire(),
    }


def told(plan: Plan) -> dict[str, Any]:
    """What is told of a training: what it will be, and the memory that it is foreseen to take."""
    lengths = [len(example.tokens) for example in [*plan.train, *plan.held_out]]
    longest = max(lengths, default=plan.max_length)
    return plan.to_wire() | {"memory_bytes": needed(plan.checkpoint, plan.settings, longest)}


def needed(checkpoint: Checkpoint, settings: "Settings", longest: int) -> int:
    """Bytes of memory, at the moment when that is most.

    Args:
        longest: tokens of the longest example; a batch may be filled up to it
    """
    config = checkpoint.config
    text = layers.text_config(config)
    hidden, inner = text.number("hidden_size"), text.number("intermediate_size")
    vocabulary, count = text.number("vocab_size"), layers.count(text)
    found = detect.of(checkpoint)
    parameters = found.parameters or 0
    outer = 2 * vocabulary * hidden
    size = 2 if settings.own.dtype == "bfloat16" else 4
    if settings.bitsandbytes:
        each = _INT8 if settings.bitsandbytes.get("load_in_8bit") else _NF4
        weights = outer * size + (parameters - outer) * each
    elif checkpoint.quant_method:
        weights = (found.bytes or 0) + outer * (size - 2) + inner * hidden * size
    else:
        weights = parameters * size
    # The files are mapped while the weights are made of them.
    loading = (found.bytes or 0) + weights
    if settings.bitsandbytes:
        loading += _QUANTIZING * parameters
    rank = settings.lora["r"]
    adapter = count * rank * (9 * hidden + 3 * inner) * _TRAINED
    tokens = settings.training["per_device_train_batch_size"] * longest
    kept = count * tokens * (_KEPT_HIDDEN * hidden + _KEPT_INNER * inner) * size
    if settings.training.get("gradient_checkpointing"):
        # One layer at a time, which is computed once more; and what goes into each.
        kept = _AGAIN * kept // max(1, count) + count * tokens * hidden * size
    logits = tokens * vocabulary * _LOGITS * 4
    return int(max(loading, weights + adapter + kept + logits)) + _FRAMEWORK


def _adapter(plan: Plan) -> int:
    """Bytes of the adapter's files."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    with base.loading():
        config = AutoConfig.from_pretrained(plan.checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # layers have the shapes that they have without it
    with base.loading(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # How an adapter begins may take weights to know, and is no matter of its size.
    settings = dataclasses.replace(
        plan.settings, lora={**plan.settings.lora, "init_lora_weights": True}
    )
    tensors = get_peft_model_state_dict(
        base.with_adapter(model, settings), save_embedding_layers=False
    )
    header = {
        name: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [tensor.nbytes] * 2}
        for name, tensor in tensors.items()
    }
    said = json.dumps(LoraConfig(task_type="CAUSAL_LM", **settings.lora).to_dict(), default=str)
    weights = sum(int(tensor.numel()) for tensor in tensors.values())
    return 4 * weights + len(json.dumps(header, separators=(",", ":")) + said)


def _merged(checkpoint: Checkpoint, machine: Machine) -> Foreseen:
    parameters = detect.of(checkpoint).parameters or 0
    size = parameters * (4 if checkpoint.dtype == "float32" else 2)
    # The sum is in float32, and is there as it is written, too.
    memory = 4 * parameters + size + _FRAMEWORK
    minutes = machine.minutes(_START, parameters / 1e9 * 3 * _READING)
    return Foreseen(size, size, memory, minutes)


def _lengths(plan: Plan, of_held_out: bool) -> list[int]:
    """Of the examples, in tokens; guessed from the bytes of records whose tokenizer is not here."""
    examples = plan.held_out if of_held_out else plan.train
    if examples or plan.checkpoint.repository is None:
        return [len(one.tokens) for one in examples]
    records = plan.records.held_out if of_held_out else plan.records.train
    sizes = [len(json.dumps(one.fields, ensure_ascii=False).encode()) for one in records]
    return [min(plan.max_length, 1 + size // _BYTES) for size in sizes]


def _steps(plan: Plan) -> int:
    training = plan.settings.training
    batches = math.ceil(
        (len(_lengths(plan, False)) + len(plan.replay)) / training["per_device_train_batch_size"]
    )
    each = math.ceil(batches / (training.get("gradient_accumulation_steps") or 1))
    asked = training.get("max_steps") or 0
    return int(asked) if asked > 0 else max(1, math.ceil(each * training["num_train_epochs"]))


def _share(every: float, steps: int) -> float:
    """Of all steps that are between two evaluations or states; below 1 it is that share itself."""
    return max(1 / steps, every if every < 1 else every / steps)


def _seconds(
    plan: Plan, steps: int, train: Sequence[int], held_out: Sequence[int]
) -> tuple[float, float]:
    """Of one core, and of several together."""
    training, config = plan.settings.training, layers.text_config(plan.checkpoint.config)
    parameters = detect.of(plan.checkpoint).parameters or 0
    weights = parameters - config.number("vocab_size") * config.number("hidden_size")
    count, batch = layers.count(config), training["per_device_train_batch_size"]
    micro = steps * (training.get("gradient_accumulation_steps") or 1)
    evaluations = 2 + math.ceil(1 / _share(training["eval_steps"], steps)) if held_out else 0
    evaluated = math.ceil(len(held_out) / training.get("per_device_eval_batch_size", 8))
    asked = [plan.settings.own.probes or answers.PROBES, plan.replay]
    # Probes are answered once more where the training has changed the answer.
    answered = answers.TOKENS * sum(map(len, [asked[0], *asked]))
    forward = 1 + _BACKWARD + bool(training.get("gradient_checkpointing"))
    tokens = micro * _filled(train, batch) * forward
    tokens += evaluations * sum(held_out)
    passes = micro * forward + evaluations * evaluated + answered
    parallel = parameters * _READING + tokens * weights * _PRODUCTS
    parallel += answered * weights * _ANSWERING
    if plan.settings.bitsandbytes:
        parallel += parameters * _ROUNDING
    if plan.settings.bitsandbytes or plan.checkpoint.quant_method:
        parallel += passes * weights * _DEQUANTIZING
    return _START + passes * count * _LAYER, parallel / 1e9


def _filled(lengths: Sequence[int], batch: int) -> float:
    """Tokens of a batch on average, filled up to its longest."""
    chosen = random.Random(0)  # noqa: S311
    drawn = [max(chosen.choices(lengths, k=min(batch, len(lengths)))) for _ in range(100)]
    return min(batch, len(lengths)) * sum(drawn) / len(drawn)
