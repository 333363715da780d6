"""What the source of the installed vLLM says, without an import, which takes ten seconds."""

import ast
import functools
import importlib.util
import os


@functools.cache
def module(*path: str) -> ast.Module | None:
    """A module of vLLM's, by the names of its folders and of itself; None where it is not found or
    cannot be read."""
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        place = os.path.join(folder, *path)
        for file in (f"{place}.py", os.path.join(place, "__init__.py")):
            try:
                with open(file, encoding="utf-8") as source:
                    return ast.parse(source.read())
            except (OSError, SyntaxError):
                continue
    return None


def table(name: str, *path: str) -> dict[str, ast.expr]:
    """The entries of a dict of a module that have their names in the source, by them."""
    found = module(*path)
    for node in found.body if found else ():
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        ):
            return {
                key.value: value
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
    return {}
