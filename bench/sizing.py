"""Writes the table of guides/sizing.md from what python/tests/sizes.py measures.

    PYTHON bench/sizing.py [RESULTS]

with the Python of the library's environment (`mix vllm.doctor` names it) loads every model, which
takes five minutes on two cores, or takes the lines of an earlier run from the file RESULTS.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "guides" / "sizing.md"
SIZES = ROOT / "python" / "tests" / "sizes.py"
BEGIN, END = "<!-- table: written by bench/sizing.py -->", "<!-- end of table -->"
HEAD = (
    "| model | weights, estimated | vLLM's | apart | KV cache, estimated | vLLM's "
    "| tokens, estimated | vLLM's |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(name: str, result: dict[str, Any]) -> str:
    ratio = round(result["estimated_weights"] / result["weights"] - 1, 3) + 0.0
    return (
        f"| {name} | {_mb(result['estimated_weights'])} | {_mb(result['weights'])} | {ratio:+.1%} "
        f"| {_mb(result['estimated_cache'])} | {_mb(result['cache'])} "
        f"| {result['estimated_tokens']} | {result['tokens']} |"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def results(file: Path) -> dict[str, dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return {result["name"]: result for result in map(json.loads, lines)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            file = Path(sys.argv[1])
        else:
            file = Path(folder) / "results.jsonl"
            subprocess.run([sys.executable, str(SIZES), str(file)], check=True)
        found = results(file)
    sys.path.insert(0, str(SIZES.parent))
    from sizes import CASES

    table = "\n".join(row(case.name, found[name]) for name, case in CASES.items())
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    GUIDE.write_text(f"{before}{BEGIN}\n{HEAD}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
