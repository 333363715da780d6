"""Writes the table of methods in guides/quantization.md from the registry; a test compares them.

    PYTHON scripts/quantization_methods.py

with any Python from 3.11 on.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "guides" / "quantization.md"
BEGIN, END = (
    "<!-- methods: written by scripts/quantization_methods.py -->",
    "<!-- end of methods -->",
)
sys.path.insert(0, str(ROOT / "python"))

from vllm_bridge.quantization import registry  # noqa: E402
from vllm_bridge.quantization.method import Method  # noqa: E402

HEAD = "method | also called | formats, with bytes per weight | on a plain model | extra | note"


def row(method: Method) -> str:
    cells = [
        f"`{method.name}`",
        ", ".join(f"`{name}`" for name in method.other_names),
        "; ".join(f"{form.name}: {size(method, form.config)}" for form in method.formats),
        online(method),
        f"`{method.extra.name}`" if method.extra else "",
        method.note,
    ]
    return f"| {' | '.join(cells)} |"


def size(method: Method, config: Mapping[str, Any]) -> str:
    found = method.bytes_per_weight(config)
    if found is None:
        return "?"
    disk, memory = (f"{number:.2f}" for number in found)
    return disk if disk == memory else f"{disk} on disk, {memory} in memory"


def online(method: Method) -> str:
    if method.online is None:
        return ""
    dtype = f'; also `dtype: "{method.online.dtype}"`' if method.online.dtype else ""
    return f"{method.online.words}{dtype}"


def written(guide: str) -> str:
    """The guide with the table as it should be."""
    before, rest = guide.split(BEGIN)
    after = rest.split(END)[1]
    methods = sorted(registry.every(), key=lambda method: method.name)
    rows = [f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1), *map(row, methods)]
    return f"{before}{BEGIN}\n{chr(10).join(rows)}\n{END}{after}"


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
