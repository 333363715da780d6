"""What a process that forks must have been started with, on a CPU. Imports next to nothing: it is
asked before anything else is done.
"""

import glob
import importlib.util
import os

from vllm_bridge import versions


def environment() -> dict[str, str]:
    """What vLLM puts into the environment of its processes on a CPU for libraries to read while
    they are loaded, as far as it is not there: a process that forks must have been started with it.

    Source: ``check_and_update_config`` in vLLM's ``platforms/cpu.py``; a test compares.
    """
    if not versions.is_cpu_build():
        return {}
    wanted = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    libraries = os.environ.get("LD_PRELOAD", "")
    if not any(name in libraries for name in ("libomp", "libgomp", "libiomp")):
        libraries = _joined(
            libraries, _bundled("torch", "../torch.libs/libgomp*.so*", "lib/libgomp*.so*")
        )
    if "libtcmalloc" not in libraries:
        found = _bundled("vllm", "libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")
        libraries = _joined(found, libraries)
    if libraries:
        wanted["LD_PRELOAD"] = libraries
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}


def _joined(*paths: str) -> str:
    return ":".join(path for path in paths if path)


def _bundled(package: str, *patterns: str) -> str:
    """The first file of a package that fits one of the patterns; the package is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for pattern in patterns:
            if found := glob.glob(os.path.normpath(os.path.join(folder, pattern))):
                return found[0]
    return ""
