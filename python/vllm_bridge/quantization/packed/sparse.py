"""Products with the few weights of a layer that are kept as they are, by their rows and columns.

They are compressed by rows: entries ``starts[n]`` to ``starts[n + 1]`` are those of row ``n``.
"""

import warnings

import torch

from vllm_bridge.quantization.packed import strips

# What is used of them here, a product, has been the same for years.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def compress(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries in any order, of which several may be in one place, as ``starts``, ``columns`` and
    ``values`` of ``matmul``.

    Args:
        count: of the rows that there are
    """
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return starts, columns[order].to(torch.int32), values[order].float()


def matmul(
    x: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``x`` times the transposed matrix, in float32.

    Args:
        x: any shape that ends with the number of columns
        starts: of each row, and the end of the last one; int32
        columns: of each entry; int32
        values: of each entry; float32
    """
    product: torch.Tensor = torch.ops.vllm_bridge.packed_sparse_matmul(x, starts, columns, values)
    return product


def _matmul(
    x: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    shape = (len(starts) - 1, x.shape[-1])
    matrix = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    return (matrix @ rows.T).T.reshape(*x.shape[:-1], shape[0])


strips.operation(
    "packed_sparse_matmul(Tensor x, Tensor starts, Tensor columns, Tensor values)",
    _matmul,
    lambda x, starts, columns, values: x.new_empty(
        (*x.shape[:-1], starts.shape[0] - 1), dtype=torch.float32
    ),
)
