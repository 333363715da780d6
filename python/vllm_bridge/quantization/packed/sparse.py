"""The few weights of a layer that are added to those that are packed, by their rows and columns."""

import warnings
from typing import NamedTuple

import torch

# What is used of them here, a product, has been the same for years.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class Sparse(NamedTuple):
    """Weights compressed by rows.

    Args:
        starts: ``starts[n]`` to ``starts[n + 1]`` are the entries of row ``n``; int32
        columns: of each entry; int32
        values: of each entry; float32
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def compress(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> Sparse:
    """Entries in any order. Those in one place are added to each other."""
    places = torch.stack([rows, columns])
    given = torch.sparse_coo_tensor(places, values.float(), shape, check_invariants=True)
    made = given.coalesce().to_sparse_csr()
    return Sparse(made.crow_indices().int(), made.col_indices().int(), made.values())


def rounded(weights: Sparse, plain: torch.Tensor) -> Sparse:
    """What has to be added to the weights of a layer, ``plain``, for sums that are rounded to its
    dtype: then the product is the same whether the sums are made or not."""
    rows = torch.repeat_interleave(torch.arange(len(plain)), weights.starts.diff())
    own = plain[rows, weights.columns.long()].float()
    sums = (own + weights.values).to(plain.dtype)
    return weights._replace(values=sums.float() - own)


def matmul(x: torch.Tensor, weights: Sparse) -> torch.Tensor:
    """``x`` times the transposed weights, in float32."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    shape = (len(weights.starts) - 1, x.shape[-1])
    matrix = torch.sparse_csr_tensor(*weights, shape, check_invariants=False)
    return (matrix @ tokens.T).T.reshape(*x.shape[:-1], shape[0])


def add(plain: torch.Tensor, weights: Sparse, rows: slice) -> torch.Tensor:
    """Some rows of a layer with what is sparse added to them, in place. Waits for a GPU."""
    starts = weights.starts[rows.start : rows.stop + 1].long()
    entries = slice(int(starts[0]), int(starts[-1]))
    places = (
        torch.repeat_interleave(torch.arange(len(plain)), starts.diff()),
        weights.columns[entries].long(),
    )
    plain[places] = (plain[places].float() + weights.values[entries]).to(plain.dtype)
    return plain
