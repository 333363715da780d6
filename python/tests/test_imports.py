"""How the modules of the package depend on each other, read from their sources."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vllm_bridge"


def sources(package: Path) -> dict[str, str]:
    """The text of each module, by its name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imported(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Those of the modules that a text names in its imports.

    An import within a function counts like any other: there it would only hide a circle. That a
    package is run before its modules does not: so it is with every package that uses them.
    """
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in modules)
            case ast.ImportFrom(module=str(source), names=names, level=0) if source in modules:
                for alias in names:
                    below = f"{source}.{alias.name}"
                    yield below if below in modules else source
            case ast.ImportFrom(level=level) if level > 0:
                raise AssertionError("imports are absolute in this package")


def circle(modules: Mapping[str, str]) -> list[str]:
    """A way from a module back to itself; empty where there is none."""
    sorter = TopologicalSorter({name: set(imported(modules[name], modules)) for name in modules})
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize(
    "text", ["from package import b", "import package.b", "def f():\n    from package.b import x"]
)
def test_a_circle_is_found_wherever_the_import_stands(text: str) -> None:
    modules = {"package": "", "package.a": text, "package.b": "from package.a import y"}
    assert set(circle(modules)) == {"package.a", "package.b"}


def test_no_module_needs_itself() -> None:
    modules = sources(PACKAGE)
    assert "vllm_bridge.rpc.server" in modules
    assert circle(modules) == []
