"""What engines take is what was estimated: of the models of ``sizes.py``, loaded in one process of
their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sizes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TIMEOUT = 900

# Of each way to count one: packed weights, room for adapters, a cache of another dtype, windows
# beside whole layers, a latent vector with experts, a state beside attention.
SAMPLE = ("awq", "lora", "kv-fp8", "gemma3_text", "deepseek_v2", "granitemoehybrid")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sizes")
    lines, log = folder / "results.jsonl", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, sizes.__file__, str(lines), *SAMPLE],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(log.read_text(encoding="utf-8", errors="replace")[-20_000:])
    found = [json.loads(line) for line in Path(lines).read_text(encoding="utf-8").splitlines()]
    return {one["name"]: one for one in found}


@pytest.mark.parametrize("name", SAMPLE)
def test_the_cache_is_as_large_as_estimated(measured: dict[str, dict[str, Any]], name: str) -> None:
    result = measured[name]

    assert result["cache"] == result["estimated_cache"]
    assert result["tokens"] == result["estimated_tokens"]


@pytest.mark.parametrize("name", SAMPLE)
def test_weights_take_what_was_estimated(measured: dict[str, dict[str, Any]], name: str) -> None:
    result = measured[name]

    assert result["estimated_weights"] == pytest.approx(result["weights"], rel=0.02)
