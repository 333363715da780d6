import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_bridge import defaults, memory
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.memory import GIB

VARIABLES = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "OMP_NUM_THREADS",
    "TORCH_COMPILE_DISABLE",
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this machine another one; a CPU with two cores and a compiler to begin with."""
    for name in VARIABLES:
        # Set first, so that what the test sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def become(*, cpu: bool = True, cores: int = 2, nodes: int = 1, compiler: bool = True) -> None:
        platform = SimpleNamespace(is_cpu=lambda: cpu)
        monkeypatch.setattr("vllm.platforms.current_platform", platform)
        monkeypatch.setattr(defaults, "cores", lambda: cores)
        monkeypatch.setattr(defaults, "few_cores", lambda: cores <= 4)
        monkeypatch.setattr(defaults, "_numa_nodes", lambda: nodes)
        monkeypatch.setattr(defaults, "_compiler", lambda: "/usr/bin/g++" if compiler else None)
        monkeypatch.setattr(memory, "available_cpu", lambda: 16 * GIB)

    become()
    return become


def chosen(**given: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What is chosen beside ``given``: arguments and environment variables."""
    arguments = dict(given)
    defaults.before_config(arguments)
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: arguments[name] for name in arguments.keys() - given.keys()}, environment


def test_a_gpu_needs_nothing(machine: Callable[..., None]) -> None:
    machine(cpu=False, compiler=False)
    assert chosen(tensor_parallel_size=2) == ({}, {})


def test_one_rank_on_few_cores_computes_in_the_engine_core(machine: Callable[..., None]) -> None:
    machine(cores=3)
    assert chosen() == (
        {"distributed_executor_backend": "uni"},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "2"},
    )


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        # As many ranks here as there are NUMA nodes: vLLM binds them.
        ({"nnodes": 2, "tensor_parallel_size": 2}, None),
        ({"nnodes": 2, "tensor_parallel_size": 4}, "4"),
        ({"nnodes": 4, "data_parallel_size": 2, "tensor_parallel_size": 4}, "4"),
        ({"nnodes": 2, "data_parallel_size": 2, "tensor_parallel_size": 4}, "2"),
    ],
)
def test_ranks_of_other_machines_take_no_cores(
    machine: Callable[..., None], given: dict[str, Any], threads: str | None
) -> None:
    machine(cores=8)
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads} if threads else {}
    assert chosen(**given) == ({}, bound)


def test_one_rank_on_many_cores_has_a_process_of_its_own(machine: Callable[..., None]) -> None:
    machine(cores=16)
    assert chosen() == ({}, {})


def test_the_users_executor_stays(machine: Callable[..., None]) -> None:
    assert chosen(distributed_executor_backend="mp") == ({}, {})


def test_a_user_gets_one_process_on_many_cores_too(machine: Callable[..., None]) -> None:
    machine(cores=16)
    assert chosen(distributed_executor_backend="uni") == (
        {},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "15"},
    )


def test_more_ranks_than_numa_nodes_share_the_cores(machine: Callable[..., None]) -> None:
    machine(cores=4)
    assert chosen(tensor_parallel_size=2) == (
        {},
        {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"},
    )


def test_ranks_with_a_numa_node_each_are_bound_by_vllm(machine: Callable[..., None]) -> None:
    machine(cores=16, nodes=2)
    assert chosen(tensor_parallel_size=2) == ({}, {})


def test_the_users_binding_stays(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert chosen(pipeline_parallel_size=2) == ({}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})


def test_nothing_is_compiled_without_a_compiler(machine: Callable[..., None]) -> None:
    machine(cores=16, compiler=False)
    assert chosen() == ({"enforce_eager": True}, {"TORCH_COMPILE_DISABLE": "1"})


def test_a_compilation_that_the_user_configured_stays(machine: Callable[..., None]) -> None:
    machine(cores=16, compiler=False)
    assert chosen(compilation_config={}) == ({}, {})


class Model:
    """As much of vLLM's config of a model as counts for its KV cache."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len

    def get_num_layers(self, _parallel: Any) -> int:
        return 32

    def get_num_kv_heads(self, _parallel: Any) -> int:
        return 8

    def get_head_size(self) -> int:
        return 128


def kv_cache(max_model_len: int, *, weights: int = 0, **arguments: Any) -> int | None:
    """What the KV cache gets; each token takes 128 KiB."""
    config = SimpleNamespace(
        model_config=Model(max_model_len),
        parallel_config=None,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
    )
    tensors = {"weight": Tensor("U8", (weights,), "", 0, weights)}
    defaults.after_config(config, arguments, Checkpoint(tensors=tensors))
    size: int | None = config.cache_config.kv_cache_memory_bytes
    return size


def test_the_kv_cache_has_room_for_some_sequences(machine: Callable[..., None]) -> None:
    assert kv_cache(128) == GIB
    assert kv_cache(8192) == 4 * GIB


def test_the_kv_cache_leaves_half_of_what_the_weights_leave(machine: Callable[..., None]) -> None:
    assert kv_cache(2**17) == 8 * GIB
    assert kv_cache(2**17, weights=6 * GIB) == 5 * GIB
    assert kv_cache(2**17, weights=17 * GIB) == 0


def test_ranks_share_the_memory(machine: Callable[..., None]) -> None:
    assert kv_cache(2**17, tensor_parallel_size=2, data_parallel_size=2) == 2 * GIB


@pytest.mark.parametrize(
    "option", ["kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"]
)
def test_the_users_kv_cache_stays(machine: Callable[..., None], option: str) -> None:
    assert kv_cache(128, **{option: 1}) is None


def test_a_gpus_memory_is_vllms(machine: Callable[..., None]) -> None:
    machine(cpu=False)
    assert kv_cache(128) is None


def test_vllms_own_variable_counts(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert kv_cache(128) is None
