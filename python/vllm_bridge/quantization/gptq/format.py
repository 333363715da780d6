"""How GPTQ stores a linear layer: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

Integers are packed into words of 32 bits, the first in the lowest bits, and may go from one word
into the next: those of ``qweight`` along the inputs, those of ``qzeros`` along the outputs. Scales
and zero points have a row for each group of inputs. ``g_idx`` has the group of each input, which
need not be in order.
"""

import dataclasses

import torch

from vllm_bridge.quantization.packed import grouped, strips

WORD = 32

# In which these formats store integers as a stream. gptqmodel stores others in planes.
BITS = (2, 3, 4, 8)

# What a checkpoint calls the form of its zero points, and whether that stores them as they are. The
# older stores one less.
STORES_ZEROS = {"gptq": False, "gptq_v2": True}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a layer is quantized.

    Args:
        bits: of an integer
        group_size: how many inputs share a scale; all of them where it is -1
        is_ordered: whether the inputs of a group are anywhere (``desc_act``)
        is_symmetric: whether zero is in the middle, whatever is stored
        stores_zeros: whether zero points are stored as they are
    """

    bits: int
    group_size: int
    is_ordered: bool
    is_symmetric: bool
    stores_zeros: bool = False

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    def check(self) -> None:
        """Raises a ``ValueError`` for what no layer of these formats is."""
        if self.bits not in BITS:
            raise ValueError(
                f"quantization with GPTQ has {', '.join(map(str, BITS))} bits, not {self.bits}"
            )

    def check_columns(self, columns: int, ranks: int) -> None:
        """Raises a ``ValueError`` where a layer with so many inputs cannot be divided among so many
        ranks, each with a part of the inputs."""
        if self.group_size != -1 and columns % self.group_size:
            raise ValueError(f"{columns} inputs are no whole groups of {self.group_size}")
        if ranks == 1:
            return
        if self.is_ordered:
            raise ValueError(
                f"layers whose inputs are divided among {ranks} ranks cannot have them in the "
                "order of their activations (`desc_act`)"
            )
        if columns % ranks or (self.group_size != -1 and columns // ranks % self.group_size):
            raise ValueError(
                f"{columns} inputs in groups of {self.group_size} cannot be divided among "
                f"{ranks} ranks"
            )


def rows(qweight: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Weights as ``packed.grouped`` has them: a row of bytes for each output."""
    _check_words("qweight", qweight)
    return qweight.T.contiguous().view(torch.uint8)


def zeros(qzeros: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Zero points as numbers: a row for each output, a column for each group."""
    _check_words("qzeros", qzeros)
    bits = settings.bits
    columns = qzeros.shape[1] * WORD // bits
    if settings.is_symmetric:
        return torch.full((columns, len(qzeros)), 1 << (bits - 1), dtype=torch.uint8)
    # The older format is made of the newer one by subtracting from whole words where integers
    # fill them, so that a zero point of 0 borrows from its neighbour.
    whole = WORD % bits == 0
    if whole and not settings.stores_zeros:
        qzeros = qzeros + sum(1 << shift for shift in range(0, WORD, bits))
    values = grouped.unpack(qzeros.contiguous().view(torch.uint8), bits, columns)
    if not whole and not settings.stores_zeros:
        values = (values + 1) & ((1 << bits) - 1)
    return values.T


def order(g_idx: torch.Tensor) -> torch.Tensor | None:
    """The inputs group by group; None where they are in this order."""
    inputs = torch.argsort(g_idx, stable=True)
    in_order = torch.arange(len(inputs), device=inputs.device)
    return None if torch.equal(inputs, in_order) else inputs


def reorder(packed: torch.Tensor, bits: int, inputs: torch.Tensor) -> torch.Tensor:
    """``rows`` with their inputs in another order."""
    reordered = torch.empty_like(packed)
    for strip in strips.of(len(packed), len(inputs)):
        integers = grouped.unpack(packed[strip], bits, len(inputs))
        reordered[strip] = grouped.pack(integers[:, inputs], bits)
    return reordered


def dequantize(
    settings: Settings,
    dtype: torch.dtype,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
) -> torch.Tensor:
    """The weights of a layer as plain numbers: a row for each output."""
    columns = qweight.shape[0] * WORD // settings.bits
    packed, inputs = rows(qweight, settings), None
    if settings.is_ordered and g_idx is not None:
        inputs = order(g_idx)
    if inputs is not None:
        packed = reorder(packed, settings.bits, inputs)
    by_row = scales.T.contiguous()
    plain = grouped.dequantize(
        packed, by_row, zeros(qzeros, settings).to(by_row), settings.bits, columns, dtype
    )
    return plain if inputs is None else plain[:, torch.argsort(inputs)]


def _check_words(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"`{name}` of GPTQ are integers of 32 bits, not {tensor.dtype}")
