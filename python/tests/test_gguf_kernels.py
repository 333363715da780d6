"""Products with packed weights, against gguf-py's own dequantization."""

import gguf
import numpy
import pytest
import torch

from vllm_bridge.quantization.gguf import kernels
from vllm_bridge.quantization.gguf.types import TYPES

NAMES = {number: packing.name for number, packing in TYPES.items()}


def packed(number: int, rows: int, columns: int) -> torch.Tensor:
    """Random blocks whose scales are ordinary numbers: any bytes are a weight."""
    packing = TYPES[number]
    blocks = rows * columns // packing.weights
    generator = numpy.random.default_rng(number)
    if packing.weights == 1:
        values = generator.standard_normal((rows, columns)).astype(numpy.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(number)).view(numpy.uint8)
        return torch.from_numpy(data.reshape(rows, -1).copy())
    data = generator.integers(0, 256, (blocks, packing.size), dtype=numpy.uint8)
    for offset in scale_offsets(packing.name):
        scales = generator.uniform(0.5, 1.5, (blocks, 1)) / 100
        data[:, offset : offset + 2] = scales.astype(numpy.float16).view(numpy.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


def scale_offsets(name: str) -> tuple[int, ...]:
    """Where the 16-bit floats of a block are."""
    return {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
    }.get(name, (0,))


def reference(weight: torch.Tensor, number: int) -> torch.Tensor:
    return torch.from_numpy(
        gguf.quants.dequantize(weight.numpy(), gguf.GGMLQuantizationType(number))
    )


@pytest.mark.parametrize("number", TYPES, ids=NAMES.get)
def test_weights_are_those_of_gguf_py_to_the_last_bit(number: int) -> None:
    weight = packed(number, 8, 512)
    assert (TYPES[number].weights, TYPES[number].size) == gguf.GGML_QUANT_SIZES[number]
    assert TYPES[number].name == gguf.GGMLQuantizationType(number).name
    found = kernels.dequantize(weight, number, torch.float32)
    assert found.shape == (8, 512)
    assert torch.equal(found, reference(weight, number))
    experts = weight.view(2, 4, -1)
    assert torch.equal(kernels.dequantize(experts, number, torch.float32).view(8, 512), found)


@pytest.mark.parametrize("number", TYPES, ids=NAMES.get)
def test_products_are_those_of_the_weights(number: int) -> None:
    weight = packed(number, 24, 512)
    x = torch.randn(3, 2, 512, generator=torch.Generator().manual_seed(1))
    found = kernels.matmul(x, weight, number)
    torch.testing.assert_close(found, x @ reference(weight, number).T)


def test_a_product_fits_into_a_compiled_graph() -> None:
    weight = packed(8, 16, 64)
    operator = torch.ops.vllm_bridge.gguf_matmul.default
    torch.library.opcheck(operator, (torch.randn(2, 64), weight, 8))
