"""Writes the dashboard for Grafana, priv/grafana/vllm.json, from the panels below; a test compares
them.

    PYTHON scripts/grafana.py

with any Python from 3.11 on. The file has Grafana's own format: what a panel can have is told under
https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).resolve().parents[1] / "priv" / "grafana" / "vllm.json"

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
# Of what is chosen at the top of the page.
ONE = '{engine=~"$engine", replica=~"$replica"}'
ENGINE = '{engine=~"$engine"}'
EACH = "{{engine}} {{replica}}"
KIND = "{{kind}} {{state}}"


class Panel(NamedTuple):
    title: str
    description: str
    # Queries, each with what its line is called.
    queries: dict[str, str]
    unit: str = "short"
    # Further settings of the figures, by Grafana's names.
    settings: dict[str, Any] | None = None


def rate(metric: str, by: str = "engine", of: str = ONE) -> str:
    """How much a counter grows in a second."""
    return f"sum by ({by}) (rate({metric}{of}[$__rate_interval]))"


def quantiles(metric: str) -> dict[str, str]:
    """Three of a histogram in seconds, of all replicas of an engine together."""
    buckets = rate(f"{metric}_seconds_bucket", "engine, le")
    return {
        f"histogram_quantile({quantile}, {buckets})": f"{{{{engine}}}} p{percent}"
        for quantile, percent in ((0.5, 50), (0.95, 95), (0.99, 99))
    }


# One and more of these are a fault.
FAULTS = {
    "color": {"mode": "thresholds"},
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1}],
    },
}
SHARE = {"max": 1}

# Rows of graphs of how it has been; the first one, NOW, has figures of how it is.
NOW = [
    Panel(
        "Replicas that answer",
        "Of the replicas that there are, how many answered the last scrape with vLLM's metrics.",
        {f"sum(vllm_bridge_up{ONE})": "answer", f"sum(vllm_bridge_replicas{ENGINE})": "wanted"},
    ),
    Panel("Requests running", "In vLLM's batch.", {f"sum(vllm:num_requests_running{ONE})": ""}),
    Panel("Requests waiting", "In vLLM's queue.", {f"sum(vllm:num_requests_waiting{ONE})": ""}),
    Panel(
        "Tokens per second",
        "Generated, all engines together.",
        {f"sum(rate(vllm:generation_tokens_total{ONE}[$__rate_interval]))": ""},
    ),
    Panel(
        "Failed replicas",
        "Given up after too many deaths, or not loaded. They need somebody.",
        {f'sum(vllm_bridge_replica_state{ONE[:-1]}, state="failed"}})': ""},
        settings=FAULTS,
    ),
    Panel(
        "Deaths in the last hour",
        "Of the programs of workers.",
        {f"sum(increase(vllm_bridge_deaths_total{ONE}[1h]))": ""},
        settings=FAULTS | {"decimals": 0},
    ),
]
ROWS = {
    "Latency and throughput": [
        Panel(
            "Time to first token",
            "From the request's arrival in the worker.",
            quantiles("vllm:time_to_first_token"),
            "s",
        ),
        Panel(
            "Inter-token latency",
            "Between two tokens of one request.",
            quantiles("vllm:inter_token_latency"),
            "s",
        ),
        Panel(
            "Request latency",
            "From arrival to the last token.",
            quantiles("vllm:e2e_request_latency"),
            "s",
        ),
        Panel(
            "Tokens per second",
            "Prompt tokens are read, generation tokens are written.",
            {
                rate("vllm:prompt_tokens_total"): "{{engine}} prompt",
                rate("vllm:generation_tokens_total"): "{{engine}} generation",
            },
        ),
        Panel(
            "Requests that end, per second",
            "By what came of them: ok, or the reason of the error.",
            {
                rate("vllm_bridge_requests_total", "engine, outcome", ENGINE): (
                    "{{engine}} {{outcome}}"
                )
            },
            "reqps",
        ),
        Panel(
            "Time in vLLM's queue",
            "Before vLLM begins to compute a request.",
            quantiles("vllm:request_queue_time"),
            "s",
        ),
    ],
    "Load and queue": [
        Panel(
            "Requests in vLLM",
            "Running and waiting, as vLLM's scheduler counts them.",
            {
                f"vllm:num_requests_running{ONE}": f"{EACH} running",
                f"vllm:num_requests_waiting{ONE}": f"{EACH} waiting",
            },
        ),
        Panel(
            "Requests in the bridge",
            "What the library has let in, and how much it lets in.",
            {
                f"vllm_bridge_requests_running{ONE}": f"{EACH} running",
                f"vllm_bridge_requests_waiting{ONE}": f"{EACH} waiting",
                f"vllm_bridge_requests_limit{ONE}": f"{EACH} limit",
            },
        ),
        Panel(
            "Refused requests per second",
            "Refused as overloaded: start more replicas, or let more wait.",
            {rate("vllm_bridge_refused_requests_total", "engine, replica"): EACH},
            "reqps",
        ),
    ],
    "Cache and memory": [
        Panel(
            "KV cache use",
            "Of the KV cache, the share that is in use.",
            {f"vllm:kv_cache_usage_perc{ONE}": EACH},
            "percentunit",
            SHARE,
        ),
        Panel(
            "Prefix cache hits",
            "Of the prompt tokens that were looked up, the share that was there.",
            {
                rate("vllm:prefix_cache_hits_total", "engine, replica")
                + " / "
                + rate("vllm:prefix_cache_queries_total", "engine, replica"): EACH
            },
            "percentunit",
            SHARE,
        ),
        Panel(
            "Preemptions per second",
            "Requests that lost their KV cache to others and are computed again.",
            {rate("vllm:num_preemptions_total", "engine, replica"): EACH},
        ),
        Panel(
            "Memory of the worker's process",
            "Resident memory; the processes of vLLM's engine below it come on top.",
            {f"process_resident_memory_bytes{ONE}": EACH},
            "bytes",
        ),
    ],
    "Replicas and jobs": [
        Panel(
            "State of replicas",
            "Each replica in its state.",
            {f"sum by (engine, state) (vllm_bridge_replica_state{ONE})": "{{engine}} {{state}}"},
        ),
        Panel(
            "Deaths and restarts",
            "In the last five minutes.",
            {
                "sum by (engine, replica, reason) "
                f"(increase(vllm_bridge_deaths_total{ONE}[5m]))": f"{EACH} died: {{{{reason}}}}",
                "sum by (engine, replica) "
                f"(increase(vllm_bridge_restarts_total{ONE}[5m]))": f"{EACH} restarted",
            },
        ),
        Panel(
            "Loading",
            "How long the last start took, and starts that failed in the last hour.",
            {
                f"vllm_bridge_last_load_seconds{ONE}": EACH,
                "sum by (engine, replica, outcome) (increase(vllm_bridge_loads_total"
                f'{ONE[:-1]}, outcome!="ok"}}[1h]))': f"{EACH} failed: {{{{outcome}}}}",
            },
            "s",
        ),
        Panel(
            "Jobs",
            "Of this node: waiting and running, and those that ended in the last hour.",
            {
                "sum by (kind, state) (vllm_bridge_jobs)": KIND,
                "sum by (kind, state) (increase(vllm_bridge_jobs_ended_total[1h]))": KIND,
            },
        ),
    ],
}


def panel(
    panel: Panel, type: str, options: dict[str, Any], place: dict[str, int]
) -> dict[str, Any]:
    return {
        "title": panel.title,
        "description": panel.description,
        "type": type,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, **(panel.settings or {})},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {"refId": name, "datasource": SOURCE, "expr": query, "legendFormat": line}
            for name, (query, line) in zip("ABC", panel.queries.items(), strict=False)
        ],
    }


def panels() -> Iterator[dict[str, Any]]:
    """The rows with their panels, from above."""
    figure = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    graph = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    y = 0
    for title, row in {"Now": NOW, **ROWS}.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"title": title, "type": "row", "collapsed": False, "gridPos": place, "panels": []}
        y += 1
        type, options, height, beside = ("timeseries", graph, 8, 4 if len(row) % 3 else 3)
        if row is NOW:
            type, options, height, beside = ("stat", figure, 4, len(NOW))
        width = WIDTH // beside
        for number, each in enumerate(row):
            below, before = divmod(number, beside)
            place = {"x": before * width, "y": y + below * height, "w": width, "h": height}
            yield panel(each, type, options, place)
        y += -(-len(row) // beside) * height


def choice(name: str, label: str, query: str) -> dict[str, Any]:
    """What can be chosen among the values of a label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    return {
        "title": "VLLM for Elixir",
        "uid": "ex-vllm",
        "tags": ["vllm", "elixir"],
        "description": "Engines and jobs of VLLM for Elixir, as VLLM.Metrics tells of them.",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Data source",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                },
                choice("engine", "Engine", "label_values(vllm_bridge_engine_info, engine)"),
                choice("replica", "Replica", f"label_values(vllm_bridge_up{ENGINE}, replica)"),
            ]
        },
        "annotations": {"list": []},
        "links": [],
        "panels": [{**each, "id": number} for number, each in enumerate(panels(), 1)],
    }


def lines(value: Any, indent: str = "") -> str:
    """JSON in which what fits stands in one line."""
    whole = json.dumps(value)
    if len(indent) + len(whole) <= 140 or not isinstance(value, (dict, list)):
        return whole
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {lines(each, inner)}" for key, each in value.items()]
    else:
        parts = [lines(each, inner) for each in value]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return f"{opened}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closed}"


def written() -> str:
    return lines(dashboard()) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
