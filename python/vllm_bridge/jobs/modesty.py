"""How a job stands back behind engines: for the processors, and when memory is short."""

import contextlib
import os

# How much less urgent than others this process is, see nice(2).
NICE = "EX_VLLM_NICE"

# Of 1000: it goes before an engine when memory is short.
OOM_SCORE = "500"


def be_modest() -> None:
    """Has this process and those below it stand back behind engines."""
    os.nice(int(os.environ.get(NICE, "0")))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
