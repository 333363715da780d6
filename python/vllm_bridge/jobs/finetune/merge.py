"""A model with an adapter merged into its weights: a plain model, in the base's own dtype."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_bridge.checkpoints import models
from vllm_bridge.jobs.finetune import base, options
from vllm_bridge.jobs.finetune.checkpoints import written


def merge(model: str, adapter: str, out: Path, tell: Callable[..., None]) -> dict[str, Any]:
    """
    Args:
        model: the base; one that is quantized is dequantized
        adapter: the folder that peft wrote
        out: the folder that the merged model is written into
        tell: told how far it is, as ``jobs.task.Telling`` is

    Raises:
        BridgeError: as for training over the base
    """
    import torch
    from peft import PeftModel

    started = time.monotonic()
    checkpoint = models.check_model(model, {})
    base.check(checkpoint, quantizes=False)
    dtype = checkpoint.dtype or "bfloat16"
    tell("loading")
    # The sum is rounded once.
    plain = base.plain(base.load(checkpoint, options.parse({"dtype": "float32"})))
    tell("merging")
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    merged = merged.to(getattr(torch, dtype.removeprefix("torch.")))
    merged.config.use_cache = True
    tell("writing")
    out.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(str(out))
    base.tokenizer(checkpoint).save_pretrained(str(out))
    return {
        "base": checkpoint.description if checkpoint.quant_method else "plain",
        "dtype": dtype,
        "files": (files := written(out)),
        "bytes": sum(files.values()),
        "seconds": round(time.monotonic() - started, 1),
    }
