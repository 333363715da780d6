"""Which part of a checkpoint's matrices a linear layer of vLLM's has: of one, or of several that it
computes as one layer (queries, keys and values; gate and up), and of each what belongs to its rank.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

_QKV = ("q", "k", "v")


def wait_for(layer: Any, dtypes: Mapping[str, torch.dtype], load: Callable[..., None]) -> None:
    """Gives a layer parameters that hold nothing, by which vLLM brings it the tensors of a
    checkpoint that go by other names in it.

    Args:
        dtypes: that the tensors usually have, by their names: vLLM warns of others
        load: given the layer, the name, the parameter, the tensor, and the shard if there are some
    """
    for name, dtype in dtypes.items():
        waits = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        waits.weight_loader = functools.partial(load, layer, name)
        layer.register_parameter(name, waits)


def names(quant_config: Any, prefix: str) -> list[str]:
    """The names that a layer's matrices have in a checkpoint."""
    head, dot, last = prefix.rpartition(".")
    return [f"{head}{dot}{part}" for part in quant_config.packed_modules_mapping.get(last, [last])]


class Shards:
    """Of one layer.

    Args:
        layer: vLLM's
        columns: that its rank has
        rows: that its rank has of each matrix
        whole_columns: of each matrix
    """

    def __init__(self, layer: Any, columns: int, rows: Sequence[int], whole_columns: int) -> None:
        self._layer, self._rows, self._count = layer, rows, columns
        self.columns = whole_columns

    @property
    def column_range(self) -> slice:
        """Those that the rank has."""
        start = self._layer.tp_rank * self._count if self._count < self.columns else 0
        return slice(start, start + self._count)

    def whole_rows(self, number: int) -> int:
        """How many rows a matrix has on all ranks together."""
        ranks = self._ranks(number)
        return self._rows[number] * ranks

    def meant(self, shard: Any) -> Sequence[int]:
        """The numbers of the matrices that vLLM means by a shard's name. None is all of them: one
        that several were merged to by those who made the checkpoint."""
        if shard is None:
            return range(len(self._rows))
        if isinstance(shard, tuple):
            return shard
        return (_QKV.index(shard) if shard in _QKV else shard,)

    def rows(self, shard: Any) -> Iterator[tuple[int, slice]]:
        """The number of each matrix that is meant, and the rows of what a checkpoint has of
        it that belong to the rank."""
        start = 0
        for number in self.meant(shard):
            count, ranks = self._rows[number], self._ranks(number)
            place = self._layer.tp_rank * ranks // max(1, self._layer.tp_size)
            first = start + place * count
            yield number, slice(first, first + count)
            start += count * ranks

    def first_row(self, number: int) -> int:
        """Where a matrix begins in the rows of all."""
        return sum(self._rows[:number])

    def of(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """The rows of a matrix in a tensor with those of all."""
        return tensor.narrow(0, self.first_row(number), self._rows[number])

    def _ranks(self, number: int) -> int:
        """Among how many ranks a matrix is divided by rows. Where there are more ranks than heads,
        several have the same keys and values."""
        from vllm.model_executor.layers.linear import (
            ColumnParallelLinear,
            QKVParallelLinear,
        )

        layer = self._layer
        if not isinstance(layer, ColumnParallelLinear):
            return 1
        if isinstance(layer, QKVParallelLinear) and number > 0:
            return int(layer.tp_size // layer.num_kv_head_replicas)
        return int(layer.tp_size)
