"""What vLLM does with a model before there is an engine, in this process: a model of the tests is
loaded in a tenth of a second."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_bridge import diagnosis, patches
from vllm_bridge.engine.check import check
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.packed import native

# What computes integers of 4 bits on this CPU.
INTEGERS = "PackedLinearKernel" if native.has_vectors() else "CPUWNA16LinearKernel"


def configure(model: Path, **options: Any) -> tuple[Any, str | None]:
    """vLLM's config and the kernel, by the steps of a start."""
    options = {"enforce_eager": True, "distributed_executor_backend": "uni"} | options
    made = check(str(model), options).configured()
    return made.vllm_config, made.kernel


def load(model: Path, **options: Any) -> Any:
    """The model with its weights, as a worker of vLLM has it; within ``worker``."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    made, _ = configure(model, use_tqdm_on_load=False, max_model_len=256, **options)
    with diagnosis.load_errors(options), set_current_vllm_config(made):
        loader = get_model_loader(made.load_config)
        return loader.load_model(vllm_config=made, model_config=made.model_config)


def refused(model: Path, **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        load(model, **options)
    assert "Traceback" not in caught.value.message
    return caught.value


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """A config sets variables, for the life of a worker."""
    before = dict(os.environ)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[None]:
    """Makes this process the only rank of vLLM, for a while; ``folder`` is empty."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with environment(), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        # As vLLM's workers have it on CPUs.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patches.apply()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two would wait for each other where others work too
        with set_current_vllm_config(VllmConfig()):
            place = f"file://{folder / 'ranks'}"
            parallel_state.init_distributed_environment(1, 0, place, 0, "gloo")
            parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
