"""How much memory a training takes, foreseen from a model's config and the options. Needs neither
torch nor transformers."""

from typing import TYPE_CHECKING, Final

from vllm_bridge.checkpoints import detect
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.sizing import layers

if TYPE_CHECKING:
    from vllm_bridge.jobs.finetune.options import Settings

# The process with torch, transformers and peft, as measured on a CPU.
_FRAMEWORK: Final = 650 * 2**20

# Bytes of a weight of the base that is quantized while it is read; NF4 with double quantization.
_NF4: Final = 0.52
_INT8: Final = 1.01

# A weight of the adapter has a gradient and two moments beside it, all in float32.
_TRAINED: Final = 16

# What a layer keeps for its backward pass of each token, in numbers of the hidden size and of the
# inner one: the inputs of its products and norms, and what goes in and out of the adapters.
_KEPT_HIDDEN: Final = 16
_KEPT_INNER: Final = 6

# Logits, their probabilities, and the gradient of both.
_LOGITS: Final = 4


def needed(checkpoint: Checkpoint, settings: "Settings", longest: int) -> int:
    """Bytes, at the moment when that is most.

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
        # The layer that is being quantized is there as it was, too.
        weights = outer * size + (parameters - outer) * each + parameters // max(1, count) * size
    elif checkpoint.quant_method:
        weights = (found.bytes or 0) + outer * (size - 2) + inner * hidden * size
    else:
        weights = parameters * size
    rank = settings.lora["r"]
    adapter = count * rank * (9 * hidden + 3 * inner) * _TRAINED
    tokens = settings.training["per_device_train_batch_size"] * longest
    kept = count * tokens * (_KEPT_HIDDEN * hidden + _KEPT_INNER * inner) * size
    if settings.training.get("gradient_checkpointing"):
        kept = kept // max(1, count) + count * tokens * hidden * size
    logits = tokens * vocabulary * _LOGITS * 4
    return int(weights + adapter + kept + logits) + _FRAMEWORK
