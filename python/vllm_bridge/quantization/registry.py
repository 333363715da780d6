"""The quantization methods of which something is known here: one in each file of ``methods``.

Imports neither vLLM nor torch.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from vllm_bridge.quantization import methods
from vllm_bridge.quantization.method import Extra, Method

_added: dict[str, Method] = {}


def register(method: type[Method]) -> None:
    """Adds a method that is in no file of ``methods``: one of a package that is a plugin of vLLM's
    and calls this in its entry point, which runs in each of vLLM's processes."""
    _added[method.name] = method()


def every() -> tuple[Method, ...]:
    return (*_found(), *_added.values())


def of(name: str | None) -> Method:
    """The method that vLLM calls so, or one of which nothing is known."""
    return next((method for method in every() if method.is_named(name or "")), Method())


def meant_by(name: str) -> Method:
    """The method that a user calls so, in any spelling, or one of which nothing is known."""
    spelling = name.strip().lower().replace("_", "-")
    for method in every():
        if spelling in (method.name.replace("_", "-"), *method.other_names):
            return method
    return Method()


def of_load_format(name: str | None) -> Method | None:
    """The method that a ``load_format`` of vLLM's goes with."""
    if name is None:
        return None
    return next((method for method in every() if method.load_format == name), None)


def other_names() -> Mapping[str, str]:
    """vLLM's names of methods, by what else they are called."""
    return {other: method.name for method in every() for other in method.other_names}


def extras() -> Mapping[str, Extra]:
    """What methods need beside vLLM, by their names."""
    return {method.name: method.extra for method in every() if method.extra is not None}


def online_dtypes() -> Mapping[str, Method]:
    """The methods that a ``dtype`` means."""
    return {
        method.online.dtype: method
        for method in every()
        if method.online is not None and method.online.dtype is not None
    }


def with_settings() -> list[str]:
    """The names of the methods that take a ``quantization_config`` of the user's for plain
    models."""
    taking = Method.take_settings
    return [method.name for method in every() if type(method).take_settings is not taking]


def small_format() -> str:
    """The first format of those that take a third of 16 bits, and nothing but vLLM."""
    return next(
        form.name
        for method in every()
        for form in method.formats
        if method.extra is None
        and (size := method.bytes_per_weight(form.config)) is not None
        and size.memory < 2 / 3
    )


def distributions() -> Iterator[str]:
    """The names of all packages that methods need or can use beside vLLM."""
    for extra in extras().values():
        yield from (*extra.modules, *extra.faster)


@functools.cache
def _found() -> tuple[Method, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    modules = [importlib.import_module(f"{methods.__name__}.{name}") for name in names]
    return tuple(
        value()
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    )
