"""Scripts that load many engines and write a line for each, run in a process of their own."""

import json
import os
import select
import sys
import tempfile
from pathlib import Path
from typing import Any

from test_guard import Run

# All variants of the largest take minutes, and many more where others work too.
TIMEOUT = 3600


def results(script: str | None, folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """What a script measured of these, or of all that it has, by their names.

    It has a guard, as workers have: nothing of it outlives this process, however that ends.
    """
    assert script is not None
    lines = folder / "results.jsonl"
    command = [sys.executable, script, str(lines), *names]
    # Not in the folder, whose path may be too long for one of a run.
    with tempfile.TemporaryDirectory(prefix="measuring-") as base:
        run = Run(Path(base) / "run", command, dict(os.environ))
        try:
            ended, _, _ = select.select([run.process], [], [], TIMEOUT)
            print(run.log()[-20_000:])
            assert ended, f"{script} takes too long"
        finally:
            run.dispose()
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {result["name"]: result for result in found}
