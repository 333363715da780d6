import asyncio
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from vllm_bridge import admin
from vllm_bridge.rpc.table import NoParams


@pytest.fixture
def families() -> Iterator[list[dict[str, Any]]]:
    labels = {"model_name": "m", "engine": "0"}
    gauge = Gauge("vllm:gauge", "A gauge.", labels)
    counter = Counter("vllm:tokens", "A counter.", labels)
    histogram = Histogram("vllm:seconds", "A histogram.", labels, buckets=[1.0])
    other = Gauge("other", "Not vLLM's.")
    gauge.labels(**labels).set(math.nan)
    counter.labels(**labels).inc(2)
    histogram.labels(**labels).observe(0.5)
    try:
        yield asyncio.run(admin.metric_families(None, NoParams()))
    finally:
        for metric in (gauge, counter, histogram, other):
            REGISTRY.unregister(metric)


def test_metrics_have_the_names_of_the_text_format(families: list[dict[str, Any]]) -> None:
    by_name = {family["name"]: family for family in families}
    assert all(name.startswith(("vllm:", "process_")) for name in by_name)
    labels = {"model_name": "m", "engine": "0"}
    assert by_name["vllm:tokens_total"] == {
        "name": "vllm:tokens_total",
        "type": "counter",
        "help": "A counter.",
        "samples": [["vllm:tokens_total", labels, 2.0]],
    }
    assert by_name["vllm:seconds"]["samples"] == [
        ["vllm:seconds_bucket", labels | {"le": "1.0"}, 1.0],
        ["vllm:seconds_bucket", labels | {"le": "+Inf"}, 1.0],
        ["vllm:seconds_count", labels, 1.0],
        ["vllm:seconds_sum", labels, 0.5],
    ]
    [[_name, _labels, value]] = by_name["vllm:gauge"]["samples"]
    assert math.isnan(value)
    assert by_name["process_resident_memory_bytes"]["type"] == "gauge"


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "grafana.py"))
    assert script["FILE"].read_text(encoding="utf-8") == script["written"](), (
        "run scripts/grafana.py"
    )
