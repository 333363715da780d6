"""What producers make, in the quantizing environment: several outputs in one process, whose imports
take the longest.

    python producing.py ASKED TOLD

reads a JSON list of params of ``quantize`` and writes one of results, or of errors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).resolve().parents[1]
DEMO = PYTHON.parent / "priv" / "models" / "demo"

# Set by what runs the tests; see ``interpreter``.
VARIABLE = "EX_VLLM_QUANTIZE_PYTHON"


def interpreter() -> str:
    """The Python of the quantizing environment, which the full tier has set up."""
    if given := os.environ.get(VARIABLE):
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ex_vllm"
    found = sorted(cache.glob("quantize*/bin/python"))
    assert found, "there is no quantizing environment: mix vllm.setup --with quantize"
    return str(found[-1])


def produce(
    outputs: Sequence[tuple[Any, ...]],
    folder: Path,
    source: Path = DEMO,
    **params: Any,
) -> dict[str, dict[str, Any]]:
    """Makes models.

    Args:
        outputs: the format of each, its options or a word for them, and if there are any, params
            of ``quantize`` of its own
        folder: that they are made in, each under its label
        params: more of ``quantize``, the same for all

    Returns:
        by their labels, what was told of them; of what could not be made, the error's reason and
        message under what it was to be called (``as``), or its format
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = [
        {"source": str(source), "format": form, "options": options, "out": str(folder), **params}
        | dict(*own)
        for form, options, *own in outputs
    ]
    given, told = folder / "asked.json", folder / "told.json"
    given.write_text(json.dumps(asked))
    current = folder / "current"
    current.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(PYTHON), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [interpreter(), __file__, given, told],
        env=environment,
        cwd=current,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert not any(current.iterdir()), "something is left in the current folder"
    results: list[tuple[str, dict[str, Any]]] = json.loads(told.read_text())
    return dict(results)


def _make(params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import msgspec

    from vllm_bridge.errors import BridgeError
    from vllm_bridge.jobs import quantize
    from vllm_bridge.jobs.quantize import formats

    progress: list[Any] = []
    options = params["options"]
    label = options["as"] if isinstance(options, dict) and "as" in options else params["format"]
    try:
        label = formats.output(params["format"], options).label
        asked = msgspec.convert(
            params | {"out": os.path.join(params["out"], label)}, quantize.QuantizeParams
        )
        result = quantize.make(asked, lambda *told, **_: progress.append(told))
    except BridgeError as error:
        return label, {"reason": error.reason, "message": error.message}
    return label, result | {"progress": progress}


if __name__ == "__main__":
    given, told = map(Path, sys.argv[1:])
    told.write_text(json.dumps([_make(params) for params in json.loads(given.read_text())]))
