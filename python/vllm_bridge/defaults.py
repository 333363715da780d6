"""What this package chooses where the user did not, and why. Only the CPU needs any."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_bridge import memory
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.machine import cores, few_cores

logger = logging.getLogger(__name__)

# The least that the KV cache gets on a CPU, and how many sequences of full length it has room
# for where that is more: enough to batch, little enough to leave the machine to others.
CPU_KV_CACHE_BYTES = memory.GIB
CPU_KV_CACHE_SEQUENCES = 4


def use_devices(devices: Sequence[str]) -> None:
    """Leaves these devices alone visible to the engine, by the platform's own variable."""
    from vllm.platforms import Platform, current_platform

    variable = current_platform.device_control_env_var
    if variable == Platform.device_control_env_var:
        raise BridgeError(
            "unsupported",
            f"vLLM cannot choose among the devices of {current_platform.device_type}.",
            {"option": "devices"},
            remedy="Leave the option out.",
        )
    os.environ[variable] = ",".join(devices)


def before_config(arguments: dict[str, Any]) -> None:
    """Fills in what the user has left open and vLLM's config depends on."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    # Without a C++ compiler torch's inductor cannot compile: neither the model, so that the engine
    # would not start, nor the functions that vLLM compiles at their first use whatever the
    # options say (those of logprobs, say), so that a request would end it.
    if not _compiler() and not _any_set(arguments, "compilation_config"):
        logger.warning("no C++ compiler (g++) was found: models run uncompiled, and slower")
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if arguments.get("enforce_eager") is None:
            arguments["enforce_eager"] = True

    if _ranks(arguments) == 1:
        # A Worker process of its own costs its start, a hand-over per step, and the core that
        # either side of the hand-over waits on by spinning. vLLM has it to bind OpenMP threads
        # to cores, which gains nothing where there are few.
        if few_cores() and not _any_set(arguments, "distributed_executor_backend"):
            arguments["distributed_executor_backend"] = "uni"
        if arguments.get("distributed_executor_backend") == "uni":
            # Else vLLM takes "mp" for it on CPUs.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            # vLLM leaves one thread to an engine core that computes itself. One core stays
            # free for the event loop and the BEAM, as vLLM reserves one for its own.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() - 1)))
        return
    here = _ranks_here(arguments)
    if here > _numa_nodes() and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # vLLM binds each rank to a NUMA node of its own and refuses more ranks than nodes.
        # Unbound, each would take threads for all cores, and they would wait for each other.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // here)))


def after_config(config: Any, arguments: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Fills in what the user has left open and depends on vLLM's config."""
    from vllm.platforms import current_platform

    # vLLM would take nine tenths of all memory, as it does of a GPU that is its own.
    if (
        current_platform.is_cpu()
        and not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        and not _any_set(
            arguments, "kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"
        )
    ):
        here = _ranks(arguments) * arguments.get("data_parallel_size", 1)
        here = max(1, here // arguments.get("nnodes", 1))
        left = memory.available_cpu() - fit.loaded_bytes(checkpoint, arguments)
        config.cache_config.kv_cache_memory_bytes = min(
            max(CPU_KV_CACHE_BYTES, CPU_KV_CACHE_SEQUENCES * _sequence_bytes(config)),
            max(left, 0) // (2 * here),
        )


def _sequence_bytes(config: Any) -> int:
    """What a sequence of full length takes in the KV cache of one rank, at most: keys and
    values in two bytes each, in every layer."""
    model, parallel = config.model_config, config.parallel_config
    per_token = (
        2
        * 2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
    )
    return int(per_token * model.max_model_len)


def _any_set(arguments: Mapping[str, Any], *names: str) -> bool:
    return any(arguments.get(name) is not None for name in names)


def _ranks(arguments: Mapping[str, Any]) -> int:
    """Worker processes of one engine core."""
    size = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    return int(size)


def _ranks_here(arguments: Mapping[str, Any]) -> int:
    """Those of them that are on this machine."""
    engines, nodes = arguments.get("data_parallel_size", 1), arguments.get("nnodes", 1)
    return int(_ranks(arguments) // max(1, nodes // engines))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _numa_nodes() -> int:
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    return len(get_visible_memory_node())
