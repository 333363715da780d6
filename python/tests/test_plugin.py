import importlib.metadata
import re
from pathlib import Path

import vllm_bridge
from vllm_bridge import plugin

PYTHON = Path(__file__).resolve().parents[1]
PYPROJECT = (PYTHON.parent / "pyproject.toml").read_text(encoding="utf-8")


def test_the_distribution_beside_the_code_agrees_with_pyproject() -> None:
    (folder,) = PYTHON.glob("*.dist-info")
    distribution = importlib.metadata.PathDistribution(folder)
    assert folder.name == f"vllm_bridge-{vllm_bridge.__version__}.dist-info"
    for name, key in [
        ("Name", "name"),
        ("Version", "version"),
        ("Summary", "description"),
        ("Requires-Python", "requires-python"),
        ("License-Expression", "license"),
    ]:
        declared = re.search(rf'^{key} = "(.*)"$', PYPROJECT, re.MULTILINE)
        assert declared is not None
        assert distribution.metadata[name] == declared[1]
    assert distribution.version == vllm_bridge.__version__


def test_vllm_finds_the_plugin() -> None:
    (entry_point,) = (
        entry_point
        for entry_point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry_point.name == "vllm_bridge"
    )
    assert entry_point.load() is plugin.register
    assert f'vllm_bridge = "{entry_point.value}"' in PYPROJECT
