"""The demo model quantized as SqueezeLLM does it, and written as its ``pack.py`` writes it.

The values of a row are the means that k-means finds, where a weight counts by its sensitivity: the
square of the gradient that the demo's own text gives it. With "dense-and-sparse" the largest
weights, and the most sensitive ones, are left out of that and kept beside it.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

import checkpoints
from checkpoints import DEMO, MODELS, WEIGHTS, Tensors

FILE = "demo-squeezellm.pt"

# The parts of the weights that are kept as they are.
OUTLIERS, SENSITIVE = 0.004, 0.0005
# So many of the rows with the most of them are kept as a matrix of their own.
FULL_ROWS = 2
STEPS = 12

Words = npt.NDArray[np.uint32]


class Layer(NamedTuple):
    """A quantized matrix.

    Args:
        integers: rows times columns
        table: of each row
        sparse: what is added, mostly zeros; None where all is dense
    """

    integers: torch.Tensor
    table: torch.Tensor
    sparse: torch.Tensor | None

    def weight(self) -> torch.Tensor:
        dense = self.table.gather(1, self.integers)
        return dense if self.sparse is None else dense + self.sparse


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
@_one_thread()
@torch.enable_grad()  # type: ignore[untyped-decorator]
def sensitivities() -> Tensors:
    """The squares of the gradients of the demo's sentences, by weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    total: dict[str, Any] = {}
    lines = (MODELS / "facts.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines:
        ids = tokenizer("".join(line.split("\t", 1)), return_tensors="pt").input_ids
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if checkpoints.is_linear(name):
                total[name] = total.get(name, 0) + parameter.grad**2
    return total


@functools.cache
@_one_thread()
def layers(bits: int, is_sparse: bool) -> dict[str, Layer]:
    """The demo's matrices, by their names."""
    return {
        name.removesuffix(".weight"): quantize(
            tensor.float(), sensitivities()[name], bits, is_sparse
        )
        for name, tensor in load_file(DEMO / WEIGHTS).items()
        if checkpoints.is_linear(name)
    }


def quantize(weight: torch.Tensor, sensitivity: torch.Tensor, bits: int, is_sparse: bool) -> Layer:
    kept = torch.zeros_like(weight, dtype=torch.bool)
    if is_sparse:
        for measure, part in ((weight.abs(), OUTLIERS), (sensitivity, SENSITIVE)):
            count = max(1, int(part * weight.numel()))
            kept.view(-1)[measure.flatten().topk(count).indices] = True
    weighted = (sensitivity + 1e-12).masked_fill(kept, 0)
    table = _means(weight, weighted, 2**bits)
    integers = (weight.unsqueeze(2) - table.unsqueeze(1)).abs().argmin(2)
    if not is_sparse:
        return Layer(integers, table, None)
    # What is kept has the value nearest to zero in the dense part, and the rest here.
    nearest = table.abs().argmin(1, keepdim=True)
    integers = torch.where(kept, nearest, integers)
    left = torch.where(kept, weight - table.gather(1, nearest), 0.0)
    return Layer(integers, table, left)


def _means(weight: torch.Tensor, weighted: torch.Tensor, count: int) -> torch.Tensor:
    """Weighted k-means of each row, from quantiles."""
    quantiles = (torch.arange(count) + 0.5) / count
    table = weight.quantile(quantiles, dim=1).T.contiguous()
    for _ in range(STEPS):
        nearest = (weight.unsqueeze(2) - table.unsqueeze(1)).abs().argmin(2)
        sums = torch.zeros_like(table).scatter_add_(1, nearest, weight * weighted)
        sizes = torch.zeros_like(table).scatter_add_(1, nearest, weighted)
        table = torch.where(sizes > 0, sums / sizes, table)
    return table.sort(1).values


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """As ``QuantLinearLUT.pack2`` has it: a column for each row of the matrix."""
    values: Words = integers.T.contiguous().numpy().astype(np.uint32)
    packed: Words = np.zeros((len(values) // 32 * bits, values.shape[1]), np.uint32)
    first = row = 0
    while row < len(packed):
        if bits == 4:
            for place in range(8):
                packed[row] |= values[first + place] << np.uint32(4 * place)
            first, row = first + 8, row + 1
            continue
        for place in range(10):
            packed[row] |= values[first + place] << np.uint32(3 * place)
        packed[row] |= values[first + 10] << np.uint32(30)
        packed[row + 1] |= values[first + 10] >> np.uint32(2) & np.uint32(1)
        for place in range(10):
            packed[row + 1] |= values[first + 11 + place] << np.uint32(3 * place + 1)
        packed[row + 1] |= values[first + 21] << np.uint32(31)
        packed[row + 2] |= values[first + 21] >> np.uint32(1) & np.uint32(3)
        for place in range(10):
            packed[row + 2] |= values[first + 22 + place] << np.uint32(3 * place + 2)
        first, row = first + 32, row + 3
    return torch.from_numpy(packed.view(np.int32))


def make_dense(folder: Path) -> Path:
    """4 bits, in safetensors, with values in float16."""
    tensors = _others()
    for name, layer in layers(4, False).items():
        tensors[f"{name}.qweight"] = pack(layer.integers, 4)
        tensors[f"{name}.lookup_table"] = layer.table.half()
    config = {"quantization_config": {"quant_method": "squeezellm", "wbits": 4}}
    return checkpoints.write(folder, tensors, checkpoints.read_config(DEMO) | config)


def make_sparse(folder: Path) -> Path:
    """3 bits and what is sparse, in SqueezeLLM's own format."""
    state: dict[str, Any] = dict(_others())
    for name, layer in layers(3, True).items():
        assert layer.sparse is not None
        counts = (layer.sparse != 0).sum(1)
        full = counts.topk(FULL_ROWS).indices
        rest = layer.sparse.index_fill(0, full, 0.0).to_sparse_csr()
        parts = {
            "qweight": pack(layer.integers, 3),
            "lookup_table": layer.table,
            "rows": rest.crow_indices().int(),
            "cols": rest.col_indices().int(),
            "vals": rest.values(),
            "full_rows": layer.sparse[full].T.contiguous(),
            "full_row_indices": full.int(),
            "startrows": torch.zeros(128, dtype=torch.int32),
        }
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        state[f"sparse_threshold.{name}"] = len(rest.values())
    checkpoints.write(folder, {}, checkpoints.read_config(DEMO))
    (folder / WEIGHTS).unlink()
    (folder / "quant_config.json").write_text(json.dumps({"wbits": 3}))
    torch.save(state, folder / FILE)
    return folder


def _others() -> Tensors:
    demo = load_file(DEMO / WEIGHTS)
    return {name: tensor for name, tensor in demo.items() if not checkpoints.is_linear(name)}


def unpack(folder: Path) -> Tensors:
    """The weights of such a model as plain numbers, by NumPy. Values are rounded to bf16, in
    which they are multiplied; what is sparse is not."""
    is_sparse = (folder / FILE).exists()
    tensors = torch.load(folder / FILE) if is_sparse else load_file(folder / WEIGHTS)
    bits = 3 if is_sparse else 4
    unpacked: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            parts = {one: tensors.get(f"{layer}.{one}") for one in _PARTS}
            unpacked[f"{layer}.weight"] = _unpack(tensor, parts, bits)
        elif f"{layer}.qweight" not in tensors and isinstance(tensor, torch.Tensor):
            unpacked[name] = tensor
    return unpacked


_PARTS = ("lookup_table", "rows", "cols", "vals", "full_rows", "full_row_indices")


def _unpack(packed: torch.Tensor, parts: dict[str, Any], bits: int) -> torch.Tensor:
    rows = np.ascontiguousarray(packed.numpy().T)
    stream = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    integers = stream.reshape(len(rows), -1, bits) @ (1 << np.arange(bits))
    table = parts["lookup_table"].bfloat16().float().numpy()
    weight = np.take_along_axis(table, integers, 1)
    if parts["rows"] is not None:
        starts, columns, values = (parts[name].numpy() for name in ("rows", "cols", "vals"))
        for row in range(len(weight)):
            part = slice(starts[row], starts[row + 1])
            weight[row, columns[part]] += values[part]
        for number, row in enumerate(parts["full_row_indices"].numpy()):
            weight[row] += parts["full_rows"].numpy()[:, number]
    return torch.from_numpy(weight)
