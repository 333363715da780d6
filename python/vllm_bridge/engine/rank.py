"""What one machine has of an engine whose head is on another: vLLM's headless mode.

vLLM's processes here wait for those of the head, by the address that the options name, and compute
what these tell them. There is nothing to ask.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_bridge import diagnosis
from vllm_bridge.checkpoints.digest import digest
from vllm_bridge.engine import start
from vllm_bridge.engine.config import Config, offline
from vllm_bridge.errors import BridgeError
from vllm_bridge.patches import ranks, replace


async def run(
    model: str,
    options: Mapping[str, Any],
    progress: start.Progress,
    devices: Sequence[str] | None = None,
) -> None:
    """Starts vLLM's processes and stays until they end. Like ``start.load``, with the options that
    the head is given, but for ``node_rank``.

    Raises:
        BridgeError: with the reason why they did not start, or ended
    """
    prepared = await start.prepare(model, options, progress, devices)
    plan, config = prepared.plan, prepared.config
    with diagnosis.load_errors(plan.options):
        with offline(plan):
            progress("engine", {"checkpoint": digest(prepared.source)})
            if config.vllm_config.parallel_config.node_rank_within_dp:
                _executor = part(config)
                # Whose end is this process's.
                await asyncio.Event().wait()
            processes = engines(config)
        await asyncio.to_thread(processes.monitor_engine_liveness)
    raise BridgeError("engine_dead", "vLLM's engines of this node ended.")


def part(config: Config) -> Any:
    """Part of the ranks of an engine core of another node."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    replace(MultiprocExecutor, "start_worker_monitor", ranks.watching)
    return MultiprocExecutor(config.vllm_config)


def engines(config: Config) -> Any:
    """Engine cores of their own, which share the requests of the head's."""
    from vllm.utils.network_utils import get_tcp_uri
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.executor import Executor

    parallel = config.vllm_config.parallel_config
    return CoreEngineProcManager(
        local_engine_count=parallel.data_parallel_size_local,
        start_index=parallel.data_parallel_rank,
        local_start_index=0,
        vllm_config=config.vllm_config,
        local_client=False,
        handshake_address=get_tcp_uri(
            parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port
        ),
        executor_class=Executor.get_class(config.vllm_config),
        log_stats=not config.arguments.get("disable_log_stats"),
    )
