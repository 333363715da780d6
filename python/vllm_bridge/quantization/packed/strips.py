"""Products with weights that are unpacked a strip of rows at a time, so that there never is a plain
copy of a layer; and how torch is told of them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

# A strip has about so many weights: it stays in a cache of the processor.
WEIGHTS = 2**20

_library = torch.library.Library("vllm_bridge", "FRAGMENT")


def of(rows: int, columns: int) -> Iterator[slice]:
    """The strips of a layer."""
    count = max(1, WEIGHTS // max(1, columns))
    for start in range(0, rows, count):
        yield slice(start, min(start + count, rows))


def matmul(x: torch.Tensor, rows: int, plain: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """``x`` times the transposed weights, of which ``plain`` returns some rows."""
    product = x.new_empty((*x.shape[:-1], rows))
    for strip in of(rows, x.shape[-1]):
        product[..., strip] = torch.nn.functional.linear(x, plain(strip))
    return product


def operation(
    schema: str, compute: Callable[..., Any], shape: Callable[..., Any], returns: str = "Tensor"
) -> None:
    """Makes ``torch.ops.vllm_bridge.NAME``, which compiled graphs call as it is. Defined in this
    way, a call costs half of what it does with ``torch.library.custom_op``.

    Args:
        schema: ``NAME(arguments)``
        compute: what it does, on any device
        shape: makes an empty tensor of the result's shape and dtype from the arguments, or several
        returns: the schema of the result
    """
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> {returns}")
    _library.impl(name, compute, "CompositeExplicitAutograd")
    _library._register_fake(name, shape)
