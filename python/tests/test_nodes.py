"""What an engine over several machines needs to know of each."""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor

from checkpoints import DEMO
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.digest import digest
from vllm_bridge.engine import nodes, rank, start
from vllm_bridge.errors import BridgeError

VARIABLES = ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        # Set first, so that what the test sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def variables() -> list[str | None]:
    return [os.environ.get(name) for name in VARIABLES]


def test_the_network_is_that_of_the_head() -> None:
    nodes.meet({"nnodes": 2, "node_rank": 1, "master_addr": "127.0.0.1"})
    assert variables() == ["127.0.0.1", "lo"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    nodes.meet({"nnodes": 2, "master_addr": "127.0.0.1"})
    assert variables() == ["127.0.0.1", "ib0"]


def test_an_engine_of_one_machine_keeps_vllms_choice() -> None:
    nodes.meet({"tensor_parallel_size": 2})
    nodes.meet({"nnodes": 1})
    assert variables() == [None, None]


def test_a_public_address_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "own_address", lambda head: head)
    monkeypatch.setattr(nodes, "interface", lambda _address: "eth0")
    with caplog.at_level(logging.WARNING):
        nodes.meet({"nnodes": 2, "master_addr": "10.0.0.1"})
        assert caplog.messages == []
        del os.environ["VLLM_HOST_IP"]
        nodes.meet({"nnodes": 2, "master_addr": "8.8.8.8"})
    assert ["8.8.8.8, a public address" in message for message in caplog.messages] == [True]
    assert variables() == ["8.8.8.8", "eth0"]


def test_an_address_that_no_interface_has() -> None:
    with pytest.raises(OSError, match=r"no interface .* 192\.0\.2\.1"):
        nodes.interface("192.0.2.1")


def test_a_head_may_have_a_name() -> None:
    assert nodes.own_address("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(socket.gaierror):
        nodes.own_address("nowhere.invalid")


def model(folder: Path, weights: bytes, **config: int) -> Checkpoint:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    return Checkpoint(folder=str(folder), config=config, files=("model.safetensors",))


def test_the_same_model_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    weights = os.urandom(300_000)
    here = digest(model(tmp_path / "here", weights, layers=2))
    assert digest(model(tmp_path / "there", weights, layers=2)) == here
    for place in (5, 150_000, 299_999):
        changed = bytearray(weights)
        changed[place] ^= 1
        assert digest(model(tmp_path / f"changed-{place}", bytes(changed), layers=2)) != here
    assert digest(model(tmp_path / "longer", weights + b"0", layers=2)) != here
    assert digest(model(tmp_path / "config", weights, layers=3)) != here


TP, PP, DP = "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"


# What a node starts: part of an engine core's ranks, from the first one on and how many; or engine
# cores of its own, likewise.
@pytest.mark.parametrize(
    ("sizes", "node", "of", "started"),
    [
        ({TP: 2}, 1, 2, ("ranks", 1, 1)),
        ({PP: 2}, 1, 2, ("ranks", 1, 1)),
        ({PP: 2, TP: 2}, 1, 2, ("ranks", 2, 2)),
        ({DP: 2}, 1, 2, ("engines", 1, 1)),
        ({DP: 4}, 1, 2, ("engines", 2, 2)),
        ({DP: 2, TP: 2}, 1, 4, ("ranks", 1, 1)),
        ({DP: 2, TP: 2}, 2, 4, ("engines", 1, 1)),
        ({DP: 2, TP: 2}, 3, 4, ("ranks", 1, 1)),
    ],
)
def test_what_a_node_starts(
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, int],
    node: int,
    of: int,
    started: tuple[str, int, int],
) -> None:
    seen: list[tuple[str, int, int]] = []

    class Started(Exception):
        pass

    class Executor(multiproc_executor.MultiprocExecutor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any) -> None:
            parallel = vllm_config.parallel_config
            assert (parallel.master_addr, parallel.master_port) == ("127.0.0.1", 29600)
            here = parallel.local_world_size
            seen.append(("ranks", parallel.node_rank_within_dp * here, here))
            raise Started

    def engines(**given: Any) -> None:
        assert given["handshake_address"] == "tcp://127.0.0.1:29601"
        assert given["local_client"] is False
        seen.append(("engines", given["start_index"], given["local_engine_count"]))
        raise Started

    monkeypatch.setattr(multiproc_executor, "MultiprocExecutor", Executor)
    monkeypatch.setattr(utils, "CoreEngineProcManager", engines)
    made = AsyncEngineArgs(
        model=str(DEMO),
        nnodes=of,
        node_rank=node,
        master_addr="127.0.0.1",
        master_port=29600,
        data_parallel_rpc_port=29601,
        max_model_len=128,
        enforce_eager=True,
        **sizes,
    ).create_engine_config()
    checkpoint = Checkpoint()
    prepared = SimpleNamespace(
        plan=SimpleNamespace(options={}, checkpoint=checkpoint),
        config=SimpleNamespace(vllm_config=made, arguments={}),
        source=checkpoint,
    )

    async def prepare(*_given: Any) -> SimpleNamespace:
        return prepared

    monkeypatch.setattr(start, "prepare", prepare)
    told: list[Any] = []

    def progress(phase: str, figures: Mapping[str, Any] = {}, /) -> None:
        told.append((phase, figures))

    with pytest.raises(BridgeError) as caught:
        asyncio.run(rank.run("demo", {}, progress))
    assert "Started" in caught.value.details["exception"]
    assert seen == [started]
    assert told == [("engine", {"checkpoint": digest(checkpoint)})]
