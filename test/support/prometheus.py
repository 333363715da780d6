"""Reads a file in Prometheus' text format by prometheus_client's own parser, into MessagePack."""

import sys
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

families = [
    {
        "name": family.name,
        "type": family.type,
        "help": family.documentation,
        "samples": [[sample.name, sample.labels, sample.value] for sample in family.samples],
    }
    for family in text_string_to_metric_families(Path(sys.argv[1]).read_text(encoding="utf-8"))
]
sys.stdout.buffer.write(msgspec.msgpack.encode(families))
