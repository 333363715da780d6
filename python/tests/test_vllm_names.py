"""What ``scripts/vllm_names.py`` says of other versions of vLLM, by small ones made here, and
whether all names that are used are there in the installed one."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT


def script() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_names", ROOT / "scripts" / "vllm_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_names"] = module  # for dataclasses
    spec.loader.exec_module(module)
    return module


names = script()

OURS = """
from vllm import lazy
from vllm.engine import Engine as Theirs, moved, start

TOUCHES = {"vllm.engine": ("patched", "Engine.step")}

def use(engine, vllm):
    from vllm.engine import options

    start(options, mode=2)
    Theirs.create(1)
    Theirs(size=1).steps
    engine.look(deep=True)
    engine.pace, options.inner.anything, vllm.engine.local
"""

BEFORE = {
    "__init__": "LAZY = {'lazy': '.engine'}\ndef __getattr__(name): ...",
    "engine": """
from .other import *
options = object()
def start(options, mode=1): ...
def patched(a, *, b=1): ...
class Base:
    @classmethod
    def create(cls, size): ...
class Engine(Base):
    def __init__(self, size):
        self.steps = self.pace = size
    def step(self): ...
    def look(self, deep=False): ...
""",
    "other": "moved = 1",
}


def versions(folder: Path, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The differences of two versions for what ``OURS`` uses."""
    for version, files in (("before", before), ("after", after)):
        package = folder / version / "vllm"
        package.mkdir(parents=True)
        for name, text in files.items():
            (package / f"{name}.py").write_text(text)
    (folder / "ours").mkdir()
    (folder / "ours" / "used.py").write_text(OURS)
    uses = names.collect(folder / "ours")
    other, reference = (names.Sources(folder / version) for version in ("after", "before"))
    found: list[str] = names.differences(uses, other, reference)
    return found


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("class Base", "class Base", None),
        ("moved = 1", "gone = 1", "`vllm.engine.moved` is gone"),
        ("options = object()", "option = object()", "`vllm.engine.options` is gone"),
        ("'lazy'", "'lazier'", "`vllm.lazy` is gone"),
        ("mode=1", "speed=1", "`vllm.engine.start` does not take `mode`"),
        ("mode=1", "mode, speed", "`vllm.engine.start` needs `speed`"),
        ("(options, mode", "(*, mode", "`vllm.engine.start` takes 0 arguments, and is given 1"),
        ("cls, size", "cls", "`vllm.engine.Engine.create` takes 0 arguments, and is given 1"),
        ("def create", "def make", "`vllm.engine.Engine.create` is gone"),
        ("(self, size)", "(self, sizes)", "`vllm.engine.Engine` does not take `size`"),
        ("b=1", "c=1", "`vllm.engine.patched`, which is replaced, takes (a, *, c)"),
        ("def step(self)", "def run(self)", "`vllm.engine.Engine.step` is gone"),
        ("self.pace", "self.speed", "`.pace`, defined in engine.py, is nowhere now"),
        ("deep=False", "far=False", "`.look` of engine.py does not take `deep`"),
    ],
)
def test_what_another_version_lacks(tmp_path: Path, old: str, new: str, line: str | None) -> None:
    assert any(old in text for text in BEFORE.values())
    after = {name: text.replace(old, new) for name, text in BEFORE.items()}
    found = versions(tmp_path, BEFORE, after)
    assert len(found) == (line is not None)
    if line is not None:
        assert found[0].startswith(f"* {line}")
        assert found[0].endswith("(used.py)")


def test_every_name_of_vllms_that_is_used_is_there() -> None:
    uses, vllm = names.collect(), names.Sources(names.installed())
    assert {"vllm.v1.engine.async_llm.AsyncLLM", "vllm._custom_ops.scaled_fp8_quant"} <= {
        *uses.names
    }
    assert [name for name in uses.names if vllm.find(name) is None] == []
    for (name, call), files in uses.calls.items():
        takes = vllm.parameters(name)
        assert takes is None or names.refusal(call, takes) is None, (name, files)
