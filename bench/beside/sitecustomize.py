"""Lets plain vLLM live on processors with AMX, in each of its processes.

Without it the program of ``beside.py`` ends by SIGILL there, and nothing is left to measure
against: see the patch, which is all that it gets of ours.
"""

import runpy
from pathlib import Path

PATCH = Path(__file__).parents[2] / "python" / "vllm_bridge" / "patches" / "cpu" / "amx.py"

runpy.run_path(str(PATCH))["apply"]()
