"""Products with weights that stay packed as GGUF files have them.

A weight is a tensor of bytes, [rows, bytes of a row], or [experts, rows, bytes of a row] for a
stack of them; ``type`` is ggml's number of its type (``types.TYPES``), or what ``repack`` returns.

On CPUs ggml computes, where it is installed: products for few tokens as llama.cpp does, and for
many the weights, a strip at a time, which torch multiplies with. Elsewhere torch does it all.
"""

import torch

from vllm_bridge.quantization.gguf import ggml, operation
from vllm_bridge.quantization.gguf.types import TYPES
from vllm_bridge.quantization.packed import strips

# The product of so many tokens takes about as long by ggml as by dequantized weights, which cost
# the same for any number: 17 (Q5_K) to 78 (Q2_K), on a processor with products of bfloat16.
_MANY = 48


def columns(weight: torch.Tensor, type: int) -> int:
    """How many weights a row has."""
    packing = TYPES[type % ggml.REPACKED]
    return int(weight.shape[-1]) // packing.size * packing.weights


def dequantize(weight: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights as numbers, [..., rows, columns]: ggml's 32-bit values, rounded to ``dtype``.
    Those of repacked weights are not to be had."""
    shape = (*weight.shape[:-1], columns(weight, type))
    if not weight.numel():
        return weight.new_empty(shape, dtype=dtype)
    if is_for_ggml(weight):
        rows = weight.reshape(-1, weight.shape[-1])
        return ggml.dequantize(rows, type, shape[-1]).to(dtype).view(shape)
    packing = TYPES[type]
    return packing.values(weight.reshape(-1, packing.size)).to(dtype).view(shape)


def matmul(x: torch.Tensor, weight: torch.Tensor, type: int, exact: bool = False) -> torch.Tensor:
    """``x`` [..., columns] times the transpose of a weight [rows, bytes], in the dtype of ``x``.

    Args:
        exact: whether ``x`` is multiplied as it is, with the weights rounded to its dtype, however
            few tokens it has; else it may be rounded to 8 bits, as llama.cpp does
    """
    product: torch.Tensor = torch.ops.vllm_bridge.gguf_matmul(x, weight, type, exact)
    return product


def pair(
    x: torch.Tensor,
    first: tuple[torch.Tensor, int],
    second: tuple[torch.Tensor, int],
    is_gated: bool,
) -> torch.Tensor:
    """Two products in one call, where ``x`` may be rounded to 8 bits: of ``x`` with both weights,
    each with its type, side by side.

    Args:
        is_gated: whether it is the one with the second weight instead, of what SwiGLU makes of
            that with the first
    """
    product: torch.Tensor = torch.ops.vllm_bridge.gguf_pair(x, *first, *second, is_gated)
    return product


def normed(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    weights: list[tuple[torch.Tensor, int]],
    is_gated: bool,
    before: tuple[torch.Tensor, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In one call: ``x`` is added to a residual, RMSNorm makes something of the sum, and that is
    multiplied; the product, and the sum.

    Args:
        norm: the weight of the norm
        weights: one or two, each with its type, as ``matmul`` and ``pair`` have them
        before: a weight that ``x`` is multiplied with before that
    """
    second = weights[1] if len(weights) > 1 else (None, 0)
    both: tuple[torch.Tensor, torch.Tensor] = torch.ops.vllm_bridge.gguf_normed(
        *(x, *(before or (None, 0)), residual, norm, epsilon), *(*weights[0], *second, is_gated)
    )
    return both


def repack(weight: torch.Tensor, type: int) -> int:
    """Brings a weight into the layout that is computed fastest here, in its place: for products
    that are not exact.

    Returns:
        the number of what it is then: ``type`` where it stays as it is
    """
    if not is_for_ggml(weight):
        return type
    operation.library()  # compiled while a model loads, and not when it is asked
    return ggml.repack(weight, type, columns(weight, type))


def kernel(exact: bool = False) -> str:
    """What computes products on CPUs here, for people to read."""
    if library := ggml.library():
        how = "exact" if exact else "activations in 8 bits, as llama.cpp has them"
        return f"ggml {library.ggml_version().decode()} ({how})"
    return "torch; `mix vllm.setup --with gguf` brings ggml, which is many times as fast"


def is_for_ggml(weight: torch.Tensor) -> bool:
    return not weight.is_cuda and ggml.library() is not None


def _matmul(x: torch.Tensor, weight: torch.Tensor, type: int, exact: bool) -> torch.Tensor:
    if type >= ggml.REPACKED:
        return ggml.matmul(x, weight, type)
    tokens = x.numel() // x.shape[-1]
    if not exact and tokens < _MANY and is_for_ggml(weight):
        return ggml.matmul(x, weight.contiguous(), type)
    return strips.matmul(x, weight.shape[0], lambda rows: dequantize(weight[rows], type, x.dtype))


def _pair(
    x: torch.Tensor,
    first: torch.Tensor,
    first_type: int,
    second: torch.Tensor,
    second_type: int,
    is_gated: bool,
) -> torch.Tensor:
    tokens = x.numel() // x.shape[-1]
    if tokens < _MANY and is_for_ggml(first):
        weights = (first.contiguous(), first_type), (second.contiguous(), second_type)
        return ggml.pair(x, *weights, is_gated)
    one = _matmul(x, first, first_type, False)
    if is_gated:
        gate, up = one.float().chunk(2, -1)
        inner = torch.nn.functional.silu(gate).mul_(up).to(x.dtype)
        return _matmul(inner, second, second_type, False)
    return torch.cat([one, _matmul(x, second, second_type, False)], -1)


def _normed(
    x: torch.Tensor,
    before: torch.Tensor | None,
    before_type: int,
    residual: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    first: torch.Tensor,
    first_type: int,
    second: torch.Tensor | None,
    second_type: int,
    is_gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    added = x if before is None else matmul(x, before, before_type)
    sum = added.float() + residual.float()
    scale = sum.square().mean(-1, keepdim=True).add(epsilon).rsqrt()
    inner = (sum * scale).to(norm.dtype).mul(norm).to(x.dtype)
    if second is None:
        product = matmul(inner, first, first_type)
    else:
        product = pair(inner, (first, first_type), (second, second_type), is_gated)
    return product, sum.to(x.dtype)


def _normed_shape(
    x: torch.Tensor,
    before: torch.Tensor | None,
    before_type: int,
    residual: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    first: torch.Tensor,
    first_type: int,
    second: torch.Tensor | None,
    second_type: int,
    is_gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = 0 if second is None else second.shape[0]
    rows += 0 if is_gated else first.shape[0]
    return x.new_empty((*x.shape[:-1], rows)), torch.empty_like(residual)


# The first one is ``operation``'s as well, which leaves to the other what it does not do itself.
for _suffix in ("", "_any"):
    strips.operation(
        f"gguf_matmul{_suffix}(Tensor x, Tensor weight, int type, bool exact)",
        _matmul,
        lambda x, weight, type, exact: x.new_empty((*x.shape[:-1], weight.shape[0])),
    )
    strips.operation(
        f"gguf_pair{_suffix}(Tensor x, Tensor first, int first_type, Tensor second, "
        "int second_type, bool is_gated)",
        _pair,
        lambda x, first, first_type, second, second_type, is_gated: x.new_empty(
            (*x.shape[:-1], second.shape[0] + (0 if is_gated else first.shape[0]))
        ),
    )
    strips.operation(
        f"gguf_normed{_suffix}(Tensor x, Tensor? before, int before_type, Tensor residual, "
        "Tensor norm, float epsilon, Tensor first, int first_type, Tensor? second, "
        "int second_type, bool is_gated)",
        _normed,
        _normed_shape,
        returns="(Tensor, Tensor)",
    )
