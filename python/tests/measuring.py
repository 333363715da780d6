"""Scripts that load many engines and write a line for each, run in a process of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# All variants of the largest take minutes, and many more where others work too.
TIMEOUT = 3600


def results(script: str | None, folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """What a script measured of these, or of all that it has, by their names."""
    assert script is not None
    lines, log = folder / "results.jsonl", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, script, str(lines), *names],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(TIMEOUT)
        finally:
            # Nothing of it stays, whatever became of it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(log.read_text(encoding="utf-8", errors="replace")[-20_000:])
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {result["name"]: result for result in found}
