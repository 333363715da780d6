"""Changes of vLLM, one in each file, made in every process that vLLM starts.

The text of a file says what it mends. Its ``SEEN`` has the versions of vLLM that it was tried with,
as prefixes; its ``TOUCHES``, a literal, the names that it replaces or adds to, by vLLM's modules:
``scripts/vllm_names.py`` looks them up in other versions. Its ``apply`` makes the change, and may
be called again. What is in ``cpu`` is for CPUs.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# What a replacement is marked with: the names of what was made of vLLM's own function.
_MARK = "vllm_bridge_patches"

# The names of what was replaced or added to in this process.
touched: set[str] = set()


def apply() -> None:
    """Makes all changes that are for this device. Imports vLLM."""
    from vllm.platforms import current_platform

    for patch in every("cpu" if current_platform.is_cpu() else ""):
        patch.apply()


def every(device: str = "cpu") -> Iterator[ModuleType]:
    """The patches for any device, and those for this one."""
    from vllm_bridge.patches import cpu

    packages = [(__name__, __path__)]
    if device == "cpu":
        packages.append((cpu.__name__, cpu.__path__))
    for package, path in packages:
        for module in pkgutil.iter_modules(path, f"{package}."):
            if not module.ispkg:
                yield importlib.import_module(module.name)


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Puts ``make(original)`` in the place of a function of vLLM's, once.

    Args:
        owner: the module or the class that has it
    """
    original = getattr(owner, name)
    # What is bound to arguments has no name of its own.
    named = make.func if isinstance(make, functools.partial) else make
    marks = getattr(original, _MARK, ())
    mark = f"{named.__module__}.{named.__qualname__}"
    if mark in marks:
        return
    made = make(original)
    setattr(made, _MARK, (*marks, mark))
    is_static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(made) if is_static else made)
    touched.add(f"{_name(owner)}.{name}")


def add(owner: Any, name: str, value: Any) -> bool:
    """Gives a module or a class of vLLM's what it lacks; whether this was the first time."""
    if hasattr(owner, name):
        return False
    setattr(owner, name, value)
    touched.add(_name(owner))
    return True


def _name(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
