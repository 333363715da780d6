"""HQQ's way to quantize weights, which needs nothing but the weights. Needs torch, and not vLLM.

The zero points are those for which the error W - scale * (q - zero) is smallest in a norm of less
than one, that forgives outliers. That is no problem that can be solved directly; with a second
unknown for the error it becomes two that can, one after the other ("half-quadratic", sections 3
and 4 of the paper, https://mobiusml.github.io/hqq_blog):

* the error is shrunk towards zero, which is the proximal operator of the norm,
* the zero points are the mean of what is left, in each group.

As hqq 0.2.8 has it, the weight of the second unknown stays what it is, and it ends with the first
step that does not make the mean error less.
"""

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_bridge.quantization.hqq.settings import Settings
from vllm_bridge.quantization.hqq.stored import Stored, arrange

_NORM = 0.7
_WEIGHT = 10.0
_STEPS = 20

# Scales are no less than its inverse, and groups whose weights are all but the same have 1.
_MOST = 2e4
_SAME = 1e-4

# So many weights at a time stay in a processor's cache with all that is made of them, and are too
# few for torch to divide them among its threads: chunks are what is divided.
_CHUNK = 2**15


def quantize(weight: torch.Tensor, settings: Settings) -> Stored:
    """A matrix in integers, with hqq's defaults for all that is no setting."""
    rows, columns = weight.shape
    group = settings.group(rows, columns)
    # A row for each group.
    across = settings.axis == 0
    numbers = weight.float().reshape((group, -1) if across else (-1, group))
    numbers = numbers.T.contiguous() if across else numbers
    largest = round(2**settings.nbits - 1)
    low, high = torch.aminmax(numbers, dim=1, keepdim=True)
    span = high - low
    inverse = (largest / span).masked_fill(span <= _SAME, 1.0).clamp(max=_MOST)
    zero = -low * inverse
    if settings.nbits == 4:
        zero = zero.round()
    zero = _best(numbers, inverse, zero, largest)
    integers = torch.empty(numbers.shape, dtype=torch.uint8, device=numbers.device)
    for part in _chunks(numbers):
        integers[part] = _rounded(numbers[part], inverse[part], zero[part], largest)
    integers = integers.T if across else integers
    return arrange(integers, 1 / inverse, zero, rows, columns, settings)


def _best(
    numbers: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, largest: int
) -> torch.Tensor:
    least = float("inf")
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in range(_STEPS):
            better = torch.empty_like(zero)
            step = functools.partial(_step, numbers, inverse, zero, largest, better)
            error = math.fsum(threads.map(step, _chunks(numbers)))
            zero = better
            if error >= least:
                break
            least = error
    return zero


def _step(
    numbers: torch.Tensor,
    inverse: torch.Tensor,
    zero: torch.Tensor,
    largest: int,
    better: torch.Tensor,
    part: slice,
) -> float:
    """One step with some of the groups: writes their next zero points to ``better``, and returns
    the sum of the errors with those that were."""
    numbers, inverse, zero = numbers[part], inverse[part], zero[part]
    integers = _rounded(numbers, inverse, zero, largest)
    error = numbers - (integers - zero) / inverse
    size = error.abs()
    shrunk = (size - size.pow(_NORM - 1) / _WEIGHT).clamp_(min=0).mul_(error.sign_())
    torch.mean(integers - (numbers - shrunk) * inverse, 1, keepdim=True, out=better[part])
    return float(size.sum())


def _rounded(
    numbers: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, largest: int
) -> torch.Tensor:
    return (numbers * inverse).add_(zero).round_().clamp_(0, largest)


def _chunks(numbers: torch.Tensor) -> Iterator[slice]:
    count = max(1, _CHUNK // numbers.shape[1])
    for start in range(0, len(numbers), count):
        yield slice(start, start + count)
